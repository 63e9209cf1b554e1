"""Compile each different piece of a model once; start anywhere in a blink."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from piecework.errors import (
    BackwardError,
    BundleError,
    CapacityError,
    CaptureError,
    CheckError,
    CompileError,
    CorruptBundle,
    EngineError,
    MissingPackageError,
    OpError,
    PieceworkError,
    RequestError,
    ShapeContractError,
    StaleBundle,
    StoreError,
    UnsupportedModelError,
    UntrustedBundle,
    WeightsError,
)
from piecework.foundation.version import VERSION as __version__

if TYPE_CHECKING:
    from piecework.bundle.bundle import Bundle
    from piecework.bundle.record import Recorder
    from piecework.bundle.run.loading import load
    from piecework.bundle.run.model import LoadedModel
    from piecework.capture.request import Dim
    from piecework.compiler.api import compile
    from piecework.compiler.eager_ops import EagerOps, eager_ops
    from piecework.compiler.explain import explain
    from piecework.engine.encoding.embedder import CrossEncoder, Embedder
    from piecework.engine.llm import LLM
    from piecework.engine.sampling_params import SamplingParams, StructuredOutput
    from piecework.engine.text.completion import Completion, Continuation
    from piecework.models.batch import ForwardBatch
    from piecework.models.latent_attention import LatentOptions, MultiHeadLatentAttention
    from piecework.ops.ir.forward_context import Batch, ForwardContext, running_context
    from piecework.ops.ir.layer import LayerName, LayerNameType, encode, resolve
    from piecework.ops.ir.op import op
    from piecework.ops.ir.opaque_op import check_ops, opaque_op
    from piecework.ops.ir.provider_order import ProviderOrder
    from piecework.ops.mla.core import Regime
    from piecework.providers.discovery import selected_providers as providers
    from piecework.spec.compile_options import BackendName, CompileOptions
    from piecework.spec.latent_config import LatentSizes
    from piecework.spec.model_spec import ModelSpec

_LAZY = {
    "compile": "piecework.compiler.api",
    "eager_ops": "piecework.compiler.eager_ops",
    "EagerOps": "piecework.compiler.eager_ops",
    "BackendName": "piecework.spec.compile_options",
    "CompileOptions": "piecework.spec.compile_options",
    "ModelSpec": "piecework.spec.model_spec",
    "explain": "piecework.compiler.explain",
    "Dim": "piecework.capture.request",
    "LayerName": "piecework.ops.ir.layer",
    "LayerNameType": "piecework.ops.ir.layer",
    "resolve": "piecework.ops.ir.layer",
    "encode": "piecework.ops.ir.layer",
    "Batch": "piecework.ops.ir.forward_context",
    "ForwardContext": "piecework.ops.ir.forward_context",
    "running_context": "piecework.ops.ir.forward_context",
    "Recorder": "piecework.bundle.record",
    "opaque_op": "piecework.ops.ir.opaque_op",
    "check_ops": "piecework.ops.ir.opaque_op",
    "op": "piecework.ops.ir.op",
    "ProviderOrder": "piecework.ops.ir.provider_order",
    "load": "piecework.bundle.run.loading",
    "LoadedModel": "piecework.bundle.run.model",
    "Bundle": "piecework.bundle.bundle",
    "LLM": "piecework.engine.llm",
    "Embedder": "piecework.engine.encoding.embedder",
    "CrossEncoder": "piecework.engine.encoding.embedder",
    "Completion": "piecework.engine.text.completion",
    "Continuation": "piecework.engine.text.completion",
    "SamplingParams": "piecework.engine.sampling_params",
    "StructuredOutput": "piecework.engine.sampling_params",
    "ForwardBatch": "piecework.models.batch",
    "LatentOptions": "piecework.models.latent_attention",
    "LatentSizes": "piecework.spec.latent_config",
    "MultiHeadLatentAttention": "piecework.models.latent_attention",
    "Regime": "piecework.ops.mla.core",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import piecework` needs neither torch nor a compiler."""
    if name == "providers":
        return importlib.import_module("piecework.providers")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'piecework' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "LLM",
    "BackendName",
    "BackwardError",
    "Batch",
    "Bundle",
    "BundleError",
    "CapacityError",
    "CaptureError",
    "CheckError",
    "CompileError",
    "CompileOptions",
    "Completion",
    "Continuation",
    "CorruptBundle",
    "CrossEncoder",
    "Dim",
    "EagerOps",
    "Embedder",
    "EngineError",
    "ForwardBatch",
    "ForwardContext",
    "LatentOptions",
    "LatentSizes",
    "LayerName",
    "LayerNameType",
    "LoadedModel",
    "MissingPackageError",
    "ModelSpec",
    "MultiHeadLatentAttention",
    "OpError",
    "PieceworkError",
    "ProviderOrder",
    "Recorder",
    "Regime",
    "RequestError",
    "SamplingParams",
    "ShapeContractError",
    "StaleBundle",
    "StoreError",
    "StructuredOutput",
    "UnsupportedModelError",
    "UntrustedBundle",
    "WeightsError",
    "__version__",
    "check_ops",
    "compile",
    "eager_ops",
    "encode",
    "explain",
    "load",
    "op",
    "opaque_op",
    "providers",
    "resolve",
    "running_context",
]

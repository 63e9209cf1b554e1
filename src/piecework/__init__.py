"""Compile each different piece of a model once; start anywhere in a blink."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from piecework.errors import (
    BackwardError,
    BundleError,
    CapacityError,
    CaptureError,
    CompileError,
    CorruptBundle,
    EngineError,
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
    from piecework.compiler.api import compile
    from piecework.compiler.eager_ops import EagerOps, eager_ops
    from piecework.compiler.explain import explain
    from piecework.compiler.options import BackendName, CompileOptions
    from piecework.engine.completion import Completion, Continuation
    from piecework.engine.llm import LLM
    from piecework.engine.sampling_params import SamplingParams, StructuredOutput
    from piecework.graph.request import Dim
    from piecework.models.batch import ForwardBatch
    from piecework.models.latent_attention import LatentOptions, MultiHeadLatentAttention
    from piecework.models.latent_config import LatentSizes
    from piecework.ops.forward_context import Batch, ForwardContext, running_context
    from piecework.ops.ir import op
    from piecework.ops.layer import LayerName, LayerNameType, encode, resolve
    from piecework.ops.mla_core import Regime
    from piecework.ops.opaque_op import check_ops, opaque_op
    from piecework.ops.selection import ProviderOrder
    from piecework.providers.discovery import selected_providers as providers
    from piecework.record import Recorder
    from piecework.runtime.loading import load
    from piecework.runtime.model import LoadedModel
    from piecework.store.bundle import Bundle

_LAZY = {
    "compile": "piecework.compiler.api",
    "eager_ops": "piecework.compiler.eager_ops",
    "EagerOps": "piecework.compiler.eager_ops",
    "BackendName": "piecework.compiler.options",
    "CompileOptions": "piecework.compiler.options",
    "explain": "piecework.compiler.explain",
    "Dim": "piecework.graph.request",
    "LayerName": "piecework.ops.layer",
    "LayerNameType": "piecework.ops.layer",
    "resolve": "piecework.ops.layer",
    "encode": "piecework.ops.layer",
    "Batch": "piecework.ops.forward_context",
    "ForwardContext": "piecework.ops.forward_context",
    "running_context": "piecework.ops.forward_context",
    "Recorder": "piecework.record",
    "opaque_op": "piecework.ops.opaque_op",
    "check_ops": "piecework.ops.opaque_op",
    "op": "piecework.ops.ir",
    "ProviderOrder": "piecework.ops.selection",
    "load": "piecework.runtime.loading",
    "LoadedModel": "piecework.runtime.model",
    "Bundle": "piecework.store.bundle",
    "LLM": "piecework.engine.llm",
    "Completion": "piecework.engine.completion",
    "Continuation": "piecework.engine.completion",
    "SamplingParams": "piecework.engine.sampling_params",
    "StructuredOutput": "piecework.engine.sampling_params",
    "ForwardBatch": "piecework.models.batch",
    "LatentOptions": "piecework.models.latent_attention",
    "LatentSizes": "piecework.models.latent_config",
    "MultiHeadLatentAttention": "piecework.models.latent_attention",
    "Regime": "piecework.ops.mla_core",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import piecework` needs neither torch nor a compiler."""
    if name == "providers":
        return importlib.import_module("piecework.providers")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'piecework' has no attribute {name!r}")


__all__ = [
    "LLM",
    "BackendName",
    "BackwardError",
    "Batch",
    "Bundle",
    "BundleError",
    "CapacityError",
    "CaptureError",
    "CompileError",
    "CompileOptions",
    "Completion",
    "Continuation",
    "CorruptBundle",
    "Dim",
    "EagerOps",
    "EngineError",
    "ForwardBatch",
    "ForwardContext",
    "LatentOptions",
    "LatentSizes",
    "LayerName",
    "LayerNameType",
    "LoadedModel",
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

"""The three ways in which an operator may be told its layer, and every operator under test in each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from piecework.ops.ir.layer import LayerName, LayerNameType
from piecework.ops.ir.opaque_op import OpaqueOp, opaque_op
from piecework.ops.layer_attention import kv_write, layer_attention
from piecework.ops.mixers.gated_delta_net import gated_delta_net
from piecework.ops.mixers.mamba import mamba_mixer
from piecework.ops.mixers.mamba2 import mamba2_mixer
from piecework.ops.mla.layer import layer_mla_attention
from piecework.ops.moe.layer import moe_forward
from tests.unit.names.adapter import adapter

KINDS: Mapping[str, Callable[[int], Any]] = {
    "LayerName": lambda index: LayerName(f"layers.{index}"),
    "str": lambda index: f"layers.{index}",
    "int": lambda index: index,
}
"""What a module holds as its layer's name, by the type of the operator's argument."""

_PLAIN: Mapping[str, type] = {"str": str, "int": int}


def _variants(op: OpaqueOp) -> dict[str, OpaqueOp]:
    """Return `op`, which takes a LayerNameType, and operators of the same function that take a str and an int."""
    return {"LayerName": op, **{kind: _variant(op, kind, annotation) for kind, annotation in _PLAIN.items()}}


def _variant(op: OpaqueOp, kind: str, annotation: type) -> OpaqueOp:
    def function(*args: Any, **kwargs: Any) -> Any:
        return op.function(*args, **kwargs)

    signature = inspect.signature(op)
    layer = signature.parameters["layer"]
    assert layer.annotation is LayerNameType
    others = [layer.replace(annotation=annotation) if p is layer else p for p in signature.parameters.values()]
    name = f"{op.__name__}_{kind}"
    function.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    function.__module__, function.__qualname__, function.__name__ = __name__, name, name
    made = opaque_op(f"pwnames::{name}")(function)
    made.fake(op._fake)
    return made


OPS: Mapping[OpaqueOp, Mapping[str, OpaqueOp]] = {
    op: _variants(op)
    for op in (
        layer_attention,
        kv_write,
        layer_mla_attention,
        moe_forward,
        mamba_mixer,
        mamba2_mixer,
        gated_delta_net,
        adapter,
    )
}
"""For each operator: itself and its variants, by the type of its argument `layer`."""

"""Compile a stack of layers, whose operators are told their names in one of the ways, and call it once; or time names.

WAY is whole, regional (each block by itself) or resolve (from a name to its layer's state). Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import compilation_time_metrics
from torch._library.opaque_object import register_opaque_type

from benchmarks.common.steps import emit
from piecework.bundle.record import Recorder
from piecework.ops.ir.forward_context import Batch, ForwardContext, layer_state
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.opaque_op import OpaqueOp, opaque_op
from piecework.ops.layer_attention import AttentionState, kv_write, layer_attention

HIDDEN, HEADS, INTERMEDIATE = 256, 4, 512
HEAD_DIM = HIDDEN // HEADS
TOKENS, BLOCK_SIZE = 8, 16
ONLY = "the only cache"


class ValueName:
    """A layer's name as vLLM registers its own: a value, guarded by equality, hoisted to an input of the graph."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ValueName) and other.value == self.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        return f"ValueName({self.value!r})", {"ValueName": ValueName}


register_opaque_type(ValueName, typ="value", hoist=True)


@dataclass(frozen=True)
class System:
    """How layers are named: what a module holds, what its operators take, and options of the backend."""

    name: Callable[[int], Any]
    update: OpaqueOp
    attend: OpaqueOp
    options: Mapping[str, Any]


def taking(op: OpaqueOp, annotation: Any) -> OpaqueOp:
    """Return an operator of the same function whose argument `layer` has another type."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return op.function(*args, **kwargs)

    signature = inspect.signature(op)
    others = [p.replace(annotation=annotation) if p.name == "layer" else p for p in signature.parameters.values()]
    short = f"{op.__name__}_{annotation.__name__}"
    function.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    function.__module__, function.__qualname__, function.__name__ = __name__, short, short
    fake: Any = op._fake
    made = opaque_op(f"pwbench::{short}")(function)
    made.fake(fake)
    return made


@opaque_op("pwbench::update")
def update_unnamed(key: Tensor, value: Tensor) -> Tensor:
    """Do what `kv_write` does, in the one cache that all layers share."""
    return kv_write.function(key, value, ONLY)


@update_unnamed.fake
def _(key: Tensor, value: Tensor) -> Tensor:
    return key.new_empty(0)


@opaque_op("pwbench::attend")
def attend_unnamed(query: Tensor, key: Tensor, value: Tensor, scale: float, after: Tensor) -> Tensor:
    """Do what `layer_attention` does, over the one cache that all layers share."""
    return layer_attention.function(query, key, value, ONLY, scale, after=after)


@attend_unnamed.fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, after: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def make_system(name: str) -> System:
    """Return one of lifted, value_type, layer_name, no_names."""
    if name == "no_names":
        return System(lambda index: None, update_unnamed, attend_unnamed, {})
    if name == "layer_name":
        return System(lambda index: LayerName(layer(index)), kv_write, layer_attention, {})
    if name == "value_type":
        ops = taking(kv_write, ValueName), taking(layer_attention, ValueName)
        return System(lambda index: ValueName(layer(index)), *ops, {})
    ops = taking(kv_write, str), taking(layer_attention, str)
    return System(layer, *ops, {})


def layer(index: int) -> str:
    """Return a layer's name."""
    return f"model.layers.{index}.self_attn"


class Block(nn.Module):
    """A decoder layer without rotary embeddings: norm, attention, norm, gated MLP."""

    def __init__(self, system: System, index: int) -> None:
        super().__init__()
        self.update, self.attend, self.layer = system.update, system.attend, system.name(index)
        self.norms = nn.ModuleList([nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)])
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norms[0](x)).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        name = () if self.layer is None else (self.layer,)
        token = self.update(key, value, *name)
        attended = self.attend(query, key, value, *name, HEAD_DIM**-0.5, after=token)
        x = x + self.out(attended.flatten(1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(torch.nn.functional.silu(gate) * up)


class Stack(nn.Module):
    """The layers, one after the other."""

    def __init__(self, system: System, *, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(system, index) for index in range(num_layers)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make_context(*, num_layers: int) -> ForwardContext:
    """Return a context with an empty cache of one block for every layer, and one that has no layer."""
    names = [*(layer(index) for index in range(num_layers)), ONLY]
    return ForwardContext({n: AttentionState(torch.zeros(2, 1, BLOCK_SIZE, HEADS, HEAD_DIM)) for n in names})


def make_batch() -> Batch:
    """Return a prompt of `TOKENS` tokens."""
    return Batch(
        slot_mapping=torch.arange(TOKENS),
        block_tables=torch.zeros(1, 1, dtype=torch.int64),
        seq_lens=torch.tensor([TOKENS]),
        query_start=torch.tensor([0, TOKENS]),
        num_decode_tokens=0,
    )


def compile_and_run(system: System, *, whole: bool, num_layers: int) -> dict[str, Any]:
    """Compile by a first call, and return seconds and counts; the result must be what eager mode gives."""
    torch.manual_seed(0)
    model = Stack(system, num_layers=num_layers).eval().requires_grad_(False)
    x, recorder = torch.randn(TOKENS, HIDDEN), Recorder()
    with make_context(num_layers=num_layers).running(make_batch()):
        wanted = model(x)
    settings: dict[str, Any] = {
        "backend": "piecework",
        "options": {**system.options, "recorder": recorder},
        "dynamic": True,
        "fullgraph": True,
    }
    run: Callable[[Tensor], Tensor] = model
    if whole:
        run = torch.compile(model, **settings)
    else:
        for block in model.blocks:
            block.compile(**settings)
    # every block may be traced anew
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4 * num_layers
    with make_context(num_layers=num_layers).running(make_batch()):
        begun = time.perf_counter()
        result = run(x)
        cold_s = time.perf_counter() - begun
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
    record = recorder.finish()
    return {
        "cold_s": cold_s,
        "trace_s": _seconds("_compile.compile_inner") - _seconds("OutputGraph.call_user_compiler"),
        "compile_s": record.phases["compile"],
        "artifacts": record.counts["compiled"],  # caches are empty: each piece is compiled where it is first met
        "graphs": record.counts["graphs"],
    }


def _seconds(phase: str) -> float:
    """Return what Dynamo has noted for a part of its work."""
    return sum(compilation_time_metrics.get(phase, ()))


def time_resolving(system: System, *, num_layers: int, steps: int = 3000) -> dict[str, Any]:
    """Return microseconds for one layer's name, as its operator has it, to become the layer's state."""
    names = [system.name(index) for index in range(num_layers)]
    samples = []
    with make_context(num_layers=num_layers).running(make_batch()):
        for _ in range(steps):
            begun = time.perf_counter()
            for name in names:
                layer_state(name, AttentionState)
            samples.append(time.perf_counter() - begun)
    return {"resolve_us": 1e6 * statistics.median(samples) / num_layers}


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=("lifted", "value_type", "layer_name", "no_names"))
    parser.add_argument("way", choices=("whole", "regional", "resolve"))
    parser.add_argument("layers", type=int)
    args = parser.parse_args()
    system = make_system(args.system)
    with torch.no_grad():
        if args.way == "resolve":
            figures = time_resolving(system, num_layers=args.layers)
        else:
            figures = compile_and_run(system, whole=args.way == "whole", num_layers=args.layers)
    emit(figures)


if __name__ == "__main__":
    main()

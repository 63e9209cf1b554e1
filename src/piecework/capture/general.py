"""Whether what code does for all sizes but 1 is right for 1 as well: found out by running both, once, on small inputs.

Code that asks `size == 1` often means a shortcut: no mask for one token, no loop for one step. A trace then takes the
general way (foundation/torch_private/symbolic.py) and notes it; here its graph and the module are run with that size
1. The weights are random: trained or freshly made ones may hide a difference (a gate that is zero), random ones don't.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from piecework.capture.request import CaptureRequest, Dim, SizeInput, TensorInput
from piecework.capture.structure import flatten
from piecework.errors import ShapeContractError
from piecework.foundation.torch_private import Guard, holds_within

_MOST_BYTES: Final = 2 << 30
_SEED: Final = 20
_TOLERANCE: Final = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Forward:
    """A graph of a module's forward.

    Attributes:
        graph: the graph.
        names: its placeholders → names of inputs, weights and literals.
        literals: tensors that are none of the module's, by name.
        request: what was captured.
    """

    graph: torch.fx.Graph
    names: Mapping[torch.fx.Node, str]
    literals: Mapping[str, Tensor]
    request: CaptureRequest


def holds_for_one(forward: Forward, sizes: Iterable[str]) -> bool:
    """Return whether a graph computes what its module does where each of some sizes is 1, and all are.

    Args:
        forward: the graph; its request has an example of each input.
        sizes: names of declared sizes.

    False also where it can't be tried: tensors without values, states, held buffers, objects, more than
    2 GiB of weights.
    """
    request = forward.request
    names = sorted(set(sizes))
    if request.states or request.held or request.objects or {i.name for i in request.inputs} - set(request.values):
        return False
    weights = random_weights(request.module)
    if weights is None:
        return False
    chosen = [{name} for name in names] + ([set(names)] if len(names) > 1 else [])
    return all(_same(forward, weights, ones=ones) for ones in chosen)


def parts(conditions: Sequence[str], sizes: Mapping[str, Dim]) -> tuple[str, Dim, Dim] | None:
    """Return a size, and its range in two parts between which a trace's conditions draw a line, the lower one first.

    Args:
        conditions: over sizes, as `ShapeContractError` has them.
        sizes: the ranges that were traced.

    None where they draw no such line.
    """
    for name, works in working_ranges(conditions, sizes).items():
        dim = sizes[name]
        line = works.min if works.min > dim.min else works.max + 1
        return name, _range(dim, dim.min, line - 1), _range(dim, line, dim.max)
    return None


def working_ranges(conditions: Sequence[str], sizes: Mapping[str, Dim]) -> dict[str, Dim]:
    """Return the part of each size's range in which a trace's conditions on it alone hold, where there is one.

    It has the value that the trace had, and at least two values.
    """
    found: dict[str, Dim] = {}
    for name, dim in sizes.items():
        own = [c for c in conditions if [n for n in sizes if mentions(c, n)] == [name]]
        part = _part(own, name, dim) if own else None
        if part is not None:
            found[name] = part
    return found


def require_whole_ranges(guards: Sequence[Guard], request: CaptureRequest) -> None:
    """Raise ShapeContractError where a trace holds for a part of the declared ranges only, with the part that works."""
    if guards:
        conditions = [g.expr for g in guards]
        ranges = working_ranges(conditions, request.traced_sizes)
        works = " and ".join(f"{name} = Dim({dim.min}, {dim.max})" for name, dim in ranges.items())
        fixed = [m[1] for c in conditions if (m := re.fullmatch(r"Eq\((\w+), \d+\)", c))]
        others = [c for c in conditions if re.fullmatch(r"Eq\((\w+), \d+\)", c) is None]
        found = [f"for a single value of {name}, which the code uses as a number" for name in sorted(set(fixed))]
        found += ["only where " + " and ".join(sorted(set(others))[:4])] if others else []
        raise ShapeContractError(
            asked=f"a graph of {type(request.module).__name__} for the whole declared range of every size",
            found="the trace holds " + ", and ".join(found),
            try_=(f"declare {works}, or " if works else "declare a range in which that holds, or ")
            + "change the line so that it does not depend on the size",
            location=next((g.location for g in guards if g.location), ""),
            conditions=conditions,
        )


def _part(conditions: Sequence[str], name: str, dim: Dim) -> Dim | None:
    def hold(low: int, high: int) -> bool:
        return all(holds_within(c, name, low=low, high=high) for c in conditions)

    if not hold(dim.traced, dim.traced):
        return None
    low = dim.traced - _greatest(lambda by: hold(dim.traced - by, dim.traced), dim.traced - dim.min)
    high = dim.traced + _greatest(lambda by: hold(low, dim.traced + by), dim.max - dim.traced)
    return _range(dim, low, high) if low < high else None


def _range(dim: Dim, low: int, high: int) -> Dim:
    """Return a part of a size's range; the whole one's hint may lie in another part."""
    return replace(dim, min=low, max=high, hint=None if dim.hint is None else max(low, min(high, dim.hint)))


def _greatest(holds: Callable[[int], bool], most: int) -> int:
    """Return the greatest number in [0, most] up to which something holds, as it does for 0."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def mentions(condition: str, size: str) -> bool:
    """Whether a condition's text names a size."""
    return re.search(rf"\b{re.escape(size)}\b", condition) is not None


def random_weights(module: nn.Module) -> dict[str, Tensor] | None:
    """Return random values for a module's parameters, scaled to keep what they multiply in range, and its buffers."""
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    num_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
    if num_bytes > _MOST_BYTES or any(b.is_meta for b in buffers.values()):
        return None
    generator = torch.Generator().manual_seed(_SEED)
    made = {name: buffer.clone() for name, buffer in buffers.items()}
    for name, parameter in parameters.items():
        fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 1
        device = "cpu" if parameter.is_meta else parameter.device
        values = torch.randn(parameter.shape, generator=generator) / max(1.0, fan_in**0.5)
        made[name] = (values if parameter.dim() > 1 else 1 + values / 4).to(device, parameter.dtype)
    return made


def _same(forward: Forward, weights: Mapping[str, Tensor], *, ones: set[str]) -> bool:
    request = forward.request
    given = {i.name: _example(i, request, ones) for i in request.inputs}
    if not all(_inside(given[i.name], i, request) for i in request.inputs):
        return False
    module = torch.fx.GraphModule(nn.Module(), forward.graph)
    fresh = {name: tensor.clone() for name, tensor in weights.items()}  # a forward may write to its buffers
    known = {**weights, **forward.literals, **given}
    nodes = [node for node in forward.graph.nodes if node.op == "placeholder"]
    ran = Called(request)
    with torch.no_grad(), torch.random.fork_rng():
        try:
            wanted = torch.func.functional_call(ran, {f"module.{n}": t for n, t in fresh.items()}, (given,))
            found = torch.fx.Interpreter(module).run(*(known[forward.names[n]] for n in nodes))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
            return False
    return len(wanted) == len(found) and all(_close(a, b) for a, b in zip(wanted, found, strict=True))


class Called(nn.Module):
    """A request's call as a module, so that it can be run with other weights: of its `module`."""

    def __init__(self, request: CaptureRequest) -> None:
        super().__init__()
        self.module = request.module
        self._call = request.call

    def forward(self, values: Mapping[str, Any]) -> list[Tensor]:
        """Return the flat results for named inputs."""
        return flatten(self._call(self.module, values))[0]


def _example(given: TensorInput | SizeInput, request: CaptureRequest, ones: set[str]) -> Tensor:
    """Return a copy of an input's example, cut to 1 where an axis has one of the sizes, and to what was traced."""
    value = request.values[given.name]
    for axis, size in enumerate(given.shape if isinstance(given, TensorInput) else ()):
        if isinstance(size, str):
            most = 1 if size in ones else request.traced_sizes[size].max
            value = value.narrow(axis, 0, min(most, value.shape[axis]))
    copy = value.clone(memory_format=torch.preserve_format)
    return copy.contiguous() if isinstance(given, TensorInput) and given.stride is None else copy


def _inside(value: Tensor, given: TensorInput | SizeInput, request: CaptureRequest) -> bool:
    """Whether a value's sizes are as large as the least that were traced."""
    shape = given.shape if isinstance(given, TensorInput) else ()
    least = [request.traced_sizes[size].min if isinstance(size, str) else 0 for size in shape]
    return all(size >= low for size, low in zip(value.shape, least, strict=False))


def _close(wanted: Tensor, found: Tensor) -> bool:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    if not math.isfinite(scale):
        return False
    return torch.allclose(wanted, found, rtol=0.0, atol=_TOLERANCE.get(wanted.dtype, 1e-1) * max(scale, 1e-6))

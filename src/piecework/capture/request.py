"""What to capture: a module, how to call it, and the declared shapes of everything that goes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from piecework.bundle.facts import Fact
from piecework.bundle.recipes import Sources
from piecework.bundle.where import Where


@dataclass(frozen=True)
class Dim:
    """A dynamic size that may take every value in [min, max].

    Args:
        min: smallest value, at least 0.
        max: largest value.
        axes: where `piecework.compile` finds it in the example arguments: argument name → axis or axes. Left out, it is
            axis 0 of every tensor argument.
        hint: a typical value, used for heuristics of the code generator only.
    """

    min: int
    max: int
    axes: Mapping[str, int | tuple[int, ...]] | None = None
    hint: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ValueError(f"Dim({self.min}, {self.max}): a range needs 0 <= min <= max")

    @property
    def traced(self) -> int:
        """The value that a trace has for it where code wants one, which may be in parts of the range only.

        Any does, as long as it is neither 0 nor 1 and that of no other size by accident.
        """
        return max(self.min, min(self.max, 2 * self.min + 37)) if self.hint is None else self.hint


@dataclass(frozen=True)
class TensorInput:
    """A tensor argument: each axis is a number, the name of a declared size, or an expression over such names."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    device: str = "cpu"
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SizeInput:
    """An integer argument whose value is the declared size `size`."""

    name: str
    size: str


@dataclass(frozen=True)
class Variant:
    """A forward of its own for one kind of batch, over the same weights, states and inputs.

    Args:
        name: of the kind, such as "decode".
        where: what is so in these batches.
        call: runs the module on them; what it computes is what `CaptureRequest.call` would.
    """

    name: str
    where: Where
    call: Callable[[nn.Module, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class CaptureRequest:
    """Everything capture needs.

    Attributes:
        module: the module; parameters may be on the meta device.
        call: runs it on named inputs, `call(module, {"input_ids": ..., ...})`, and returns nested tuples, lists and
            dicts of tensors.
        inputs: the named inputs in order.
        sizes: the declared dynamic sizes. The first is the one that shape ranges are about.
        states: buffers (by qualified name) that opaque ops read and write between calls, such as KV caches, with their
            shapes; they are not weights.
        opaque: operators ("namespace::name") at which the graph is cut, beside all that aren't torch's own.
        device: device type that the compiled model runs on.
        variants: forwards for some kinds of batches, first come first; `call` is for all the others.
        sources: how parameters are made from checkpoint tensors; one that is not here is taken under its own name.
        notes: what was decided while the module was built, for people; they go into the bundle's record.
        facts: of the bundle, that were known when the module was built.
        objects: what opaque ops are called with and every call brings anew, by name: what stands for it in the trace.
        examples: what one call really brings for an object, by name, where that is known: code that only looks at
            shapes and dtypes (an op's declared calls) may look at the layer it stands for.
        may_write: whether the forward may write to its inputs; every such write is a step of the plan.
        narrowed: the ranges of sizes for which it is traced, where variants take the rest of what is declared.
        values: an example of each tensor input, by name, where there are any.
        held: buffers that the forward changes, by name (capture/held.py); None where it may change none.
    """

    module: nn.Module
    call: Callable[[nn.Module, Mapping[str, Any]], Any]
    inputs: tuple[TensorInput | SizeInput, ...]
    sizes: Mapping[str, Dim]
    states: Mapping[str, TensorInput] = field(default_factory=dict)
    opaque: frozenset[str] = frozenset()
    device: str = "cpu"
    variants: tuple[Variant, ...] = ()
    sources: Sources = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    objects: Mapping[str, object] = field(default_factory=dict)
    examples: Mapping[str, object] = field(default_factory=dict)
    may_write: bool = False
    narrowed: Mapping[str, Dim] = field(default_factory=dict)
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    held: tuple[str, ...] | None = None

    @property
    def traced_sizes(self) -> Mapping[str, Dim]:
        """The sizes with the ranges for which it is traced."""
        return {**self.sizes, **self.narrowed}

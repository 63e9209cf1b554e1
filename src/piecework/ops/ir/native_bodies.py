"""Compiled bodies of IR ops that are called where no compiler looks: inside opaque ops, and in eager code.

A collection of bodies belongs to whoever loaded or compiled them, a loaded model or the handle of
`piecework.eager_ops`. It is found through the selection of the running thread or task (ops/ir/selection.py): neither
ops nor this module keep any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor

from piecework.foundation.torch_private import computes_plainly, is_stand_in
from piecework.ops.ir.call_form import CallForm, TensorForm
from piecework.ops.ir.decode import decode
from piecework.ops.ir.operator import SelectableOp
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.ops.ir.selection import CallFacts, Choice, Selection, choose_implementation

NOT_COMPILED: Final = object()
"""What a call gives for which there is no body: it goes through torch's dispatcher."""

Run = Callable[[list[Tensor]], Sequence[Tensor]]
_PLAIN: Final = frozenset({Tensor, torch.nn.Parameter})
_MOST_KINDS: Final = 64
_MOST_SEEN: Final = 4096


@final
class NativeBody:
    """What serves the calls of one form.

    Args:
        form: the calls.
        provider: whose implementation it is.
        run: the compiled body: takes the tensor arguments, gives the results.
        function: instead, the provider's function, which takes all arguments. With neither, such calls are not
            compiled and go through the dispatcher.
    """

    __slots__ = ("_constants", "_function", "_ranges", "_run", "_seen", "_tensors", "form", "provider")

    def __init__(
        self, form: CallForm, *, provider: str, run: Run | None = None, function: Callable[..., Any] | None = None
    ) -> None:
        self.form = form
        self.provider = provider
        self._run = run
        self._function = function
        numbers = {name: number for number, (name, _, _) in enumerate(form.sizes)}
        self._ranges = [(low, high) for _, low, high in form.sizes]
        arguments = list(enumerate(form.arguments))
        self._constants = [(i, decode(a, _no_reference)) for i, a in arguments if not isinstance(a, TensorForm)]
        self._seen: set[tuple[Any, ...]] = set()
        self._tensors = [
            (
                i,
                getattr(torch, a.dtype),
                a.device == "cpu",
                a.device,
                # a dynamic size by its number, as -1, -2 …
                tuple(d if isinstance(d, int) else -1 - numbers[d] for d in a.shape),
                None if all(s is None for s in a.stride) else a.stride,
            )
            for i, a in arguments
            if isinstance(a, TensorForm)
        ]

    @property
    def compiled(self) -> bool:
        """Whether it is a compiled body, and not a provider's function or a note that there is none."""
        return self._run is not None

    def serves(self, values: Sequence[Any]) -> bool:
        """Whether an op's arguments are of the form; one for each of its parameters."""
        return self._inputs(values) is not None

    def call(self, values: Sequence[Any]) -> Any:
        """Run on an op's arguments where they are of the form; None where they are not.

        Args:
            values: an argument for each of the op's parameters.

        Returns the op's results, or NOT_COMPILED.
        """
        inputs = self._inputs(values)
        if inputs is None:
            return None
        if self._run is not None:
            results = self._run(inputs)
            return results[0] if len(results) == 1 else tuple(results)
        return NOT_COMPILED if self._function is None else self._function(*values)

    def _inputs(self, values: Sequence[Any]) -> list[Tensor] | None:
        for position, constant in self._constants:
            value = values[position]
            if value is not constant and (isinstance(value, Tensor) or value != constant):
                return None
        inputs: list[Tensor] = []
        layouts: list[Any] = []
        for position, dtype, on_cpu, device, _, stride in self._tensors:
            value = values[position]
            if type(value) not in _PLAIN or value.dtype is not dtype:
                return None
            if not (value.is_cpu if on_cpu else value.device.type == device):
                return None
            if stride is not None:
                layouts.append(value.stride())
            elif not value.is_contiguous():
                return None
            layouts.append(value.shape)
            inputs.append(value)
        key = tuple(layouts)
        if key in self._seen:  # decode steps repeat themselves
            return inputs
        if not self._fits(inputs):
            return None
        if len(self._seen) >= _MOST_SEEN:
            self._seen = set()
        self._seen.add(key)
        return inputs

    def _fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether tensors of the right dtypes have the sizes and the layouts of the form."""
        sizes = [-1] * len(self._ranges)
        for value, (_, _, _, _, shape, stride) in zip(inputs, self._tensors, strict=True):
            if not _agrees(value.shape, shape, sizes):
                return False
            if stride is not None and not _lies(value.shape, value.stride(), stride):
                return False
        return all(low <= sizes[-1 - number] <= high for number, (low, high) in enumerate(self._ranges))


Missing = Callable[[SelectableOp, Sequence[Any], Choice, ProviderOrder], NativeBody | None]
"""Asked, with a call's op, its arguments, the implementation that they get and the order that says so, for a body that
serves such calls from now on; None where there can't be one."""


@final
class NativeBodies:
    """The bodies of one owner.

    Args:
        order: the order of providers by which the bodies were chosen.
        bodies: those that are there from the start.
        missing: makes bodies on first use, one at a time; None: what has no body runs natively.
        most: how many bodies an op may have; what goes beyond runs uncompiled.
    """

    def __init__(
        self,
        order: ProviderOrder,
        bodies: Sequence[NativeBody] = (),
        *,
        missing: Missing | None = None,
        most: int = 64,
    ) -> None:
        self.order = order
        self._missing = missing
        self._complete = missing is None
        self._most = most
        self._making = threading.Lock()
        self._mutex = threading.Lock()
        self._chosen: Mapping[str, tuple[NativeBody, ...]] = {}  # by `order`, for each op
        self._by_provider: Mapping[tuple[str, str], tuple[NativeBody, ...]] = {}
        self._by_rows = frozenset(rule.op for rule in order.ranges)
        self._fallbacks: dict[str, int] = {}
        for body in bodies:
            self._chosen = _with(self._chosen, body.form.op, body)
            self._by_provider = _with(self._by_provider, (body.form.op, body.provider), body)

    @property
    def bodies(self) -> tuple[NativeBody, ...]:
        """All bodies, as of now."""
        return tuple(body for several in self._by_provider.values() for body in several)

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """How many calls ran uncompiled, by what they were: "silu_mul(float16[*, 64], float16[*, 64])"."""
        with self._mutex:
            return dict(self._fallbacks)

    def clear(self) -> None:
        """Let go of all bodies; no more are made."""
        with self._making:
            self._missing = None
            self._chosen, self._by_provider = {}, {}

    def call(self, op: SelectableOp, args: Sequence[Any], kwargs: Mapping[str, Any], selection: Selection) -> Any:
        """Run a call of an op by the body that serves it; NOT_COMPILED where there is none."""
        if not computes_plainly():
            return NOT_COMPILED
        values = op.bound(args, kwargs)
        if values is None or (torch.is_grad_enabled() and _records(values)):
            return NOT_COMPILED
        ours = selection.order is self.order
        direct = ours and (not self._by_rows or op.short_name not in self._by_rows)
        choice = None if direct else _choice(op, values, selection)
        candidates = (
            self._chosen.get(op.name, ()) if choice is None else self._by_provider.get((op.name, choice.provider), ())
        )
        for body in candidates:
            results = body.call(values)
            if results is not None:
                break
        else:
            if any(isinstance(v, Tensor) and is_stand_in(v) for v in values):
                return NOT_COMPILED
            made = (
                self._make(op, values, choice or _choice(op, values, selection), selection) if self._missing else None
            )
            results = NOT_COMPILED if made is None else made.call(values)
        if results is not NOT_COMPILED:
            return results
        self._count(op, values)
        return op.native(*args, **kwargs) if ours and self._complete else NOT_COMPILED

    def _make(self, op: SelectableOp, values: Sequence[Any], choice: Choice, selection: Selection) -> NativeBody | None:
        key = (op.name, choice.provider)
        with self._making:
            if self._missing is None:
                return None
            found = next((b for b in self._by_provider.get(key, ()) if b.serves(values)), None)
            if found is None:
                if sum(len(bodies) for (name, _), bodies in self._by_provider.items() if name == op.name) >= self._most:
                    return None
                # what is traced meanwhile calls ops as well, and must not ask for bodies
                alone = Selection(selection.order, selection.absent)
                found = alone.running(self._missing, op, values, choice, selection.order)
                if found is None:
                    return None
                self._by_provider = _with(self._by_provider, key, found)
            if selection.order is self.order and found not in self._chosen.get(op.name, ()):
                self._chosen = _with(self._chosen, op.name, found)
            return found

    def _count(self, op: SelectableOp, values: Sequence[Any]) -> None:
        what = f"{op.short_name}({', '.join(map(_kind, values))})"
        with self._mutex:
            if what in self._fallbacks or len(self._fallbacks) < _MOST_KINDS:
                self._fallbacks[what] = self._fallbacks.get(what, 0) + 1


_Key = TypeVar("_Key")


def _with(
    table: Mapping[_Key, tuple[NativeBody, ...]], key: _Key, body: NativeBody
) -> dict[_Key, tuple[NativeBody, ...]]:
    """Return a new table with one more body: who looks one up meanwhile sees all of it or nothing."""
    return {**table, key: (*table.get(key, ()), body)}


def _choice(op: SelectableOp, values: Sequence[Any], selection: Selection) -> Choice:
    return choose_implementation(selection.order, op, values, facts=CallFacts(absent=selection.absent))


def _records(values: Sequence[Any]) -> bool:
    """Whether autograd records a call, where it is on: compiled bodies have no backward pass."""
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _agrees(found: Sequence[int], wanted: Sequence[int], sizes: list[int]) -> bool:
    """Whether a tensor's shape is the one that is wanted; dynamic sizes are -1, -2 …, and become known in `sizes`."""
    if len(found) != len(wanted):
        return False
    for size, number in zip(found, wanted, strict=True):
        if number < 0:
            if sizes[number] < 0:
                sizes[number] = size
            number = sizes[number]
        if size != number:
            return False
    return True


def _lies(shape: Sequence[int], found: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a tensor lies in memory as it should; the strides of axes of one element don't matter."""
    if 0 in shape:
        return True
    packed = 1
    for axis in range(len(shape) - 1, -1, -1):
        stride = wanted[axis]
        stride = packed if stride is None else stride
        if found[axis] != stride and shape[axis] != 1:
            return False
        packed = stride * shape[axis]
    return True


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    sizes = ["*"] * (value.dim() - 1) + [str(size) for size in value.shape[-1:]]
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"


def _no_reference(kind: str, index: int) -> Any:
    raise ValueError(f"a reference {kind} {index} in the form of a call")

"""From the arguments of an eager call to the form that a body is compiled for: which sizes may differ, which stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from piecework.compiler.natives import constant
from piecework.ops.ir.call_form import CallForm, Size, TensorForm
from piecework.ops.ir.operator import SelectableOp


def call_forms(op: SelectableOp, values: Sequence[Any], *, most: int) -> tuple[CallForm, ...] | str:
    """Return the forms to try for a call, the more general one first, or why there is none.

    All sizes of a tensor but the last may differ from call to call, from 0 to `most`, but none of a parameter's
    (nn.Parameter). Sizes of different tensors that are equal in this call are taken for the same one, which calls have
    to confirm. In the second form sizes of 1 stay: tensors are broadcast along them.

    Args:
        op: the op.
        values: an argument for each of its parameters.
        most: the greatest value of a size.
    """
    forms = [_form(op, values, most=most, ones_stay=stay) for stay in (False, True)]
    wrong = next((form for form in forms if isinstance(form, str)), None)
    if wrong is not None:
        return wrong
    return tuple(dict.fromkeys(form for form in forms if isinstance(form, CallForm)))


def _form(op: SelectableOp, values: Sequence[Any], *, most: int, ones_stay: bool) -> CallForm | str:
    sizes = _Sizes(ones_stay)
    arguments: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            strides = _strides(value)
            if strides is None:
                return f"a tensor of {op.short_name} whose rows are not each in one piece"
            shape = sizes.of(value)
            if any(size > most for size in value.shape[:-1]):
                return f"a tensor of {op.short_name} with more than {most} rows"
            arguments.append(TensorForm(shape, strides, str(value.dtype).removeprefix("torch."), value.device.type))
            continue
        made = constant(value)
        if made is None and value is not None:
            return f"an argument of {op.short_name} of type {type(value).__name__}"
        arguments.append(made)
    if not any(isinstance(a, TensorForm) for a in arguments):
        return f"{op.short_name} without tensors"
    return CallForm(op.name, tuple(arguments), tuple((name, 0, most) for name in sizes.names))


class _Sizes:
    """Names the sizes that may differ, over the tensors of one call."""

    def __init__(self, ones_stay: bool) -> None:  # noqa: FBT001  of one caller
        self.names: list[str] = []
        self._ones_stay = ones_stay
        self._known: list[tuple[int, int, str]] = []  # axis, size, name

    def of(self, tensor: torch.Tensor) -> tuple[Size, ...]:
        """Return a tensor's shape as the form has it."""
        shape = tuple(tensor.shape)
        if isinstance(tensor, torch.nn.Parameter) or len(shape) < 2:
            return shape
        known = list(self._known)
        named: list[Size] = []
        for axis, size in enumerate(shape[:-1]):
            if size == 1 and self._ones_stay:
                named.append(1)
                continue
            # the same axis of another tensor before any other axis; 0 and 1 are equal too often to tell
            alike = [k for k in known if k[:2] == (axis, size)] or [k for k in known if k[1] == size > 1]
            if alike:
                name = alike[0][2]
                known = [k for k in known if k[2] != name]
            else:
                name = f"s{len(self.names)}"
                self.names.append(name)
            self._known.append((axis, size, name))
            named.append(name)
        return (*named, shape[-1])


def _strides(tensor: torch.Tensor) -> tuple[int | None, ...] | None:
    """Return how a tensor lies in memory, as forms have it; None where its last axis isn't packed."""
    strides: list[int | None] = []
    packed = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not strides and stride != 1 and size != 1:
            return None
        strides.insert(0, None if stride == packed or not strides else stride)
        packed = size * (packed if strides[0] is None else stride)
    return tuple(strides)

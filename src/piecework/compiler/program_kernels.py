"""What a program would cost if each of its operators were run by itself, as eager torch does: for comparison.

Every operator that computes is a kernel. Views, sizes, and tensors without content are free. A tensor that an operator
takes is read once and whole, but for look-ups, which read no more than they return; of an expanded one the distinct
elements count. An IR op counts as what its native body is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from piecework.errors import PieceworkError
from piecework.foundation.torch_private import expression_text, operator_of, storage_key
from piecework.foundation.traffic import Kernel, Term
from piecework.ops.program import Call, Program
from piecework.ops.resolve import resolve_target
from piecework.ops.selection import ProviderOrder
from piecework.passes.fakes import FakeRun, run_on_fakes
from piecework.passes.lower import Lowering
from piecework.providers.discovery import load_operators

_LOOK_UPS: Final = frozenset(
    ["aten.embedding.default", "aten.index.Tensor", "aten.index_select.default", "aten.gather.default"]
)
_WITHOUT_CONTENT: Final = ("aten.empty", "aten.new_empty")


def native_kernels(program: Program) -> tuple[Kernel, ...] | None:
    """Return the kernels of a program whose IR ops have their native bodies; None where it can't be run on fakes."""
    try:
        return program_kernels(Lowering(ProviderOrder()).lower(program).program)
    except PieceworkError:
        return program_kernels(program)


def program_kernels(program: Program) -> tuple[Kernel, ...] | None:
    """Return the kernels of a program as it stands; None where it can't be run on fakes."""
    load_operators(call.target for call in program.calls)
    try:
        run = run_on_fakes(program)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None
    weights = {storage_key(value) for value in run.values["c"]}
    names = run.sizes.session.symbol_names()
    made = (
        _kernel(call, run, result, weights=weights, names=names)
        for call, result in zip(program.calls, run.values["n"], strict=True)
    )
    return tuple(kernel for kernel in made if kernel is not None)


def _kernel(call: Call, run: FakeRun, result: Any, *, weights: set[int], names: Mapping[str, str]) -> Kernel | None:
    """Return what a call costs, or None where it is free."""
    values = [run.decoded(value) for value in (*call.args, *call.kwargs.values())]
    given = list({_identity(tensor): tensor for tensor in _tensors(values)}.values())
    known = {storage_key(tensor) for tensor in given}
    operator = operator_of(resolve_target(call.target))
    in_place = operator is not None and operator.mutates
    written = [t for t in _tensors(result) if in_place or storage_key(t) not in known]
    if not written or call.target.startswith(_WITHOUT_CONTENT):
        return None
    terms: list[tuple[bool, Term]] = []
    for number, tensor in enumerate(given):
        term = _bytes(tensor, names)
        if call.target in _LOOK_UPS and number == 0:
            term = (*_bytes(written[0], names), *term)
        terms.append((storage_key(tensor) in weights, term))
    return Kernel(
        call.target.removesuffix(".default"),
        weights=tuple(term for is_weight, term in terms if is_weight),
        reads=tuple(term for is_weight, term in terms if not is_weight),
        writes=tuple(_bytes(tensor, names) for tensor in written),
    )


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what views of the same elements have in common."""
    return storage_key(tensor), str(tensor.storage_offset()), str(tensor.shape), str(tensor.stride())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: torch.Tensor, names: Mapping[str, str]) -> Term:
    """Return the bytes of a tensor's distinct elements."""
    count: Any = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if not (isinstance(stride, int) and stride == 0):
            count = count * (size.node.expr if isinstance(size, torch.SymInt) else size)
    try:
        return (expression_text(count, names),)
    except ValueError:
        return ()

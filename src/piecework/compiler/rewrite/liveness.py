"""Which arguments of a call nothing reads afterwards, so that an implementation in place may write to them."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Signature
from typing import Any

import torch

from piecework.compiler.rewrite.fakes import FakeRun
from piecework.foundation.torch_private import storage_key
from piecework.ops.ir.program import Call, Program, references


def dead_arguments(signature: Signature, index: int, program: Program, run: FakeRun) -> frozenset[str]:
    """Return the parameters whose tensors are dead after call number `index`.

    Such a tensor is computed in the piece; no later call and no result of the piece has it or a view of it; no other
    argument shares its memory; and one of the call's results has its shape, strides and dtype.
    """
    call = program.calls[index]
    arguments = signature.bind(*call.args, **call.kwargs).arguments
    tensors = {n: run.decoded(v) for n, v in arguments.items() if isinstance(run.decoded(v), torch.Tensor)}
    later = {storage_key(t) for used in program.calls[index + 1 :] for t in _tensors(used, run)}
    kept = later | {storage_key(run.decoded(o)) for o in program.outputs}
    kept |= {storage_key(t) for kind in ("i", "c") for t in run.values[kind]}
    made = run.values["n"][index]
    results = [_form(t) for t in (made if isinstance(made, (list, tuple)) else (made,))]
    keys = [storage_key(t) for t in tensors.values()]
    return frozenset(
        name
        for name, tensor in tensors.items()
        if storage_key(tensor) not in kept and keys.count(storage_key(tensor)) == 1 and _form(tensor) in results
    )


def _tensors(call: Call, run: FakeRun) -> Iterator[torch.Tensor]:
    for value in (*call.args, *call.kwargs.values()):
        for kind, number in references(value):
            found = run.values[kind][number]
            yield from (t for t in (found if isinstance(found, (list, tuple)) else [found]) if _is_tensor(t))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _form(tensor: Any) -> tuple[Any, ...]:
    return tuple(map(str, tensor.shape)), tuple(map(str, tensor.stride())), tensor.dtype

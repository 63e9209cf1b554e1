"""Whether an operator does what it declares: run once, against its fake implementation and its arguments' copies.

Only what is declared may change, and nothing that is returned may share memory with an argument: compilers reorder,
reuse buffers and leave out calls on that promise, and a broken one shows as wrong numbers far from its cause.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piecework.errors import OpError
from piecework.foundation.torch_private import fake_results, is_stand_in


@dataclass(frozen=True)
class _Argument:
    """A tensor argument as it was before the call."""

    name: str
    tensor: Tensor
    mutable: bool
    copy: Tensor | None
    shape: tuple[torch.Size, tuple[int, ...]]
    version: int | None


def run_checked(
    function: Callable[..., Any],
    *,
    name: str,
    overload: Any,
    signature: inspect.Signature,
    mutates: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run the operator once and return its result, having compared it with what is declared.

    Raises OpError where results differ from the fake implementation's in number, shape, stride, dtype or device, where
    an argument changed that isn't declared, and where arguments or results share memory that they must not share.
    """
    expected = list(_flat(fake_results(overload, args, kwargs)))
    bound = signature.bind(*args, **kwargs)
    before = [a for key, value in bound.arguments.items() for a in _arguments(key, value, mutable=key in mutates)]
    asked = f"run {name} as it is declared"
    _check_overlaps(before, asked=asked)
    with torch.no_grad():
        result = function(*args, **kwargs)
    _check_mutations(before, asked=asked)
    results = list(_flat(result))
    _check_results(results, expected, asked=asked)
    _check_aliases(results, before, asked=asked)
    return result


def _arguments(name: str, value: Any, *, mutable: bool) -> Iterator[_Argument]:
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _arguments(f"{name}[{index}]", item, mutable=mutable)
    elif isinstance(value, Tensor):
        copy = None if mutable or is_stand_in(value) else value.detach().clone()
        # Tensors made in inference mode keep no count of their writes.
        version = None if value.is_inference() else value._version
        yield _Argument(name, value, mutable, copy, (value.shape, value.stride()), version)


def _check_overlaps(arguments: Sequence[_Argument], *, asked: str) -> None:
    for changed in arguments:
        for other in arguments:
            if changed.mutable and other is not changed and _overlap(changed.tensor, other.tensor):
                raise OpError(
                    asked=asked,
                    found=f"argument {changed.name!r}, which it changes, shares memory with argument {other.name!r}",
                    try_="pass a copy of one, or only one of them",
                )


def _check_mutations(arguments: Sequence[_Argument], *, asked: str) -> None:
    changed = [a.tensor for a in arguments if a.mutable]
    for argument in arguments:
        if argument.mutable:
            continue
        tensor = argument.tensor
        how = ""
        if (tensor.shape, tensor.stride()) != argument.shape:
            how = f"its shape was {list(argument.shape[0])} and is {list(tensor.shape)}"
        elif argument.copy is not None and not _same_bits(argument.copy, tensor):
            how = "its values changed"
        elif _was_written(argument) and not any(_same_storage(tensor, other) for other in changed):
            # Views of one tensor count their writes together, so that such an argument tells nothing.
            how = "it was written to, with the values that it had"
        if how:
            raise OpError(
                asked=asked,
                found=f"argument {argument.name!r} is not declared as changed, and {how}",
                try_=f"add {argument.name.partition('[')[0]!r} to `mutates`, or write to a copy",
            )


def _was_written(argument: _Argument) -> bool:
    return argument.version is not None and argument.version != argument.tensor._version


def _check_results(results: Sequence[Any], expected: Sequence[Any], *, asked: str) -> None:
    if len(results) != len(expected):
        raise OpError(
            asked=asked,
            found=f"{len(results)} results, where the fake implementation gives {len(expected)}",
            try_="correct the fake implementation, or the real one",
        )
    for index, (real, fake) in enumerate(zip(results, expected, strict=True)):
        where = "the result" if len(results) == 1 else f"result {index}"
        difference = _difference(real, fake)
        if difference:
            raise OpError(
                asked=asked,
                found=f"{where} has {difference}",
                try_="correct the fake implementation, or the real one",
            )


def _difference(real: Any, fake: Any) -> str:
    """Return how a result differs from what the fake implementation said, or ""."""
    if not isinstance(real, Tensor) or not isinstance(fake, Tensor):
        same = isinstance(real, Tensor) == isinstance(fake, Tensor)
        return "" if same else f"type {type(real).__name__}, the fake implementation's {type(fake).__name__}"
    pairs: list[tuple[str, Any, Any]] = [
        ("shape", list(real.shape), list(fake.shape)),
        ("dtype", real.dtype, fake.dtype),
        ("device", real.device, fake.device),
    ]
    if real.numel():
        strides = [(r, f) for r, f, n in zip(real.stride(), fake.stride(), real.shape, strict=False) if n != 1]
        pairs.append(("stride (of sizes other than 1)", [r for r, _ in strides], [f for _, f in strides]))
    for what, found, declared in pairs:
        if not _agree(found, declared):
            return f"{what} {found}, the fake implementation's {declared}"
    return ""


def _agree(found: Any, declared: Any) -> bool:
    """Whether the two are equal; a size that the fake implementation leaves open agrees with any."""
    if isinstance(found, list):
        return len(found) == len(declared) and all(_agree(f, d) for f, d in zip(found, declared, strict=True))
    if isinstance(declared, torch.SymInt):
        return True
    if isinstance(found, torch.device):
        return found.type == declared.type and (declared.index is None or found.index == declared.index)
    return bool(found == declared)


def _check_aliases(results: Sequence[Any], arguments: Sequence[_Argument], *, asked: str) -> None:
    tensors = [r for r in results if isinstance(r, Tensor)]
    others = [(f"argument {a.name!r}", a.tensor) for a in arguments]
    for index, result in enumerate(tensors):
        for what, other in others:
            if _same_storage(result, other):
                raise OpError(
                    asked=asked,
                    found=f"result {index} shares memory with {what}",
                    try_="return a new tensor (.clone()), or nothing where the argument is changed in place",
                )
        others.append((f"result {index}", result))


def _flat(result: Any) -> Iterator[Any]:
    if isinstance(result, (list, tuple)):
        for item in result:
            yield from _flat(item)
    elif result is not None:
        yield result


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided or a.is_quantized:
        return torch.equal(a, b)
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.detach().contiguous().reshape(-1).view(torch.uint8)
    )


def _same_storage(a: Tensor, b: Tensor) -> bool:
    if is_stand_in(a) or is_stand_in(b) or not a.numel() or not b.numel():
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have an element in common."""
    if not _same_storage(a, b):
        return False
    size = a.untyped_storage().nbytes()
    touched = torch.zeros(size, dtype=torch.bool)
    _bytes(touched, a).fill_(True)
    return bool(_bytes(touched, b).any())


def _bytes(memory: Tensor, tensor: Tensor) -> Tensor:
    """Return the view of `memory` (one element per byte of the storage) that `tensor` covers, an axis for its bytes."""
    width = tensor.element_size()
    strides = [s * width for s in tensor.stride()]
    return memory.as_strided([*tensor.shape, width], [*strides, 1], tensor.storage_offset() * width)

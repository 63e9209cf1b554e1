"""Quantized weights as ops/linear_quantized.py has them, made of what a checkpoint keeps: one function per layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from piecework.bundle.quantized_layouts import Part, Sizes
from piecework.bundle.recipes import Quantized
from piecework.ops.linear_quantized import joined_nibbles

_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_IN_ORDER: Final = tuple(range(8))
_MOST_INT8: Final = 127
_MOST_FP8: Final = 448.0


def quantized_part(source: Quantized, tensors: Sequence[Tensor]) -> Tensor:
    """Return the constant that `source` is, of the tensors of its layout, in their order."""
    made = _MAKERS[source.layout](source.part, source.sizes, tensors)
    return made.contiguous()


def _int8(part: Part, sizes: Sizes, tensors: Sequence[Tensor]) -> Tensor:
    groups = _groups(tensors[0], sizes)
    scales = _not_zero(groups.abs().amax(-1) / _MOST_INT8)
    if part is Part.SCALES:
        return scales
    return (groups / scales.unsqueeze(-1)).round_().clamp_(-_MOST_INT8, _MOST_INT8).flatten(1).to(torch.int8)


def _int4(part: Part, sizes: Sizes, tensors: Sequence[Tensor]) -> Tensor:
    """Round to 16 numbers from -8 to 7; the largest of a group becomes -8, whatever its sign, so that all are used."""
    groups = _groups(tensors[0], sizes)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = _not_zero(largest / -8)
    if part is Part.SCALES:
        return scales
    return joined_nibbles((groups / scales.unsqueeze(-1)).round_().clamp_(-8, 7).flatten(1))


def _fp8(part: Part, sizes: Sizes, tensors: Sequence[Tensor]) -> Tensor:
    groups = _groups(tensors[0], sizes)
    scales = _not_zero(groups.abs().amax(-1) / _MOST_FP8)
    if part is Part.SCALES:
        return scales
    return (groups / scales.unsqueeze(-1)).flatten(1).to(torch.float8_e4m3fn)


def _kept(part: Part, sizes: Sizes, tensors: Sequence[Tensor]) -> Tensor:
    """Return values as they are kept, or scales, of which one may be for several rows."""
    values, scales = tensors
    if part is Part.VALUES:
        return values
    if scales.dim() < 2:
        return scales.to(torch.float32).reshape(1, 1).expand(sizes.rows, sizes.groups)
    return scales.to(torch.float32).repeat_interleave(sizes.group_rows, dim=0)[: sizes.rows]


def _packed8(part: Part, sizes: Sizes, tensors: Sequence[Tensor]) -> Tensor:
    words, scales = tensors
    if part is Part.SCALES:
        return scales.to(torch.float32)
    return (words.contiguous().view(torch.uint8) ^ 0x80).view(torch.int8)


def _packed4(part: Part, sizes: Sizes, tensors: Sequence[Tensor]) -> Tensor:
    words, scales = tensors[0], tensors[1].to(torch.float32)
    if part is Part.VALUES:
        return joined_nibbles(_nibbles(words) - 8)
    if part is Part.SCALES:
        return scales
    zeros = _nibbles(tensors[2].t()).t()
    return (8 - zeros) * scales


def _gptq4(part: Part, sizes: Sizes, tensors: Sequence[Tensor]) -> Tensor:
    words, scales = tensors[0], tensors[1].to(torch.float32)
    if part is Part.VALUES:
        return joined_nibbles(_nibbles(words.t()) - 8)
    return scales.t() if part is Part.SCALES else ((7 - _nibbles(tensors[2])) * scales).t()


def _awq4(part: Part, sizes: Sizes, tensors: Sequence[Tensor]) -> Tensor:
    words, scales = tensors[0], tensors[1].to(torch.float32)
    if part is Part.VALUES:
        return joined_nibbles(_nibbles(words, order=_AWQ_ORDER).t() - 8)
    return scales.t() if part is Part.SCALES else ((8 - _nibbles(tensors[2], order=_AWQ_ORDER)) * scales).t()


def _groups(weight: Tensor, sizes: Sizes) -> Tensor:
    """Return a weight as float32 [out, groups, columns of a group]."""
    groups: Tensor = weight.to(torch.float32).unflatten(1, (sizes.groups, sizes.group))
    return groups


def _not_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


def _nibbles(words: Tensor, *, order: Sequence[int] = _IN_ORDER) -> Tensor:
    """Return the eight numbers from 0 to 15 of each word of a row, of which the one at bit 4 i is number `order[i]`."""
    made = words.new_empty((*words.shape, 8))
    for place, number in enumerate(order):
        made[..., number] = (words >> 4 * place) & 15
    return made.flatten(-2)


_Maker = Callable[[Part, Sizes, Sequence[Tensor]], Tensor]
_MAKERS: Final[Mapping[str, _Maker]] = {
    "int8": _int8,
    "int4": _int4,
    "fp8": _fp8,
    "int8_scaled": _kept,
    "packed8": _packed8,
    "packed4": _packed4,
    "packed4_zeros": _packed4,
    "fp8_scaled": _kept,
    "fp8_tensor": _kept,
    "fp8_scalar": _kept,
    "fp8_blocks": _kept,
    "fp8_block_scaled": _kept,
    "gptq4": _gptq4,
    "gptq4_symmetric": _gptq4,
    "awq4": _awq4,
}

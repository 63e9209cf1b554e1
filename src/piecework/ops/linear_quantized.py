"""`piecework::linear_quantized`: a linear layer whose weight is kept in a byte or half a byte per number.

A weight [out, in] has `values`, small numbers q, and for each row and each group of columns a scale s, and where it is
asymmetric an offset o: an element is q * s + o. The type of the values says what they are:

- int8: [out, in], whole numbers from -128 to 127,
- float8_e4m3fn: [out, in], its numbers,
- int32: [out, in / 8], eight whole numbers from -8 to 7 in a word. Of the eight, in order, the bits begin at
  `NIBBLE_BITS`: the even ones lie in a word's lower half and the odd ones in its upper half, so that code that
  multiplies pairs of 16 bits widens a pair in one step.

Scales and offsets are float32 [out, groups]; a row's columns are divided among its groups evenly. Every published
layout of these widths that is read (bundle/quantized_layouts.py) is this after a change of order.

Sums are in float32, of exact products of x and q: what comes out is what the weight above would give, and not of a
weight that was rounded to x's type once more.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from piecework.ops.packed import unpacked_linear

LINEAR_QUANTIZED_OP: Final = "piecework::linear_quantized"
NIBBLE_BITS: Final = (0, 16, 4, 20, 8, 24, 12, 28)
VALUE_DTYPES: Final = ("int8", "int32", "float8_e4m3fn")
_library = torch.library.Library("piecework", "FRAGMENT")


def joined_nibbles(numbers: Tensor) -> Tensor:
    """Return whole numbers from -8 to 7 [out, in], of any integer type, as words [out, in / 8]."""
    eights = (numbers.to(torch.int32) & 15).unflatten(-1, (-1, 8))
    made = torch.zeros(eights.shape[:-1], dtype=torch.int32, device=numbers.device)
    for place, bits in enumerate(NIBBLE_BITS):
        made |= eights[..., place] << bits
    return made


def value_numbers(values: Tensor) -> Tensor:
    """Return the numbers of `values` as float32 [out, in]."""
    if values.dtype is not torch.int32:
        return values.to(torch.float32)
    bits = torch.tensor(NIBBLE_BITS, dtype=torch.int32, device=values.device)
    eights = (values.unsqueeze(-1) >> bits) & 15
    return ((eights ^ 8) - 8).flatten(-2).to(torch.float32)


def dequantized(values: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Return the weight that they stand for, float32 [out, in]."""
    groups: Tensor = value_numbers(values).unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)
    if offsets is not None:
        groups = groups + offsets.unsqueeze(-1)
    return groups.flatten(1)


def linear_quantized_native(
    x: Tensor, values: Tensor, scales: Tensor, offsets: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return x @ weight.T + bias, computed in float32; x [..., in], bias [out]; result [..., out] in x's dtype."""
    added = None if bias is None else bias.to(torch.float32)
    made = torch.nn.functional.linear(x.to(torch.float32), dequantized(values, scales, offsets), added)
    return made.to(x.dtype)


def linear_quantized_unpacked(
    x: Tensor, values: Tensor, scales: Tensor, offsets: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return the same of values, scales and offsets that are packed (ops/packed.py)."""
    apart = None if offsets is None else unpacked_linear(offsets)
    return linear_quantized_native(x, unpacked_linear(values), unpacked_linear(scales), apart, bias)


def _fake(
    x: Tensor, values: Tensor, scales: Tensor, offsets: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


# The last two come apart when they are traced again; `linear_quantized_cpu` is called by its name in C.
if not hasattr(torch.ops.piecework, "linear_quantized"):
    _arguments = "Tensor x, Tensor values, Tensor scales, Tensor? offsets=None, Tensor? bias=None"
    for _name, _function, _key in (
        ("linear_quantized", linear_quantized_native, "CompositeExplicitAutograd"),
        ("linear_quantized_cpu", linear_quantized_unpacked, "CompositeExplicitAutograd"),
        ("linear_quantized_plain", linear_quantized_native, "CompositeImplicitAutograd"),
        ("linear_quantized_unpacked", linear_quantized_unpacked, "CompositeImplicitAutograd"),
    ):
        _library.define(f"{_name}({_arguments}) -> Tensor")
        _library.impl(_name, _function, _key)
        if _key == "CompositeExplicitAutograd":
            torch.library.register_fake(f"piecework::{_name}", _fake, lib=_library)

"""Layouts in which checkpoints keep quantized linear weights: which tensors, of which shapes and types.

Every one is brought into the form of ops/linear_quantized.py when weights are bound (bundle/run/quantized.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final


class Part(Enum):
    """One of the constants of a quantized weight."""

    VALUES = "values"
    SCALES = "scales"
    OFFSETS = "offsets"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a quantized weight: rows, columns, and the columns and rows that share a scale."""

    rows: int
    columns: int
    group: int
    group_rows: int = 1

    @property
    def groups(self) -> int:
        """How many scales a row has."""
        return -(-self.columns // self.group)


@dataclass(frozen=True)
class Stored:
    """A tensor of a layout: what its name ends in, beside the layer's, its shape, and the types that it may have."""

    suffix: str
    shape: Callable[[Sizes], tuple[int, ...]]
    dtypes: frozenset[str]


@dataclass(frozen=True)
class Layout:
    """How a weight is kept.

    Attributes:
        values: the type of the values that it becomes.
        tensors: what it is kept in.
        has_offsets: whether it is asymmetric.
    """

    values: str
    tensors: tuple[Stored, ...]
    has_offsets: bool = False

    def shape(self, part: Part, sizes: Sizes) -> tuple[int, int]:
        """Return the shape of one of the constants that it becomes."""
        if part is not Part.VALUES:
            return sizes.rows, sizes.groups
        return sizes.rows, sizes.columns // 8 if self.values == "int32" else sizes.columns

    def dtype(self, part: Part) -> str:
        """Return the type of one of the constants that it becomes."""
        return self.values if part is Part.VALUES else "float32"


FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
_FP8: Final = frozenset({"float8_e4m3fn"})
_BYTES: Final = frozenset({"int8"})
_WORDS: Final = frozenset({"int32"})


def _whole(sizes: Sizes) -> tuple[int, ...]:
    return sizes.rows, sizes.columns


def _by_group(sizes: Sizes) -> tuple[int, ...]:
    return sizes.rows, sizes.groups


def _by_block(sizes: Sizes) -> tuple[int, ...]:
    return -(-sizes.rows // sizes.group_rows), sizes.groups


def _groups_first(sizes: Sizes) -> tuple[int, ...]:
    return sizes.groups, sizes.rows


def _words_of(per_word: int) -> Callable[[Sizes], tuple[int, ...]]:
    return lambda sizes: (sizes.rows, sizes.columns // per_word)


_WEIGHT: Final = (Stored("weight", _whole, FLOATS),)
_FP8_WEIGHT: Final = Stored("weight", _whole, _FP8)
_SCALE: Final = Stored("weight_scale", _by_group, FLOATS)
_ZEROS: Final = Stored("qzeros", lambda s: (s.groups, s.rows // 8), _WORDS)
_GPTQ: Final = Stored("qweight", lambda s: (s.columns // 8, s.rows), _WORDS)
_SCALES: Final = Stored("scales", _groups_first, FLOATS)

LAYOUTS: Final[Mapping[str, Layout]] = {
    # of a checkpoint that isn't quantized
    "int8": Layout("int8", _WEIGHT),
    "int4": Layout("int32", _WEIGHT),
    "fp8": Layout("float8_e4m3fn", _WEIGHT),
    # compressed-tensors: int-quantized, pack-quantized, float-quantized
    "int8_scaled": Layout("int8", (Stored("weight", _whole, _BYTES), _SCALE)),
    "packed8": Layout("int8", (Stored("weight_packed", _words_of(4), _WORDS), _SCALE)),
    "packed4": Layout("int32", (Stored("weight_packed", _words_of(8), _WORDS), _SCALE)),
    "packed4_zeros": Layout(
        "int32",
        (
            Stored("weight_packed", _words_of(8), _WORDS),
            _SCALE,
            Stored("weight_zero_point", lambda s: (s.rows // 8, s.groups), _WORDS),
        ),
        has_offsets=True,
    ),
    "fp8_scaled": Layout("float8_e4m3fn", (_FP8_WEIGHT, _SCALE)),
    # one scale for all; compressed-tensors' has one element, that of others no axis
    "fp8_tensor": Layout("float8_e4m3fn", (_FP8_WEIGHT, Stored("weight_scale", lambda _: (1,), FLOATS))),
    "fp8_scalar": Layout("float8_e4m3fn", (_FP8_WEIGHT, Stored("weight_scale", lambda _: (), FLOATS))),
    # blocks of rows and columns, as DeepSeek-V3 and Qwen3 publish them
    "fp8_blocks": Layout("float8_e4m3fn", (_FP8_WEIGHT, Stored("weight_scale_inv", _by_block, FLOATS))),
    # words along columns, zero points less one
    "gptq4": Layout("int32", (_GPTQ, _SCALES, _ZEROS), has_offsets=True),
    "fp8_block_scaled": Layout("float8_e4m3fn", (_FP8_WEIGHT, Stored("weight_scale", _by_block, FLOATS))),
    # all zero points are 8, in whichever way they are written
    "gptq4_symmetric": Layout("int32", (_GPTQ, _SCALES)),
    # words along rows, in an order of their own
    "awq4": Layout(
        "int32", (Stored("qweight", lambda s: (s.columns, s.rows // 8), _WORDS), _SCALES, _ZEROS), has_offsets=True
    ),
}
"""By name, as recipes have it."""

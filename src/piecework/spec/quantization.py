"""Which linear weights are quantized, and how: as a checkpoint's config.json has it, or as was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from piecework.bundle.quantized_layouts import LAYOUTS, Sizes
from piecework.errors import UnsupportedModelError

WEIGHTS_DTYPES: Final = ("auto", "int8", "int4", "fp8")
AS_STORED: Final = "auto"
GROUPS: Final = (0, 32, 64, 128)
_INT4_GROUP: Final = 32
_HEADS: Final = ("lm_head", "embed_out")
_ABSORBED: Final = ("kv_b_proj", "o_proj")
_BLOCK: Final = 32


@dataclass(frozen=True)
class Quantization:
    """How linear weights are quantized.

    Attributes:
        layout: one of LAYOUTS.
        group: columns that share a scale, 0 for all of a row.
        group_rows: rows that share one.
        kept: names of modules that aren't quantized, or of what they are in; after "re:" a regular expression.
        head: the layout of the output projection, one number per row and column; "" where it isn't quantized.
        stored: whether the checkpoint is quantized, so that what can't be read so is an error.
    """

    layout: str
    group: int = 0
    group_rows: int = 1
    kept: tuple[str, ...] = ()
    head: str = ""
    stored: bool = True

    def of(self, name: str, rows: int, columns: int) -> tuple[str, Sizes] | None:
        """Return the layout of a linear layer's weight [rows, columns] and its sizes, None where it isn't quantized."""
        if any(_matches(name, pattern) for pattern in self.kept):
            return None
        is_head = name.rpartition(".")[2] in _HEADS
        if is_head and self.head != self.layout:
            fits = rows % _BLOCK == 0 and columns % _BLOCK == 0
            return (self.head, Sizes(rows, columns, columns)) if self.head and fits else None
        sizes = Sizes(rows, columns, self.group or columns, self.group_rows)
        fits = columns % sizes.group == 0 and (LAYOUTS[self.layout].values != "int32" or columns % 8 == 0)
        if not self.stored:  # only what is read faster for it
            return (self.layout, sizes) if fits and rows % _BLOCK == 0 and columns % _BLOCK == 0 else None
        if not fits:
            raise UnsupportedModelError(
                asked=f"the quantized weight of {name}, of {rows} rows and {columns} columns",
                found=f"groups of {sizes.group} columns, which don't divide them evenly",
                try_="the checkpoint that it was quantized from",
            )
        return self.layout, sizes


def quantization_for(weights_dtype: str, group: int, *, latent: bool) -> Quantization | None:
    """Return what `--weights-dtype` asks of a checkpoint that isn't quantized; an output projection has 8 bits.

    Projections that latent attention absorbs into others keep their type.
    """
    if weights_dtype == AS_STORED:
        return None
    head = "fp8" if weights_dtype == "fp8" else "int8"
    default = _INT4_GROUP if weights_dtype == "int4" else 0
    return Quantization(weights_dtype, group or default, kept=_ABSORBED if latent else (), head=head, stored=False)


def read_quantization(config: Mapping[str, Any], *, asked: str) -> Quantization | None:
    """Return what config.json's quantization_config says, None where there is none.

    Raises UnsupportedModelError that names the field whose value isn't supported.
    """
    if "quantization_config" not in config:
        return None
    fields = _Fields(config["quantization_config"], "quantization_config", asked)
    match fields.one_of("quant_method", ("compressed-tensors", "gptq", "awq", "fp8")):
        case "gptq":
            return _gptq(fields)
        case "awq":
            return _awq(fields)
        case "fp8":
            return _fp8(fields)
    return _compressed_tensors(fields)


class _Fields:
    """Fields of a mapping, whose errors name them."""

    def __init__(self, given: object, where: str, asked: str) -> None:
        self.where, self.asked = where, asked
        if not isinstance(given, Mapping):
            raise self.unsupported("", given, "an object")
        self.given: Mapping[str, Any] = given

    def get(self, name: str, default: Any = None) -> Any:
        return self.given.get(name, default)

    def one_of(self, name: str, values: Sequence[Any], default: Any = None) -> Any:
        """Return a field's value; raises UnsupportedModelError where it is none of `values`."""
        found = self.given.get(name, default)
        if not any(found == value and type(found) is type(value) for value in values):
            raise self.unsupported(name, found, " or ".join(repr(value) for value in values))
        return found

    def group(self, name: str = "group_size") -> int:
        """Return a number of columns, 0 for all of a row."""
        found = self.given.get(name)
        if type(found) is not int or (found < 8 and found != -1):
            raise self.unsupported(name, found, "a number of columns, or -1")
        return max(found, 0)

    def names(self, name: str) -> tuple[str, ...]:
        """Return a list of names, or none."""
        found = self.given.get(name) or []
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise self.unsupported(name, found, "a list of names")
        return tuple(found)

    def inside(self, name: str) -> _Fields:
        return _Fields(self.given.get(name), f"{self.where}.{name}", self.asked)

    def unsupported(self, name: str, found: object, supported: str) -> UnsupportedModelError:
        field = f"{self.where}.{name}" if name else self.where
        return UnsupportedModelError(
            asked=self.asked,
            found=f"{field} {found!r} in config.json, where {supported} is supported"[:400],
            try_="a checkpoint in another layout (docs/quantized-weights.md), or the unquantized one with "
            "--weights-dtype",
        )


def _gptq(fields: _Fields) -> Quantization:
    fields.one_of("bits", (4,))
    fields.one_of("desc_act", (False,), False)
    fields.one_of("lm_head", (False,), False)
    fields.one_of("dynamic", (None, {}))
    symmetric = fields.one_of("sym", (True, False), True)
    if not symmetric:
        fields.one_of("checkpoint_format", ("gptq",), "gptq")  # the newer format writes other zero points
    kept = fields.names("modules_in_block_to_not_quantize") + fields.names("modules_to_not_convert")
    return Quantization("gptq4_symmetric" if symmetric else "gptq4", fields.group(), kept=kept)


def _awq(fields: _Fields) -> Quantization:
    fields.one_of("bits", (4,))
    fields.one_of("zero_point", (True,), True)
    fields.one_of("version", ("gemm", "GEMM"), "gemm")
    return Quantization("awq4", fields.group(), kept=fields.names("modules_to_not_convert"))


def _fp8(fields: _Fields) -> Quantization:
    fields.one_of("fmt", ("e4m3",), "e4m3")
    kept = fields.names("modules_to_not_convert") + fields.names("ignored_layers")
    block = fields.get("weight_block_size")
    if block is None:
        return Quantization("fp8_scalar", kept=kept)
    rows, columns = _block(fields, "weight_block_size")
    return Quantization("fp8_blocks", columns, rows, kept=kept)


def _compressed_tensors(fields: _Fields) -> Quantization:
    groups = fields.inside("config_groups")
    if len(groups.given) != 1:
        raise fields.unsupported("config_groups", list(groups.given), "one group")
    group = groups.inside(next(iter(groups.given)))
    group.one_of("targets", (["Linear"],))
    weights = group.inside("weights")
    weights.one_of("actorder", (None, False))
    symmetric = weights.one_of("symmetric", (True, False), True)
    kind = weights.one_of("type", ("int", "float"))
    bits = weights.one_of("num_bits", (4, 8))
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"))
    formats = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    form = group.get("format") or fields.one_of("format", formats)
    kept = fields.names("ignore")
    size = weights.group() if strategy == "group" else 0
    rows = 1
    match kind, bits, form, strategy, symmetric:
        case "int", 4, "pack-quantized", "channel" | "group", _:
            layout = "packed4" if symmetric else "packed4_zeros"
        case "int", 8, "pack-quantized", "channel" | "group", True:
            layout = "packed8"
        case "int", 8, "int-quantized" | "naive-quantized", "channel" | "group", True:
            layout = "int8_scaled"
        case "float", 8, "float-quantized" | "naive-quantized", "tensor", True:
            layout = "fp8_tensor"
        case "float", 8, "float-quantized" | "naive-quantized", "channel" | "group" | "block", True:
            layout = "fp8_scaled"
        case _:
            found = f"{kind}{bits}, {form}, by {strategy}, {'symmetric' if symmetric else 'asymmetric'}"
            raise weights.unsupported("", found, "W8A16, W8A8, W4A16 or 8-bit floating point")
    if strategy == "block":
        layout = "fp8_block_scaled"
        rows, size = _block(weights, "block_structure")
    return Quantization(layout, size, rows, kept=kept, head=layout)


def _block(fields: _Fields, name: str) -> tuple[int, int]:
    """Return the rows and columns of a block."""
    found = fields.get(name)
    if not (isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)):
        raise fields.unsupported(name, found, "two numbers")
    rows, columns = found
    return rows, columns


def _matches(name: str, pattern: str) -> bool:
    """Whether a module's name is meant: by a regular expression, or by dotted parts that are some of its own."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return f".{pattern}." in f".{name}."

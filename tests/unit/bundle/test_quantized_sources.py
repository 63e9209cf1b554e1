"""Quantized weights in recipes: as JSON, with the tensors that they are made of, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from piecework.bundle.quantized_layouts import LAYOUTS, Part, Sizes
from piecework.bundle.recipes import (
    Quantized,
    Take,
    castable,
    label,
    renamed,
    source_from_json,
    source_to_json,
    stored_takes,
    takes,
)

SIZES = Sizes(rows=64, columns=128, group=32, group_rows=16)


def _source(layout: str, part: Part = Part.VALUES, sizes: Sizes = SIZES) -> Quantized:
    tensors = LAYOUTS[layout].tensors
    return Quantized(layout, part, sizes, tuple(Take(f"a.{t.suffix}", t.shape(sizes)) for t in tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", Part)
def test_a_source_is_the_same_as_json(layout: str, part: Part) -> None:
    source = _source(layout, part)
    assert source_from_json(json.loads(json.dumps(source_to_json(source)))) == source
    other = renamed(source, lambda name: name.replace("a.", "b."))
    assert [take.name for take in takes(other)] == [f"b.{t.suffix}" for t in LAYOUTS[layout].tensors]
    assert [may_be for _, may_be in stored_takes(source, castable("int8"))] == [
        t.dtypes for t in LAYOUTS[layout].tensors
    ]
    assert label(source) == f"a.{LAYOUTS[layout].tensors[0].suffix} ({layout} {part.value})"


def test_shapes_are_those_of_the_parts() -> None:
    assert _source("gptq4").shape == (64, 16)
    assert _source("gptq4", Part.OFFSETS).shape == (64, 4)
    assert _source("fp8_blocks").shape == (64, 128)
    assert [take.shape for take in takes(_source("fp8_blocks"))] == [(64, 128), (4, 4)]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: [data[0], "gptq3", *data[2:]],
        lambda data: [*data[:2], "zeros", *data[3:]],
        lambda data: [*data[:3], [64, 128, 0, 1], *data[4:]],
        lambda data: [*data[:3], [64, 128, 48, 1], *data[4:]],
        lambda data: [*data[:3], [64, 128, 64, 1], *data[4:]],
        lambda data: [*data[:3], [64, 128], *data[4:]],
        lambda data: data[:-1],
    ],
)
def test_what_is_no_such_source_is_refused(change: Any) -> None:
    with pytest.raises(ValueError, match=r"source|layout|part|sizes"):
        source_from_json(change(source_to_json(_source("gptq4"))))

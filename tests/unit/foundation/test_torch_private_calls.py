"""The description of a library's calls, at the end of its file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from piecework.foundation.torch_private import append_calls, called_operators, read_calls
from piecework.foundation.torch_private.artifacts import c10_numbers


def test_a_description_is_read_back_and_the_library_is_before_it(tmp_path: Path) -> None:
    library = tmp_path / "piece.so"
    library.write_bytes(b"\x7fELF" * 100)
    assert read_calls(library) == ""
    nodes = [{"node": {"target": name}} for name in ("a__b::c", "a__b::d", "a__b::c")]
    text = json.dumps({"nodes": nodes, "who": "ü"}, ensure_ascii=False)
    append_calls(library, text)
    assert read_calls(library) == text
    assert library.read_bytes().startswith(b"\x7fELF" * 100)
    assert called_operators(text) == ("a__b::c", "a__b::d")
    assert called_operators("") == ()


def test_files_shorter_than_a_mark_have_none(tmp_path: Path) -> None:
    library = tmp_path / "piece.so"
    library.write_bytes(b"short")
    assert read_calls(library) == ""


def test_numbers_of_dtypes_are_those_that_operators_take() -> None:
    from torch._export.serde.serialize import _TORCH_TO_SERIALIZE_DTYPE as numbers

    for dtype in (torch.int8, torch.int16, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        given = {"name": "dtype", "arg": {"as_scalar_type": int(numbers[dtype])}}
        described = json.dumps({"nodes": [{"node": {"target": "a::b", "inputs": [given]}}]})
        (node,) = json.loads(c10_numbers(described))["nodes"]
        number = node["node"]["inputs"][0]["arg"]["as_scalar_type"]
        assert torch.ops.aten.empty.memory_format([0], dtype=number).dtype is dtype


def test_numbers_of_anything_else_stay() -> None:
    inputs = [{"name": "x", "arg": {"as_tensor": {"name": "b"}}}, {"name": "n", "arg": {"as_int": 2}}]
    described = {"nodes": [{"node": {"target": "a::b", "inputs": inputs}}]}
    assert json.loads(c10_numbers(json.dumps(described))) == described

"""The description of a library's calls, at the end of its file."""

from __future__ import annotations

import json
from pathlib import Path

from piecework.foundation.torch_private import append_calls, called_operators, read_calls


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

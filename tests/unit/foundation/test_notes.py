"""Notes at the end of a file, of any kind and number."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from piecework.foundation.notes import CALLS, KERNELS, append_note, read_note

LIBRARY = b"\x7fELF" * 100
MARKS = {"calls": CALLS, "kernels": KERNELS}


def library(directory: Path, *notes: tuple[str, str], content: bytes = LIBRARY) -> Path:
    path = directory / "piece.so"
    path.write_bytes(content)
    for kind, text in notes:
        append_note(path, text, mark=MARKS[kind])
    return path


def test_each_note_is_found_whichever_came_first(tmp_path: Path) -> None:
    for notes in ((("calls", "ü"), ("kernels", "[]")), (("kernels", "[]"), ("calls", "ü"))):
        path = library(tmp_path, *notes)
        assert read_note(path, mark=CALLS) == "ü"
        assert read_note(path, mark=KERNELS) == "[]"
        assert path.read_bytes().startswith(LIBRARY)


def test_a_file_without_one(tmp_path: Path) -> None:
    for content in (LIBRARY, b"", b"short", CALLS, b"\xff" * 8 + KERNELS):
        assert read_note(library(tmp_path, content=content), mark=KERNELS) == ""
    assert read_note(library(tmp_path, ("calls", "x")), mark=KERNELS) == ""


@given(st.lists(st.tuples(st.sampled_from(["calls", "kernels"]), st.text(max_size=40)), max_size=6), st.binary())
def test_the_last_of_a_kind_counts(tmp_path_factory: object, notes: list[tuple[str, str]], content: bytes) -> None:
    directory = tmp_path_factory.mktemp("notes")  # type: ignore[attr-defined]
    path = library(directory, *notes, content=content + b"\n.")
    for kind, mark in MARKS.items():
        texts = [text for found, text in notes if found == kind]
        assert read_note(path, mark=mark) == (texts[-1] if texts else "")

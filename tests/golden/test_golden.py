"""Pieces, plans and fingerprints are those in the text files; `python -m tests.golden` writes them anew."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
import torch

from tests.golden.models import MODELS
from tests.golden.printing import print_bundle

TORCH = "2.13"
"""The files' version: others trace other operators for the same module."""


@pytest.mark.skipif(not torch.__version__.startswith(f"{TORCH}."), reason=f"the files were written with torch {TORCH}")
@pytest.mark.parametrize("name", MODELS)
def test_pieces_plan_and_fingerprints_are_what_they_were(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    kept = (Path(__file__).parent / f"{name}.txt").read_text()
    found = print_bundle(MODELS[name](tmp_path))
    assert kept.count("piece ") >= 2
    if found != kept:  # pytest's own comparison takes minutes for such texts
        diff = difflib.unified_diff(kept.splitlines(), found.splitlines(), f"{name}.txt", "now", lineterm="", n=2)
        pytest.fail("\n".join([*diff, "", "if it is meant: python -m tests.golden, and look at the diff"]))

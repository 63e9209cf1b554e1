"""docs/errors.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import piecework.errors

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if "::" in line]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:50])
def test_a_row_has_its_test_and_its_error(row: str) -> None:
    (test,) = re.findall(r"`(tests/[^`]+)::(\w+)`", row)
    assert f"def {test[1]}(" in (ROOT / test[0]).read_text()
    for name in re.findall(r"`(\w+(?:Error|Bundle))`", row):
        assert hasattr(piecework.errors, name)


def test_all_errors_that_users_see_are_on_the_page() -> None:
    text = "\n".join(ROWS)
    bases = {"PieceworkError", "InternalError", "EngineError", "BackwardError"}
    missing = [
        name for name in vars(piecework.errors) if name.endswith(("Error", "Bundle")) and f"`{name}`" not in text
    ]
    assert set(missing) <= bases

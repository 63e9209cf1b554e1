"""docs/errors.md names tests that are there, and that look for what the page says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import piecework.errors

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if "::" in line]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:50])
def test_a_row_has_its_test_and_its_error(row: str) -> None:
    (test,) = re.findall(r"`(tests/[^`]+)::(\w+)`", row)
    errors = re.findall(r"`(\w+(?:Error|Bundle))`", row)
    statuses = re.findall(r"\b4\d\d\b", row.split("|")[2])
    assert all(hasattr(piecework.errors, name) for name in errors)
    source = source_of(ROOT / test[0], test[1])
    assert all(what in source for what in errors + statuses)


def source_of(path: Path, name: str) -> str:
    """Return a test's source with its decorators, and that of the file's functions by which it asserts something."""
    text = path.read_text()
    functions = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    test = functions[name]
    helpers = {n.id for n in ast.walk(test) if isinstance(n, ast.Name) and n.id.startswith("assert_")}
    wanted = [test, *(functions[helper] for helper in helpers)]
    nodes = [node for function in wanted for node in (*function.decorator_list, function)]
    return "\n".join(ast.get_source_segment(text, node) or "" for node in nodes)


def test_all_errors_that_users_see_are_on_the_page() -> None:
    text = "\n".join(ROWS)
    bases = {"PieceworkError", "InternalError", "EngineError", "BackwardError"}
    missing = [
        name for name in vars(piecework.errors) if name.endswith(("Error", "Bundle")) and f"`{name}`" not in text
    ]
    assert set(missing) <= bases

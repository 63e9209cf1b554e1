"""What keeps the code as it is meant to be: short functions, few parameters, small folders.

Circles of imports are import-linter's (pyproject.toml).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import piecework

SOURCE = Path(piecework.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
MOST_LINES = 60
MOST_PARAMETERS = 8
MOST_FILES = 20

LONG_SIGNATURES: Mapping[str, str] = {
    "compiler/api.py: compile": "what a user may say of a module, by keyword",
    "models/packed_texts.py: attend_packed": "transformers calls it with these",
    "models/paged_attention.py: paged_attention": "transformers calls it with these",
}
"""Functions of more parameters, and why."""


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield all functions and methods, by "folder/file.py: name"."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(SOURCE)}: {node.name}", node


def test_functions_fit_on_a_screen() -> None:
    long = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES}
    assert long == set()


def test_parameters_that_travel_together_are_a_value() -> None:
    counted = {
        name: len({a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - {"self", "cls"})
        for name, node in functions()
        if "triton.jit" not in map(ast.unparse, node.decorator_list)  # a kernel can't take a value of ours
    }
    assert {name for name, count in counted.items() if count > MOST_PARAMETERS} == set(LONG_SIGNATURES)


def test_folders_are_small() -> None:
    counted = Counter(str(p.parent.relative_to(SOURCE)) for p in MODULES if p.name != "__init__.py")
    assert counted["bundle"] > 5
    assert {folder for folder, count in counted.items() if count > MOST_FILES} == set()


def test_what_is_public_is_listed() -> None:
    assert set(piecework.__all__) <= set(dir(piecework))
    assert {"compile", "load", "LLM", "ModelSpec", "opaque_op", "LayerName"} <= set(piecework.__all__)
    strangers = {name for name in dir(piecework) if not name.startswith("_")} - set(piecework.__all__)
    assert {name for name in strangers if not hasattr(getattr(piecework, name), "__path__")} == set()

"""What keeps the code as it is meant to be: short functions, few parameters, small folders, no circles of imports."""

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

LONG_FUNCTIONS = {
    "capture/capture.py: _capture",
    "compiler/api.py: compile",
    "compiler/artifacts.py: compile_artifacts",
    "compiler/model.py: compile_model",
}
"""Functions of more lines; none is to be added."""
LONG_SIGNATURES: Mapping[str, str] = {
    "compiler/api.py: compile": "what a user may say of a module, by keyword",
    "compiler/artifacts.py: compile_artifacts": "to be a value",
    "compiler/driver.py: compile_request": "to be a value",
    "engine/llm.py: __init__": "what a user may say of a model, by keyword",
    "models/paged_attention.py: paged_attention": "transformers calls it with these",
}
"""Functions of more parameters, and why."""
LARGE_FOLDERS = {"ops", "server"}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield all functions and methods, by "folder/file.py: name"."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(SOURCE)}: {node.name}", node


def test_functions_fit_on_a_screen() -> None:
    long = {name for name, node in functions() if (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES}
    assert long - LONG_FUNCTIONS == set()


def test_parameters_that_travel_together_are_a_value() -> None:
    counted = {
        name: len({a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - {"self", "cls"})
        for name, node in functions()
        if "triton.jit" not in map(ast.unparse, node.decorator_list)  # a kernel can't take a value of ours
    }
    assert {name for name, count in counted.items() if count > MOST_PARAMETERS} - set(LONG_SIGNATURES) == set()


def test_folders_are_small() -> None:
    counted = Counter(str(path.parent.relative_to(SOURCE)) for path in MODULES)
    assert counted["bundle"] > 5
    assert {folder for folder, count in counted.items() if count > MOST_FILES} - LARGE_FOLDERS == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports for type checking included; a package's own `__init__` that names its modules is none."""
    graph = {name: imports(path) for path in MODULES if (name := module_name(path)) and path.name != "__init__.py"}
    assert any(graph.values())
    graph = {name: found & set(graph) for name, found in graph.items()}
    while free := [name for name, found in graph.items() if not found & set(graph)]:
        for name in free:
            del graph[name]
    assert {name: sorted(found & set(graph)) for name, found in graph.items()} == {}


def module_name(path: Path) -> str:
    return ".".join(["piecework", *path.relative_to(SOURCE).with_suffix("").parts])


def imports(path: Path) -> set[str]:
    """Return the modules that a file names at its top, not those that its functions import when they are called."""
    found: set[str] = set()
    pending: list[ast.stmt] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.If):
            pending += [*node.body, *node.orelse]
    return found


def test_what_is_public_is_listed() -> None:
    assert set(piecework.__all__) <= set(dir(piecework))
    assert {"compile", "load", "LLM", "ModelSpec", "opaque_op", "LayerName"} <= set(piecework.__all__)
    strangers = {name for name in dir(piecework) if not name.startswith("_")} - set(piecework.__all__)
    assert {name for name in strangers if not hasattr(getattr(piecework, name), "__path__")} == set()

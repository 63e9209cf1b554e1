"""Where a node comes from: the innermost source line of the model's code while it was traced.

Only what is really traced pays for it, and a stamped block's nodes have the lines of their template's. Layers of ours
that stand for a model's (models/deepseek.py) are its code like any other; functions that it is made to call aren't.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import nn

from piecework.capture.blocks import block_of, mark_block
from piecework.capture.sources import is_users
from piecework.foundation.torch_private import Tracer

_LINE: Final = "piecework_line"
_OURS: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class _Line:
    """A line of a file, and the function that it is in."""

    file: str
    number: int
    function: str


def is_models(module: nn.Module) -> Callable[[str], bool]:
    """Return what says of a file's name whether it holds code of the model `module`.

    That is the user's code, and files of ours that define a class of its parts.
    """
    names = {getattr(sys.modules.get(type(part).__module__), "__file__", None) for part in module.modules()}
    ours = {name for name in names if name is not None and Path(name).is_relative_to(_OURS)}
    return lambda filename: filename in ours or is_users(filename)


def note_lines(tracer: Tracer, *, is_wanted: Callable[[str], bool]) -> None:
    """From now on, note for every call that `tracer` puts into its graph the line that it comes from.

    Args:
        tracer: the trace that is under way.
        is_wanted: says of a file's name whether its lines are wanted. Frames outside of whoever calls this are not
            asked for.
    """
    outermost = sys._getframe(1).f_code
    wanted = _Files(is_wanted)
    create = tracer.tracer.create_node

    def create_node(kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node: torch.fx.Node = create(kind, *args, **kwargs)
        if kind == "call_function":
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code is not outermost:
                if wanted[frame.f_code.co_filename]:
                    code = frame.f_code
                    node.meta[_LINE] = _Line(code.co_filename, frame.f_lineno, code.co_qualname)
                    break
                frame = frame.f_back
        return node

    tracer.tracer.create_node = create_node


class _Files(dict[str, bool]):
    """Whether files are wanted. A look-up is no call, and so costs little while a profiler watches the trace."""

    def __init__(self, is_wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_wanted = is_wanted

    def __missing__(self, filename: str) -> bool:
        self[filename] = self._is_wanted(filename)
        return self[filename]


class KeepLines(torch.fx.Interpreter):
    """Runs a graph whose nodes have lines and blocks noted, under a trace whose nodes get them."""

    def __init__(self, module: torch.fx.GraphModule, *, tracer: Tracer) -> None:
        super().__init__(module)
        self._line: _Line | None = None
        self._block: object = None
        create = tracer.tracer.create_node

        def create_node(kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
            node: torch.fx.Node = create(kind, *args, **kwargs)
            if kind == "call_function" and self._line is not None:
                node.meta[_LINE] = self._line
            if self._block is not None:
                mark_block([node], self._block)
            return node

        tracer.tracer.create_node = create_node

    def run_node(self, n: torch.fx.Node) -> Any:
        """See `torch.fx.Interpreter.run_node`."""
        self._line, self._block = n.meta.get(_LINE), block_of(n)
        return super().run_node(n)


def locations_of(nodes: Iterable[torch.fx.Node]) -> list[str]:
    """Return "package/file.py:12" for each node, "" where no line was noted; no absolute path is in them."""
    lines = [node.meta.get(_LINE) for node in nodes]
    named = _named(lines)
    return ["" if line is None else f"{named[line.file]}:{line.number}" for line in lines]


def source_of(nodes: Iterable[torch.fx.Node]) -> str:
    """Return the lines of some nodes as one text, such as "package/file.py:63-67 in Norm.forward"; "" for none.

    Lines of one function are one range; of several functions each has its own, with commas between them: "a.py:3 in f,
    :9-12 in g, b.py:7 in h".
    """
    lines = [line for node in nodes if (line := node.meta.get(_LINE)) is not None]
    named = _named(lines)
    files = list(dict.fromkeys(named[line.file] for line in lines))
    numbers: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        numbers.setdefault((named[line.file], line.function), []).append(line.number)
    texts: list[str] = []
    before = ""
    for (file, function), found in sorted(numbers.items(), key=lambda item: files.index(item[0][0])):
        span = f"{min(found)}-{max(found)}" if max(found) > min(found) else f"{min(found)}"
        texts.append(f"{'' if file == before else file}:{span} in {function}")
        before = file
    return ", ".join(texts)


def _named(lines: Sequence[_Line | None]) -> dict[str, str]:
    return {file: relative_path(Path(file)) for file in {line.file for line in lines if line is not None}}


def relative_path(path: Path) -> str:
    """Return a file's path below the directory from which Python imports it, else its last two parts."""
    packages = list(itertools.takewhile(lambda parent: (parent / "__init__.py").is_file(), path.parents))
    roots = [packages[-1].parent] if packages else [Path(entry) for entry in sys.path if entry]
    under = [path.relative_to(root) for root in roots if len(root.parts) > 1 and path.is_relative_to(root)]
    return min(under, key=lambda place: len(place.parts), default=Path(*path.parts[-2:])).as_posix()

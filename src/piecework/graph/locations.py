"""Where a node comes from: the innermost source line of the user's code while it was traced.

Only what is really traced pays for it, and a stamped block's nodes have the lines of their template's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch

from piecework.foundation.torch_private import Tracer

_LINE: Final = "piecework_line"


def note_lines(tracer: Tracer, *, is_users: Callable[[str], bool]) -> None:
    """From now on, note for every call that `tracer` puts into its graph the line that it comes from.

    Args:
        tracer: the trace that is under way.
        is_users: says of a file's name whether it is the user's code. Frames outside of whoever calls this are not
            asked for.
    """
    outermost = sys._getframe(1).f_code
    wanted = _Files(is_users)
    create = tracer.tracer.create_node

    def create_node(kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node: torch.fx.Node = create(kind, *args, **kwargs)
        if kind == "call_function":
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code is not outermost:
                if wanted[frame.f_code.co_filename]:
                    node.meta[_LINE] = frame.f_code.co_filename, frame.f_lineno
                    break
                frame = frame.f_back
        return node

    tracer.tracer.create_node = create_node


class _Files(dict[str, bool]):
    """Whether files are the user's. A look-up is no call, and so costs little while a profiler watches the trace."""

    def __init__(self, is_users: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_users = is_users

    def __missing__(self, filename: str) -> bool:
        self[filename] = self._is_users(filename)
        return self[filename]


class KeepLines(torch.fx.Interpreter):
    """Runs a graph whose nodes have their lines noted, under a trace that gives them to the nodes that it makes."""

    def __init__(self, module: torch.fx.GraphModule, *, tracer: Tracer) -> None:
        super().__init__(module)
        self._line: tuple[str, int] | None = None
        create = tracer.tracer.create_node

        def create_node(kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
            node: torch.fx.Node = create(kind, *args, **kwargs)
            if kind == "call_function" and self._line is not None:
                node.meta[_LINE] = self._line
            return node

        tracer.tracer.create_node = create_node

    def run_node(self, n: torch.fx.Node) -> Any:
        """See `torch.fx.Interpreter.run_node`."""
        self._line = n.meta.get(_LINE)
        return super().run_node(n)


def locations_of(nodes: Iterable[torch.fx.Node]) -> list[str]:
    """Return "package/file.py:12" for each node, "" where no line was noted; no absolute path is in them."""
    lines = [node.meta.get(_LINE) for node in nodes]
    files = {line[0] for line in lines if line is not None}
    named = {file: relative_path(Path(file)) for file in files}
    return ["" if line is None else f"{named[line[0]]}:{line[1]}" for line in lines]


def relative_path(path: Path) -> str:
    """Return a file's path below the directory from which Python imports it, else its last two parts."""
    packages = list(itertools.takewhile(lambda parent: (parent / "__init__.py").is_file(), path.parents))
    roots = [packages[-1].parent] if packages else [Path(entry) for entry in sys.path if entry]
    under = [path.relative_to(root) for root in roots if len(root.parts) > 1 and path.is_relative_to(root)]
    return min(under, key=lambda place: len(place.parts), default=Path(*path.parts[-2:])).as_posix()

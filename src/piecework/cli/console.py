"""The only place that prints. Results go to stdout, as text or JSON; progress, remarks and tables go to stderr.

On a terminal, progress is one line that changes; elsewhere each stage is a line of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, final

from piecework.engine.options import parse_size
from piecework.errors import PieceworkError


def out(text: str = "", *, end: str = "\n") -> None:
    """Write a result to stdout at once; `end=""` for text that streams."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def out_json(value: object) -> None:
    """Write a result to stdout as one line of JSON. Raises TypeError for what isn't JSON."""
    out(json.dumps(value, default=_as_plain))


def status(text: str) -> None:
    """Write a remark to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> None:
    """Write a table to stderr; columns whose cells all look like numbers stand to the right.

    Args:
        rows: the cells; every row has as many as the first.
        header: the columns' names, or none.
    """
    status(format_table(rows, header=header))


def format_table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> str:
    """Return the text of a table, without a newline at its end."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    is_numeric = [all(cell[:1].isdigit() or cell[:1] in "-–" for cell in column) for column in zip(*rows, strict=True)]
    # with two columns the second is a list of values, which reads better from the left
    right = is_numeric if len(widths) > 2 else [False] * len(widths)
    text = []
    for line in lines:
        cells = zip(line, widths, right or [False] * len(widths), strict=True)
        text.append("  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in cells).rstrip())
    if header:
        text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def size_argument(text: str) -> int:
    """Read an option's number of bytes, such as "8MiB"."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def show_error(error: PieceworkError, *, as_json: bool) -> None:
    """Write an error's three lines to stderr and, for machines, the same as JSON to stdout."""
    if as_json:
        out_json(error.to_json())
    status(f"piecework: {type(error).__name__}\n{error}")


class Progress(ABC):
    """Shows people what is going on while it does."""

    @abstractmethod
    def update(self, text: str, *, done: int | None = None, total: int | None = None) -> None:
        """Show what is being done now, and how many of how many steps are over."""


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Show progress on stderr (or `stream`) until the block is left."""
    target = stream or sys.stderr
    if not target.isatty():
        yield _LineProgress(target)
        return
    # costs 60 ms, which only a terminal needs to pay
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415
    from rich.progress import Progress as RichProgress  # noqa: PLC0415

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(file=target), transient=True) as display:
        task = display.add_task("", total=None)

        def show(text: str, done: int | None, total: int | None) -> None:
            display.update(task, description=text, completed=done or 0, total=total)

        yield _TerminalProgress(show)


@final
class _LineProgress(Progress):
    """One line per stage, and none that repeats the one before."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def update(self, text: str, *, done: int | None = None, total: int | None = None) -> None:
        line = f"[{done or 0}/{total}] {text}" if total else text
        if line != self._last:
            self._last = line
            self._stream.write(line + "\n")
            self._stream.flush()


@final
class _TerminalProgress(Progress):
    """One line that changes."""

    def __init__(self, show: Callable[[str, int | None, int | None], None]) -> None:
        self._show = show

    def update(self, text: str, *, done: int | None = None, total: int | None = None) -> None:
        self._show(text, done, total)


def _as_plain(value: object) -> object:
    """Return JSON for what json doesn't know: paths and mappings and tuples that aren't dicts and lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} can't be written as JSON")

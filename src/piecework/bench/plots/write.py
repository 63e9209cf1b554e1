"""Write a figure to a file whose ending says how: .html or .png."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from piecework.bench.plots.figure import Figure
from piecework.bench.plots.page import page
from piecework.errors import PieceworkError, RequestError

Writer = Callable[[Figure, Path], None]
ENDINGS: Final = (".html", ".png")


def writer_for(path: Path) -> Writer:
    """Return what writes a figure to a path, so that it is known before anything is measured whether that can be.

    Raises RequestError for another ending, PieceworkError where a PNG needs a package that isn't there.
    """
    ending = path.suffix.lower()
    if ending == ".html":
        return _write_page
    if ending != ".png":
        raise RequestError(asked=f"a plot as {path.name}", found=f"the ending {ending!r}", try_=" or ".join(ENDINGS))
    try:
        from piecework.bench.plots.png import write_png  # noqa: PLC0415  needs an extra
    except ModuleNotFoundError as error:
        raise PieceworkError(
            asked=f"a plot as {path.name}",
            found=f"no package {error.name}",
            try_="pip install 'piecework[plot]', or a plot that ends in .html",
        ) from error
    return write_png


def _write_page(figure: Figure, path: Path) -> None:
    path.write_text(page(figure), encoding="utf-8")

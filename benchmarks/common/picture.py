"""Draw the README's picture from the committed figures: layers → pieces → bundle → hosts, and bars of starts.

python -m benchmarks.common.picture     # writes docs/picture.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent.parent
WIDTH: Final = 920
INK, GREY, PALE = "#1f2933", "#6b7785", "#e4e8ee"
OURS, THEIRS = "#2563a8", "#a9b4c2"
PIECES: Final = ("#f0a04b", "#4b8bd0", "#58a87c")
NAMES: Final = {"piecework": "piecework", "vllm": "vLLM", "torch_compile": "torch.compile"}


@dataclass(frozen=True)
class Bars:
    """A group of bars: its title, and a label and seconds for each system."""

    title: str
    rows: tuple[tuple[str, float], ...]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=ROOT / "benchmarks" / "startup.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "picture.svg")
    args = parser.parse_args()
    args.out.write_text(draw(json.loads(args.figures.read_text())))


def draw(figures: Mapping[str, Any]) -> str:
    """Return the picture as SVG; `figures` is what `python -m benchmarks.startup` wrote."""
    layers = max(row["layers"] for row in figures["rows"])
    numbers = _values(figures["rows"], layers=layers)
    unique, pieces = (int(numbers["piecework", metric]) for metric in ("unique_pieces", "pieces"))
    groups = (
        Bars("warm: start of the process to the first token", _bars(numbers, "first_token_s")),
        Bars("cold: compile with empty caches", _bars(numbers, "cold_s")),
    )
    drawn = [*_flow(layers=layers, pieces=pieces, unique=unique), *_groups(groups, top=222)]
    height = 222 + 30 * sum(len(g.rows) for g in groups) + 34 * len(groups) + 24
    machine, settings = figures["machine"], figures["settings"]
    torch, vllm = figures["versions"]["torch"].partition("+")[0], figures["versions"]["vllm"]
    caption = (
        f"{layers} layers, Llama with random weights, hidden {settings['hidden']}, bfloat16, "
        f"on {machine['cores']} cores ({machine['cpu']}); torch {torch}, vLLM {vllm}"
    )
    drawn.append(_text(20, height - 10, caption, size=12, fill=GREY))
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="white"/>\n{body}\n</svg>\n'
    )


def _values(rows: Sequence[Mapping[str, Any]], *, layers: int) -> dict[tuple[str, str], float]:
    wanted = [row for row in rows if row["layers"] == layers and row.get("dtype", "bfloat16") == "bfloat16"]
    return {(row["system"], row["metric"]): float(row["value"]) for row in wanted}


def _bars(numbers: Mapping[tuple[str, str], float], metric: str) -> tuple[tuple[str, float], ...]:
    return tuple((NAMES[s], numbers[s, metric]) for s in NAMES if (s, metric) in numbers)


def _flow(*, layers: int, pieces: int, unique: int) -> list[str]:
    """Draw layers, the pieces that they are cut into, the bundle, and where it starts."""
    out = [_text(x, 34, title, size=15, weight=600) for x, title in _TITLES]
    for number in range(10):  # a stack: the first, those alike, the last
        colour = PIECES[0] if number == 0 else PIECES[2] if number == 9 else PIECES[1]
        out.append(_box(20, 54 + 12 * number, 120, 9, colour))
    out.append(_text(20, 196, f"{layers} layers, {pieces} pieces", size=13, fill=GREY))
    for number, colour in enumerate(PIECES[:unique]):
        out.append(_box(266, 60 + 38 * number, 120, 26, colour))
    out.append(_text(266, 196, f"{unique} compiled, each once", size=13, fill=GREY))
    out.append(f'<rect x="512" y="58" width="120" height="106" rx="6" fill="none" stroke="{INK}" stroke-width="1.5"/>')
    out += [_text(526, 84 + 20 * n, line, size=13) for n, line in enumerate(("plan", "libraries", "recipes", "facts"))]
    out.append(_text(512, 196, "no weights, no pickle", size=13, fill=GREY))
    for number, host in enumerate(("next start", "next process", "next machine")):
        out.append(f'<rect x="758" y="{60 + 38 * number}" width="120" height="26" rx="4" fill="{PALE}"/>')
        out.append(_text(772, 78 + 38 * number, host, size=13))
    out.append(_text(758, 196, "no compiler imported", size=13, fill=GREY))
    return out + [_arrow(x) for x in (160, 406, 652)]


_TITLES: Final = ((20, "model"), (266, "unique pieces"), (512, "bundle"), (758, "every start after"))


def _groups(groups: Sequence[Bars], *, top: int) -> list[str]:
    longest = max(seconds for group in groups for _, seconds in group.rows)
    out: list[str] = []
    y = top
    for group in groups:
        y += 30
        out.append(_text(20, y, group.title, size=14, weight=600))
        y += 10
        for label, seconds in group.rows:
            width = max(3.0, 620 * seconds / longest)
            out.append(_text(130, y + 17, label, size=13, anchor="end"))
            out.append(_box(140, y + 3, width, 19, OURS if label == NAMES["piecework"] else THEIRS))
            out.append(_text(148 + width, y + 17, f"{seconds:.1f} s", size=13))
            y += 27
    return out


def _text(
    x: float, y: float, text: str, *, size: int, fill: str = INK, weight: int = 400, anchor: str = "start"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>'


def _arrow(x: float) -> str:
    head = f"M{x + 78} 106 l12 6 l-12 6 z"
    return f'<path d="M{x} 112 h80" stroke="{GREY}" stroke-width="2"/><path d="{head}" fill="{GREY}"/>'


if __name__ == "__main__":
    main()

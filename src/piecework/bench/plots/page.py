"""A figure as an HTML page: one file that loads nothing from elsewhere and has no script."""

from __future__ import annotations

from html import escape
from typing import Final

from piecework.bench.plots.figure import COLORS, BarPanel, Figure, LinePanel, Panel
from piecework.bench.plots.svg import draw

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1d2530; --quiet: #667085; --line: #e3e7ee; --back: #fff; --panel: #f8f9fb; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ef; --quiet: #98a2b3; --line: #333b47; --back: #14181e; --panel: #1b2027; }
}
body { margin: 32px auto; padding: 0 24px; max-width: 1040px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; }
h2 { font-size: 15px; margin: 0 0 8px; }
p { margin: 0; }
.quiet, figcaption { color: var(--quiet); font-size: 13px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 16px;
  margin: 24px 0; }
figure { margin: 0; padding: 16px; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
figcaption { margin-top: 6px; }
.legend span { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 10px; }
svg { display: block; width: 100%; height: auto; fill: var(--text); font-size: 12.5px; }
.value { font-weight: 600; }
.tick, .axis { fill: var(--quiet); font-size: 11.5px; }
.grid { stroke: var(--line); fill: none; }
.spread { stroke: var(--text); stroke-width: 1.5; fill: none; }
"""


def page(figure: Figure) -> str:
    """Return the page's text."""
    panels = "".join(f"<figure>{_panel(panel)}</figure>" for panel in figure.panels)
    remarks = "".join(f"<p>{escape(remark)}</p>" for remark in figure.remarks)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(figure.title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(figure.title)}</h1><p class="quiet">{escape(figure.subtitle)}</p>'
        f'<div class="panels">{panels}</div><div class="quiet">{remarks}</div></body></html>\n'
    )


def _panel(panel: Panel) -> str:
    return f"<h2>{escape(panel.title)}</h2>{draw(panel)}{_caption(panel)}"


def _caption(panel: Panel) -> str:
    if isinstance(panel, BarPanel):
        return f"<figcaption>{escape(panel.note)}</figcaption>" if panel.note else ""
    return _legend(panel) if len(panel.lines) > 1 else ""


def _legend(panel: LinePanel) -> str:
    entries = "".join(
        f'<span style="background:{COLORS[line.color % len(COLORS)]}"></span>{escape(line.label)}'
        for line in panel.lines
    )
    return f'<figcaption class="legend">{entries}</figcaption>'

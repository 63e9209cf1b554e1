"""The dashboard asks for figures that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx

DASHBOARD = Path(__file__).resolve().parents[3] / "deploy" / "grafana.json"


def test_every_figure_of_the_dashboard_is_there(url: str) -> None:
    asked = {name for panel in json.loads(DASHBOARD.read_text())["panels"] for name in _names(panel)}
    httpx.post(f"{url}/v1/completions", json={"model": "fake", "prompt": "x", "max_tokens": 2})
    text = httpx.get(f"{url}/metrics").text
    assert len(asked) > 12
    assert {name for name in asked if f"\n{name}{{" not in text} == set()


def _names(panel: dict[str, list[dict[str, str]]]) -> list[str]:
    return [name for target in panel["targets"] for name in re.findall(r"piecework_\w+", target["expr"])]

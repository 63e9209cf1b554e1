"""Pictures: what they show, that pages need nothing else, and what is told where they can't be drawn."""

from __future__ import annotations

import builtins
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piecework.bench.goals import check_throughput_goals
from piecework.bench.measurements import Key, Measured, Row
from piecework.bench.plots.figure import BarPanel, Figure, Line, LinePanel, cumulative, number, ticks
from piecework.bench.plots.page import page
from piecework.bench.plots.serving import rate_over_time, serving_figure
from piecework.bench.plots.svg import draw
from piecework.bench.plots.throughput import throughput_figure
from piecework.bench.plots.write import writer_for
from piecework.bench.serving.figures import Outcome, figures_of
from piecework.errors import PieceworkError, RequestError

ABOUT = {"machine": {"cpu": "A <fast> one", "cores": 2}, "versions": {"torch": "0"}, "commit": "abc"}
SETTINGS = {"model": "m & n", "dtype": "float32", "requests": 4, "input": 8, "output": 2, "repeats": 3}
OUTCOMES = [
    Outcome(0.0, 1.0, (0.2, 0.6, 1.0), input_tokens=5, output_tokens=3),
    Outcome(0.5, 1.5, (0.5, 1.5), input_tokens=5, output_tokens=4),
    Outcome(0.5, 0.1, error="no"),
]


def row(system: str, metric: str, value: float) -> Row:
    return Row(Key(system, 2, metric, "float32"), value, n=3, min=0.9 * value, max=1.2 * value)


@pytest.fixture
def throughput() -> Figure:
    rows = tuple(
        row(system, metric, value)
        for system, value in (("piecework", 200.0), ("vllm", 100.0))
        for metric in ("cold_s", "output_tok_s", "one_request_tok_s", "first_token_s")
        if (system, metric) != ("vllm", "cold_s")
    )
    measured = Measured(rows, ("something was odd",), frozenset())
    return throughput_figure(measured, check_throughput_goals(rows), settings=SETTINGS, about=ABOUT)


@pytest.fixture
def serving() -> Figure:
    return serving_figure(figures_of(OUTCOMES), OUTCOMES, subtitle="m", about=ABOUT)


def elements(svg: str, tag: str) -> list[ET.Element]:
    return ET.fromstring(svg).findall(f".//{tag}")


def test_bars_are_as_long_as_their_values(throughput: Figure) -> None:
    panel = throughput.panels[0]
    assert isinstance(panel, BarPanel)
    assert panel.note == "output_tok_s ÷ vllm's = 2 (≥ 1: met; aim 1.2: met)"
    svg = draw(panel)
    ours, theirs = (float(bar.attrib["width"]) for bar in elements(svg, "rect"))
    assert ours == pytest.approx(2 * theirs, rel=0.01)
    assert len({bar.attrib["fill"] for bar in elements(svg, "rect")}) == 2
    assert [text.text for text in elements(svg, "text")] == ["piecework", "200 tokens/s", "vllm", "100 tokens/s"]


def test_lines_stay_inside_their_axes(serving: Figure) -> None:
    for panel in serving.panels:
        assert isinstance(panel, LinePanel)
        svg = draw(panel)
        _, _, width, height = map(float, ET.fromstring(svg).attrib["viewBox"].split())
        (line,) = [path for path in elements(svg, "path") if path.attrib.get("stroke")]
        points = [tuple(map(float, point.split())) for point in line.attrib["d"][1:].split("L")]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_what_a_throughput_figure_tells(throughput: Figure) -> None:
    assert [panel.title.partition(",")[0] for panel in throughput.panels] == [
        "Generated tokens",
        "Generated tokens",
        "Process start to first token",
    ]
    assert throughput.subtitle == "m & n, float32: 4 requests of 8 + 2 tokens, offline; rounds: 3"
    assert throughput.remarks == ("something was odd", "cpu A <fast> one, cores 2", "torch 0, commit abc")


def test_what_a_serving_figure_tells(serving: Figure) -> None:
    assert serving.subtitle.startswith("m: 2 requests and 1 that failed; 3.5 generated tokens/s")
    ttft = serving.panels[0]
    assert isinstance(ttft, LinePanel)
    assert ttft.lines[0].points == ((200.0, 0.0), (200.0, 50.0), (500.0, 50.0), (500.0, 100.0))


def test_tokens_over_time_are_all_tokens() -> None:
    points = rate_over_time(OUTCOMES[:2])
    width = points[1][0] - points[0][0]
    assert sum(rate * width for _, rate in points) == pytest.approx(7)
    assert rate_over_time([]) == ()


@pytest.mark.parametrize("name", ["throughput", "serving"])
def test_a_page_is_one_file_that_loads_nothing(name: str, request: pytest.FixtureRequest) -> None:
    figure: Figure = request.getfixturevalue(name)
    text = page(figure)
    assert not re.search(r"<script|https?:|url\(|@import|src=", text)
    root = ET.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", text))  # well-formed
    assert len(root.findall(".//svg")) == len(figure.panels)
    told = "".join(root.itertext())
    for said in (figure.title, figure.subtitle, *figure.remarks, *(panel.title for panel in figure.panels)):
        assert said in told


def test_several_lines_have_a_legend() -> None:
    panel = LinePanel("t", "x", "y", (Line("one", ((0, 0), (1, 1))), Line("t<wo", ((0, 1), (1, 2)), color=1)))
    text = page(Figure("f", "", (panel,)))
    assert 'class="legend"' in text
    assert "t&lt;wo" in text


@pytest.mark.parametrize("figure", [Figure("f", "", ()), Figure("f", "", (LinePanel("t", "x", "y", (Line("", ()),)),))])
def test_nothing_to_show(figure: Figure, tmp_path: Path) -> None:
    assert "<h1>f</h1>" in page(figure)
    run_without_outcomes = serving_figure(figures_of(OUTCOMES[2:]), OUTCOMES[2:], subtitle="m", about=ABOUT)
    assert page(run_without_outcomes).count("<svg") == 4


@given(st.floats(1e-6, 1e9))
def test_ticks_are_few_and_reach_the_greatest(greatest: float) -> None:
    found = ticks(greatest)
    assert 2 <= len(found) <= 7
    assert found[0] == 0
    assert found[-1] >= greatest * (1 - 1e-6)
    assert found[-2] < greatest


@pytest.mark.parametrize("greatest", [0.0, -1.0, float("nan"), float("inf")])
def test_ticks_of_nothing(greatest: float) -> None:
    assert ticks(greatest) == [0.0, 1.0]


def test_ticks_are_round() -> None:
    assert ticks(100.0) == [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    assert ticks(1900.0) == [0.0, 500.0, 1000.0, 1500.0, 2000.0]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (12.345, "12.3"), (196.44, "196.4"), (12345.6, "12,346")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=1000))
def test_shares_go_up_to_all_of_them(values: list[float]) -> None:
    points = cumulative(values)
    assert len(points) <= 2 * 401
    assert list(points) == sorted(points)
    assert points[0] == (min(values), 0.0)
    assert points[-1] == (max(values), 100.0)
    for x, share in points:
        assert share <= 100 * sum(value <= x for value in values) / len(values) + 1e-9


def test_writing_a_page(throughput: Figure, tmp_path: Path) -> None:
    writer_for(tmp_path / "a.HTML")(throughput, tmp_path / "a.HTML")
    assert (tmp_path / "a.HTML").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["throughput", "serving"])
def test_writing_a_png(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    writer_for(path)(request.getfixturevalue(name), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert width > 1000
    assert height > 600


def test_another_ending(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="html or"):
        writer_for(tmp_path / "a.pdf")


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "piecework.bench.plots.png":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PieceworkError, match=r"piecework\[plot\]"):
        writer_for(tmp_path / "a.png")

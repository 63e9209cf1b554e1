"""What inspect says of passes: how often, where, and why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle import Bundle
from piecework.cli.main import main
from piecework.errors import CorruptBundle
from piecework.report.inspect import describe
from tests.unit.report.layered import compiled, model
from tests.unit.report.test_explain import HERE, line_of, without_explanation


def report(name: str, *, matches: tuple[str, ...] = (), near: tuple[str, ...] = (), ops: tuple[int, int]) -> Any:
    return {"name": name, "matches": matches, "near_misses": near, "ops_before": ops[0], "ops_after": ops[1]}


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    return compiled(model(layers=3), tmp_path / "plain")


@pytest.fixture
def bundle(plain: Bundle, tmp_path: Path) -> Bundle:
    """A bundle of the pieces A, B and C whose passes are made up; call 1 of B and C is the first sum."""
    passes = [
        [report("norms", ops=(3, 3)), report("sums", ops=(3, 3))],
        [
            report("norms", near=("norms: no norm for calls 1-2, 4: eps is a tensor",), ops=(9, 9)),
            report("sums", matches=("sums: calls 0-1 are one", "sums: call 5, s0 wide"), ops=(9, 7)),
        ],
        [
            report("norms", near=("norms: no norm for calls 1-2, 4: eps is a tensor",), ops=(9, 9)),
            report("sums", matches=("sums: call 5, s0 wide",), ops=(9, 8)),
        ],
    ]
    explanation = {**(plain.explanation() or {}), "passes": passes}
    return without_explanation(plain, tmp_path / "b", explanation=explanation)


def test_counts(bundle: Bundle) -> None:
    lines = describe(bundle, verified=False).to_text().splitlines()
    start = lines.index("passes")
    assert lines[start + 1 : start + 4] == [
        "  norms  0 matches, 2 near misses",
        "  sums   3 matches, 21 → 18 operators",
        "  (--passes shows each place, and why a pass nearly applied and didn't)",
    ]


def test_every_place(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle.path), "--passes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("passes")
    mix, mlp = line_of("self.out(torch.ops"), line_of("return x + self.down(self.act(self.up(x)))")
    assert lines[start + 1 : start + 9] == [
        "  norms  0 matches, 2 near misses",
        "    - B C: no norm for calls 1-2, 4: eps is a tensor",
        f"        at {HERE}:{mix}-{mlp}",
        "  sums   3 matches, 21 → 18 operators",
        "    + B: calls 0-1 are one",
        f"        at {HERE}:{mix}",
        "    + B C: call 5, rows wide",
        f"        at {HERE}:{mlp}",
    ]


def test_json_has_everything(bundle: Bundle) -> None:
    value = json.loads(json.dumps(describe(bundle, verified=False).to_json()))
    norms, sums = value["passes"]
    assert (norms["name"], norms["num_near_misses"], len(norms["near_misses"])) == ("norms", 2, 1)
    assert norms["near_misses"][0]["pieces"] == ["B", "C"]
    assert (sums["num_matches"], sums["ops_before"], sums["ops_after"]) == (3, 21, 18)


def test_bundles_that_do_not_say(plain: Bundle, tmp_path: Path) -> None:
    old = without_explanation(plain, tmp_path / "old")
    assert describe(old, verified=False).passes == ()
    assert "passes" not in describe(old, verified=False).to_text().splitlines()


@pytest.mark.parametrize("passes", [[[{"name": "x"}]], [3], 7, [[report("x", ops=("a", 1))]]])  # type: ignore[arg-type]
def test_what_is_no_report(passes: Any, plain: Bundle, tmp_path: Path) -> None:
    wrong = without_explanation(plain, tmp_path / "w", explanation={**(plain.explanation() or {}), "passes": passes})
    with pytest.raises(CorruptBundle, match="does not say what passes did"):
        describe(wrong, verified=False)


def test_calls_that_a_piece_does_not_have(plain: Bundle, tmp_path: Path) -> None:
    passes = [[report("x", matches=("x: calls 2-99", "x: calls - 4"), ops=(3, 3))]]
    odd = without_explanation(plain, tmp_path / "o", explanation={**(plain.explanation() or {}), "passes": passes})
    assert describe(odd, verified=False).passes[0].num_matches == 2

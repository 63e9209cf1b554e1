from pathlib import Path

import pytest

from benchmarks.common import run as run_module
from benchmarks.common.launch import CellError
from benchmarks.common.run import Bound, Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(run_module, "share_of_others", lambda before, after: 0.0)
    return Run(tmp_path)


def test_a_row_per_key_with_median_and_spread(run: Run) -> None:
    run.add(3.0, system="piecework", metric="cold_s", layers=4, batch=None)
    run.add(7.0, 8.123456, system="eager", metric="step_ms", batch=32, note="first")
    run.add(1.0, 0.123456789, system="piecework", metric="cold_s", layers=4)
    run.add(9.0, system="eager", metric="step_ms", batch=32, note="last")
    assert run.rows() == [
        {"system": "piecework", "layers": 4, "metric": "cold_s", "value": 1, "unit": "s", "n": 3, "min": 0.12346,
         "max": 3},
        {"system": "eager", "batch": 32, "metric": "step_ms", "value": 8.123, "unit": "ms", "n": 3, "min": 7, "max": 9,
         "note": "last"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "unit"),
    [("cold_s", "s"), ("load_ms", "ms"), ("rss_mb", "MiB"), ("call_us", "us"), ("output_tok_s", "tokens/s"),
     ("output_throughput", "tokens/s"), ("unique_pieces", "")],
)  # fmt: skip
def test_the_unit_is_in_the_name(run: Run, metric: str, unit: str) -> None:
    run.add(5.0, system="a", metric=metric)
    assert run.rows()[0]["unit"] == unit


def test_figures_are_found_by_their_keys(run: Run) -> None:
    run.add(1.0, system="a", metric="m", layers=1)
    run.add(2.0, 4.0, system="b", metric="m", layers=1)
    (key,) = run.find(system="b", layers=1)
    assert run.value(key) == 3.0
    assert run.value({**key, "system": "a", "batch": None}) == 1.0
    assert run.value({**key, "layers": 2}) is None


def test_a_ratio_to_another_system_and_to_another_depth(run: Run) -> None:
    for system, layers, value in (("piecework", 4, 10.0), ("piecework", 80, 12.0), ("vllm", 80, 60.0)):
        run.add(value, system=system, metric="cold_s", layers=layers)
    (key,) = run.find(system="piecework", layers=80)
    run.compare(key, 1.15, layers=4)
    run.compare(key, 0.3, system="vllm")
    run.compare(key, 0.3, system="torch_compile")  # which was not measured
    run.compare(key, 0.3, layers=80)  # itself
    assert [str(goal) for goal in run.goals] == [
        "cold_s ÷ that at 4 layers = 1.2 (≤ 1.15: MISSED)",
        "cold_s ÷ vllm's = 0.2 (≤ 0.3: met)",
    ]
    assert [goal.met for goal in run.goals] == [False, True]


def test_a_goal_with_an_aim(run: Run) -> None:
    run.hold({"system": "a", "metric": "m"}, "m", 1.123456, 1.0, Bound.AT_LEAST, aim=1.2)
    (goal,) = run.goals
    assert str(goal) == "m = 1.12 (≥ 1: met; aim 1.2: missed)"
    assert goal.to_json() == {
        "goal": "m", "system": "a", "metric": "m", "value": 1.1235, "bound": "at_least", "limit": 1.0, "met": True,
        "aim": 1.2, "aim_met": False,
    }  # fmt: skip


def test_what_fails_is_noted_and_not_tried_again_with_the_same_case(run: Run) -> None:
    tried: list[str] = []

    def fail() -> None:
        tried.append("a")
        raise CellError(asked="x", found="broken", try_="y")

    for case in ("one", "one", "two"):
        run.attempt("cold", "a", fail, case=case)
    run.attempt("cold", "b", lambda: tried.append("b"), case="one")
    assert tried == ["a", "a", "b"]
    assert run.notes == ["cold: a, one failed: broken", "cold: a, two failed: broken"]
    assert run.failed == {"a"}


def test_a_busy_machine_is_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "share_of_others", lambda before, after: 0.25)
    run.attempt("cold", "a", lambda: None)
    assert run.notes == ["cold: a: other processes took 25% of the machine meanwhile, so don't trust it"]

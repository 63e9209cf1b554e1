"""The sizes at which plans are looked at: in range, equal where they must be, and none that belongs to no batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from piecework.bundle.plan import OpStep, Plan, PlanVariant
from piecework.bundle.run.sample_sizes import Point, sample_sizes

PLAN = Plan({"tokens": (1, 64), "seqs": (0, 8)}, "tokens", (), (), (), (), (), (), 0, (), {})


def points(*equal: tuple[str, str | int], bounds: tuple[int, int] = (1, 64), size: str = "") -> list[Point]:
    steps = (OpStep("a::b", ({"list": [{"size": size}]},), {}, ()),) if size else ()
    return sample_sizes(PLAN, PlanVariant("", equal, steps, 0, ()), bounds=bounds, seed="seed")


def test_the_ends_and_some_in_between() -> None:
    found = points()
    assert found[:2] == [{"tokens": 1, "seqs": 0}, {"tokens": 64, "seqs": 8}]
    assert len(found) == 4
    assert all(1 <= p["tokens"] <= 64 and 0 <= p["seqs"] <= 8 for p in found)
    assert found == points(), "the same bundle is always looked at in the same places"


def test_a_part_of_the_range_and_what_is_equal() -> None:
    assert {p["tokens"] for p in points(bounds=(3, 3))} == {3}
    assert all(p["tokens"] == p["seqs"] >= 1 for p in points(("tokens", "seqs")))
    assert {p["seqs"] for p in points(("seqs", 5))} == {5}
    assert points(("seqs", 9)) == [], "there are no such batches"


def test_what_is_computed_is_not_below_0() -> None:
    assert all(p["tokens"] >= p["seqs"] for p in points(size="tokens - seqs"))
    assert len(points(size="0 - tokens")) == 4, "a number that is never a size"
    with pytest.raises(ValueError, match="below 0 nearly everywhere"):
        points(size="1 - tokens")


def test_no_sizes_at_all() -> None:
    assert sample_sizes(
        replace(PLAN, sizes={}, primary=""), PlanVariant("", (), (), 0, ()), bounds=(0, 0), seed=""
    ) == [{}]

"""The sizes at which plans are looked at: in range, equal where they must be, and none that belongs to no batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from piecework.bundle.plan import OpStep, Plan, PlanVariant
from piecework.bundle.run.sample_sizes import Point, sample_sizes
from piecework.bundle.where import Where

PLAN = Plan({"tokens": (1, 64), "seqs": (0, 8)}, "tokens", (), (), (), (), (), (), 0, (), {})


def points(
    where: Where | None = None, *, sooner: Sequence[Where] = (), bounds: tuple[int, int] = (1, 64), size: str = ""
) -> list[Point]:
    steps = (OpStep("a::b", ({"list": [{"size": size}]},), {}, ()),) if size else ()
    plan = replace(PLAN, variants=tuple(PlanVariant(str(n), each, (), 0, ()) for n, each in enumerate(sooner)))
    return sample_sizes(plan, PlanVariant("", where or Where(), steps, 0, ()), bounds=bounds, seed="seed")


def test_the_ends_and_some_in_between() -> None:
    found = points()
    assert found[:2] == [{"tokens": 1, "seqs": 0}, {"tokens": 64, "seqs": 8}]
    assert len(found) == 4
    assert all(1 <= p["tokens"] <= 64 and 0 <= p["seqs"] <= 8 for p in found)
    assert found == points(), "the same bundle is always looked at in the same places"


def test_a_part_of_the_range_and_what_is_equal() -> None:
    assert {p["tokens"] for p in points(bounds=(3, 3))} == {3}
    assert all(p["tokens"] == p["seqs"] >= 1 for p in points(Where((("tokens", "seqs"),))))
    assert {p["seqs"] for p in points(seqs(5, 5))} == {5}
    assert points(seqs(9, 9)) == [], "there are no such batches"


def seqs(low: int, high: int) -> Where:
    return Where(within=(("seqs", low, high),))


def test_what_comes_to_another_forward_is_left_out() -> None:
    assert {p["seqs"] for p in points(sooner=[seqs(0, 5), seqs(7, 8)])} == {6}
    assert [p["seqs"] for p in points(sooner=[seqs(3, 5)])][:2] == [0, 8]
    assert all(p["seqs"] not in {3, 4, 5} for p in points(sooner=[seqs(3, 5)]))
    assert points(sooner=[seqs(0, 8)]) == []


def test_what_comes_to_another_forward_under_one_more_condition() -> None:
    both = seqs(0, 5).also("tokens", 1, 9)
    assert {p["seqs"] for p in points(sooner=[both])} >= {0, 8}, "some of these batches come to the rest"
    assert all(p["tokens"] > 9 for p in points(seqs(0, 4), sooner=[both]))
    assert points(sooner=[replace(seqs(0, 8), equal=(("tokens", "seqs"),))]), "where they are not equal"


def test_what_is_computed_is_not_below_0() -> None:
    assert all(p["tokens"] >= p["seqs"] for p in points(size="tokens - seqs"))
    assert len(points(size="0 - tokens")) == 4, "a number that is never a size"
    with pytest.raises(ValueError, match="below 0 nearly everywhere"):
        points(size="1 - tokens")


def test_no_sizes_at_all() -> None:
    assert sample_sizes(
        replace(PLAN, sizes={}, primary=""), PlanVariant("", Where(), (), 0, ()), bounds=(0, 0), seed=""
    ) == [{}]

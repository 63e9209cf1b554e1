"""Single flight: one makes, the others wait; the dead are replaced, the hanging reported and overtaken."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from piecework.foundation.flight import Flight, Take, leading
from piecework.foundation.leases import Holder, Lease, take
from piecework.foundation.watch import watched

MAKE = """
import sys, time
from pathlib import Path
from piecework.foundation.flight import Flight
from piecework.foundation.leases import take
root, names = Path(sys.argv[1]), sys.argv[2:]
with Flight(lambda key, over=None: take(root / f"{key}.lock", over=over), overtake_s=60) as flight:
    for led in flight.rounds(names, is_made=lambda key: (root / key).exists()):
        for key in led:
            with (root / "log").open("a") as log:
                log.write(key + "\\n")
            time.sleep(0.02)
            (root / key).touch()
            flight.landed(key)
"""


def taking(root: Path) -> Take:
    def taker(key: str, *, over: Holder | None = None) -> Lease | Holder:
        return take(root / f"{key}.lock", over=over)

    return taker


@pytest.fixture
def flight(tmp_path: Path) -> Iterator[Callable[..., Flight]]:
    """Return a function that makes flights of the test's directory."""
    made: list[Flight] = []

    def make(*, overtake_s: float = 60.0, report_s: float = 60.0) -> Flight:
        made.append(Flight(taking(tmp_path), overtake_s=overtake_s, report_s=report_s))
        return made[-1]

    yield make
    for each in made:
        each.end()


def test_each_is_made_once_whatever_the_order_in_which_it_is_asked_for(tmp_path: Path) -> None:
    names = [f"key{n}" for n in range(12)]
    orders = [names, names[::-1], names[6:] + names[:6], names[::2] + names[1::2]]
    processes = [subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path), *order]) for order in orders]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert sorted((tmp_path / "log").read_text().split()) == sorted(names)
    assert list(tmp_path.glob("*.lock")) == []


def test_what_is_held_by_another_comes_last_and_the_rest_at_once(tmp_path: Path, flight: Callable[..., Flight]) -> None:
    made = {"there"}
    other = flight()
    assert next(other.rounds(["b"], is_made=made.__contains__)) == ["b"]
    threading.Timer(0.2, lambda: (made.add("b"), other.landed("b"))).start()
    rounds = []
    for led in flight().rounds(["there", "a", "b", "c"], is_made=made.__contains__):
        rounds.append(led)
        made.update(led)
    assert rounds == [["a", "c"]]


def test_what_one_cannot_make_another_may_try(flight: Callable[..., Flight]) -> None:
    assert list(flight().rounds(["a"], is_made=lambda _: False)) == [["a"]]
    assert list(flight().rounds(["a"], is_made=lambda _: False)) == [["a"]]


def test_who_hangs_is_reported_and_then_overtaken(
    flight: Callable[..., Flight], caplog: pytest.LogCaptureFixture
) -> None:
    never = partial(next, flight().rounds(["a", "b"], is_made=lambda _: False))
    assert never() == ["a", "b"]
    with caplog.at_level(logging.WARNING, logger="piecework"):
        waiting = flight(report_s=0.1, overtake_s=0.7)
        assert next(waiting.rounds(["a", "b"], is_made=lambda _: False)) == ["a", "b"]
    texts = [record.getMessage() for record in caplog.records]
    reports = [text for text in texts if text.startswith("waiting for process")]
    assert len(reports) >= 2
    assert "PIECEWORK_OVERTAKE_S" in reports[0]
    assert [text for text in texts if text.startswith("doing here what process")] != []


def test_who_makes_progress_is_not_overtaken(flight: Callable[..., Flight]) -> None:
    names = [f"k{n}" for n in range(6)]
    made = set[str]()
    leader = flight()
    assert next(leader.rounds(names, is_made=made.__contains__)) == names

    def work() -> None:
        for name in names:
            time.sleep(0.4)
            made.add(name)
            leader.landed(name)

    thread = threading.Thread(target=work)
    thread.start()
    assert list(flight(overtake_s=2.0).rounds(names, is_made=made.__contains__)) == []
    thread.join()


def test_waiting_ends_when_it_is_told_to(flight: Callable[..., Flight]) -> None:
    leader, waiting = flight(), flight()
    assert next(leader.rounds(["a"], is_made=lambda _: False)) == ["a"]
    threading.Timer(0.1, waiting.end).start()
    assert list(waiting.rounds(["a"], is_made=lambda _: False)) == []


def test_one_leads_and_the_others_are_told(tmp_path: Path) -> None:
    made: list[int] = []
    told: list[bool] = []

    def work() -> None:
        with leading("k", taking(tmp_path), is_made=lambda: bool(made), overtake_s=60) as leads:
            told.append(leads)
            if leads:
                time.sleep(0.05)
                made.append(1)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [False] * 4 + [True]
    assert list(tmp_path.glob("*.lock")) == []


def test_no_progress_is_reported_at_growing_intervals(caplog: pytest.LogCaptureFixture) -> None:
    with watched(lambda: "something", report_s=0.1) as progress:
        time.sleep(0.06)
        progress()
        time.sleep(0.06)
        assert caplog.records == []
        time.sleep(0.5)
    assert len(caplog.records) >= 2
    assert "something" in caplog.records[0].getMessage()

"""What is seen of code that could look at a string behind its back, and what is known to be harmless."""

from __future__ import annotations

import decimal
import math
import operator
import re
import sys
from collections.abc import Callable

import pytest
import torch

from piecework.capture.sources import profiling
from piecework.capture.watching import Watch

WORD = "layers.2"
LINES = {"layers.2": 1}
TEXT = "layers.2 layers.3"


def seen(function: Callable[[], object]) -> Watch:
    watch = Watch(previous=None, outermost=sys._getframe())
    with profiling(watch.see):
        watch.arm()
        function()
    return watch


@pytest.mark.parametrize(
    "function",
    [
        lambda: WORD in TEXT,
        lambda: WORD in "layers.2",
        lambda: [w for w in [WORD] if w in TEXT],
        lambda: TEXT.startswith(WORD),
        lambda: TEXT.find(WORD),
        lambda: TEXT.split(WORD),
        lambda: ".".join([WORD]),
        lambda: re.search("2", WORD),
        lambda: operator.contains(TEXT, WORD),
        lambda: eval("1"),
        lambda: ord(WORD[0]),
        lambda: int(WORD[-1], 16),
        lambda: int(WORD[-1], base=16),
        lambda: bytes(WORD, "utf8"),
        lambda: decimal.Decimal("1"),
        lambda: torch.device("cpu"),
    ],
)
def test_what_could_look(function: Callable[[], object]) -> None:
    assert seen(function).looks


@pytest.mark.parametrize(
    "function",
    [
        lambda: "layers" in LINES,
        lambda: WORD in ("a", "b"),
        lambda: WORD in {"a", "b"},
        lambda: "a" in re.__dict__,
        lambda: LINES.get(WORD),
        lambda: len([WORD]),
        lambda: isinstance(WORD, str),
        lambda: torch.relu(torch.ones(2)).view(1, 2).sum(),
        lambda: torch.nn.Linear(2, 2)(torch.ones(1, 2)),
        lambda: torch.nn.functional.layer_norm(torch.ones(2, 2), (2,)),
        lambda: max([1, 2]),
        lambda: "abc".upper(),
        lambda: int(math.sqrt(len([1, 2, 3]) + 1)),
        lambda: int(1.5) + len(WORD) * int(2.5),
        lambda: torch.ones(2).device,
        lambda: torch.ones(2).type(torch.float32),
    ],
)
def test_what_is_harmless(function: Callable[[], object]) -> None:
    watch = seen(function)
    assert not watch.looks
    assert not watch.exact_types


def test_asking_for_an_exact_type() -> None:
    assert seen(lambda: type(WORD) is str).exact_types


def test_nothing_is_seen_before_a_token_is_about() -> None:
    watch = Watch(previous=None, outermost=sys._getframe())
    with profiling(watch.see):
        TEXT.startswith(WORD)
    assert not watch.looks


def test_frames_that_are_running_already_are_seen() -> None:
    def outer(watch: Watch) -> bool:
        watch.arm()
        return WORD in TEXT

    watch = Watch(previous=None, outermost=sys._getframe())
    with profiling(watch.see):
        outer(watch)
    assert watch.looks == ["an `in` of outer"]


def test_the_profile_function_that_was_there_goes_on_seeing_calls() -> None:
    events: list[str] = []

    def before(frame: object, event: str, argument: object) -> None:
        events.append(event)

    def inner() -> None:
        len(WORD)

    with profiling(before):
        watch = Watch(previous=sys.getprofile(), outermost=sys._getframe())
        with profiling(watch.see):
            inner()
        assert sys.getprofile() is before
    assert "call" in events
    assert "c_call" in events


def test_a_profiler_written_in_c_hides_what_happens() -> None:
    watch = Watch(previous=object(), outermost=sys._getframe())
    watch.arm()
    assert watch.looks

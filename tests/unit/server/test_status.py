"""The server's state over time, and the log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import sys

import pytest

from piecework.engine.events import Phase
from piecework.errors import RequestError
from piecework.server.log import EventLog, LoggingBridge
from piecework.server.settings import Limits, ServerSettings
from piecework.server.status import BundleUse, ServerStatus, State
from tests.unit.server.fake import FakeService

EAGER = BundleUse(hit=False, backend="eager", report=dict)
NATIVE = BundleUse(hit=False, backend="aoti", report=dict)


def test_a_warm_start():
    status = ServerStatus()
    assert status.state is State.STARTING
    status.serves(FakeService(), bundle=NATIVE)
    assert status.state is State.READY
    status.drains()
    assert status.state is State.DRAINING


def test_a_cold_start_with_another_backend_meanwhile():
    status = ServerStatus()
    status.compile_begins(reason="r", backend="eager")
    status.serves(FakeService(), bundle=EAGER)
    assert (status.state, status.serving) == (State.COMPILING, "eager")
    status.compile_begins(reason="r", backend="aoti")
    status.compile_ends()
    assert status.state is State.READY
    status.serves(FakeService(), bundle=NATIVE)
    assert (status.state, status.serving) == (State.READY, "aoti")


def test_a_cold_start_that_waits():
    status = ServerStatus()
    status.compile_begins(reason="r", backend="aoti")
    status.compile_goes_on("compiling", done=1, total=2)
    assert (status.state, status.compiling.done) == (State.COMPILING, 1)
    status.compile_ends()
    assert status.state is State.STARTING  # it is being loaded
    status.compile_goes_on("late")
    assert status.compiling is None


def test_a_drain_is_not_undone():
    status = ServerStatus()
    status.drains()
    status.compile_begins(reason="r", backend="aoti")
    status.serves(FakeService(), bundle=NATIVE)
    status.compile_ends()
    assert status.state is State.DRAINING


def test_an_engine_that_ended_is_a_failure():
    status, service = ServerStatus(), FakeService()
    status.serves(service, bundle=NATIVE)
    service.failed = "broken"
    assert (status.state, status.failure) == (State.FAILED, "broken")


def test_phases_come_in_order_and_the_last_of_a_name_counts():
    times = iter(range(100))
    status = ServerStatus(clock=lambda: float(next(times)))
    with contextlib.suppress(ZeroDivisionError), status.phase("a"):
        assert status.phases == (Phase("a", 0.0),)
        raise ZeroDivisionError
    assert status.phases == (Phase("a", 0.0, 1.0),)
    status.note_phase(Phase("b", 5.0, 6.0))
    status.note_phase(Phase("a", 7.0, 8.0))
    assert status.phases == (Phase("b", 5.0, 6.0), Phase("a", 7.0, 8.0))


def test_the_first_token_counts_once():
    times = iter([1.0, 2.0, 3.0])
    status = ServerStatus(clock=lambda: next(times))
    status.first_token()
    status.first_token()
    assert status.first_token_s == 1.0


def test_a_line_for_people():
    stream = io.StringIO()
    EventLog(stream, clock=lambda: 0.0).event("said", a=1, b="two words", c=None, d=0.12345, e="x\ny", f="")
    assert stream.getvalue() == '1970-01-01T00:00:00.000Z said a=1 b="two words" d=0.123 e="x\\ny" f=""\n'


def test_a_line_for_machines():
    stream = io.StringIO()
    EventLog(stream, as_json=True, clock=lambda: 0.0).event("said", a=1, b="x\ny")
    assert json.loads(stream.getvalue()) == {"time": "1970-01-01T00:00:00.000Z", "event": "said", "a": 1, "b": "x\ny"}
    assert stream.getvalue().count("\n") == 1


def test_what_a_library_logs_becomes_an_event():
    stream = io.StringIO()
    bridge = LoggingBridge(EventLog(stream), name="http")
    logger = logging.Logger("test")
    logger.addHandler(bridge)
    logger.info("nothing to see")
    logger.warning("look: %s", "here")
    for error in (ValueError("wrong"), asyncio.CancelledError()):
        try:
            raise error
        except BaseException:
            logger.error("failed", exc_info=sys.exc_info())
    first, second = stream.getvalue().splitlines()
    assert first.endswith('http level=warning message="look: here"')
    assert "ValueError: wrong" in second  # and nothing of what was cancelled


def test_settings_are_checked():
    with pytest.raises(RequestError, match="body_bytes 0"):
        Limits(body_bytes=0)
    assert Limits(drain_s=0, logprobs=0).drain_s == 0
    with pytest.raises(RequestError, match="without a name"):
        ServerSettings(model_names=())

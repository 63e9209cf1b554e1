import json
from collections.abc import Iterator

import pytest

from piecework.bundle.record import Record, Recorder
from piecework.errors import InternalError


def clock() -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += 1.5


def test_recorder_collects() -> None:
    ticks = clock()
    recorder = Recorder(clock=lambda: next(ticks))
    with recorder.phase("capture"):
        pass
    with pytest.raises(KeyError), recorder.phase("capture"):
        raise KeyError
    recorder.add_seconds("compile", seconds=2.0)
    recorder.count("pieces", by=3)
    recorder.count("pieces")
    recorder.note("a remark")
    assert recorder.finish() == Record(
        phases={"capture": 3.0, "compile": 2.0}, counts={"pieces": 4}, notes=("a remark",)
    )


def test_a_finished_record_changes_no_more() -> None:
    recorder = Recorder()
    before = recorder.finish()
    recorder.count("pieces")
    assert before == Record()


def test_add_puts_another_record_below() -> None:
    recorder = Recorder()
    recorder.add(Record(phases={"lower": 1.0}, counts={"files": 2}, notes=("n",)), prefix="compile/")
    recorder.add(Record(phases={"lower": 1.0}), prefix="compile/")
    assert recorder.finish() == Record(phases={"compile/lower": 2.0}, counts={"compile/files": 2}, notes=("n",))
    with pytest.raises(InternalError):
        recorder.add(Record(), prefix="compile")


def test_json_reads_back() -> None:
    record = Record(phases={"b": 1.0, "a": 0.123456}, counts={"n": 1}, notes=("x", "y"))
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record
    assert list(again.phases) == ["b", "a"]
    assert Record.from_json({}) == Record()


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"other": 1},
        {"phases": []},
        {"phases": {"a": "1"}},
        {"phases": {"a": True}},
        {"counts": {"a": 1.5}},
        {"counts": {"a": True}},
        {"counts": []},
        {"notes": "text"},
        {"notes": [1]},
    ],
)
def test_from_json_refuses(value: object) -> None:
    with pytest.raises(ValueError, match="record"):
        Record.from_json(value)

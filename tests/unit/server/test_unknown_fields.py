"""What a server does with fields that it doesn't know, and with constraints that it can't keep."""

from __future__ import annotations

import io
from typing import Any

import httpx
import pytest

from piecework.errors import MissingPackageError
from piecework.server.log import EventLog
from piecework.server.settings import ServerSettings
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import live_server

GOOD = {"model": "fake", "prompt": "x", "max_tokens": 1}


def post(url: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={**GOOD, **more})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("guided_json", {"type": "object"}, "structured_outputs"),
        ("guided_choice", ["a"], "structured_outputs"),
        ("grammar", "root ::= a", "structured_outputs"),
        ("max_new_tokens", 5, "max_tokens"),
        ("use_beam_search", True, "not supported"),
        ("bad_words", ["a"], "logit_bias"),
        ("temprature", 0.5, "is temperature meant"),
        ("top-p", 0.5, "is top_p meant"),
        ("Stop", "a", "is stop meant"),
        ("structured_output", {"regex": "a"}, "is structured_outputs meant"),
    ],
)
def test_what_would_change_the_answer_is_refused(url: str, field: str, value: Any, said: str) -> None:
    answer = post(url, **{field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "constraint",
    [
        {"structured_outputs": {"structural_tag": "{}"}},
        {"structured_outputs": {"json": {}, "whitespace_pattern": "x"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"choice": []}},
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schemas": {}}}},
        {"response_format": {"type": "structural_tag"}},
    ],
)
def test_a_constraint_that_is_not_known_is_refused(url: str, constraint: dict[str, Any]) -> None:
    assert post(url, **constraint).status_code == 400


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"choice": ["a", "b"]}, ("choice", '["a", "b"]')),
        ({"grammar": "start: x"}, ("grammar", "start: x")),
        ({"json": '{"type":"null"}'}, ("json_schema", '{"type": "null"}')),
        ({"json_object": True}, ("json_object", "")),
    ],
)
def test_every_kind_of_constraint_arrives(
    url: str, service: FakeService, asked: dict[str, Any], key: tuple[str, str]
) -> None:
    assert post(url, structured_outputs=asked).status_code == 200
    structured = service.seen[-1].params.structured
    assert structured is not None
    assert structured.key == key


def test_other_fields_are_named_in_the_header_and_once_in_the_log() -> None:
    written = io.StringIO()
    settings = ServerSettings(model_names=("fake",))
    with live_server(ready(FakeService()), settings, log=EventLog(written)) as url:
        for stream in (False, True):
            answer = post(url, colour="blue", store=True, stream=stream, **{"a\r\nb: c": 1})
            assert answer.status_code == 200
            assert answer.headers["x-piecework-ignored"] == "colour, store, a\\r\\nb: c"
        assert "x-piecework-ignored" not in post(url).headers
        quiet = post(url, guided_json=None, use_beam_search=False, bad_words=[], length_penalty=1.0, store=None)
        assert (quiet.status_code, quiet.headers.get("x-piecework-ignored")) == (200, None)
        assert post(url, **{f"field_number_{i}": 1 for i in range(65)}).status_code == 400
    assert written.getvalue().count("field_ignored field=colour") == 1


def test_a_missing_package_is_a_501_that_says_what_to_install(
    url: str, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise MissingPackageError(asked="a", found="no package", try_="pip install 'piecework[structured]'")

    monkeypatch.setattr(service, "check", refuse)
    for stream in (False, True):
        answer = post(url, structured_outputs={"regex": "a"}, stream=stream)
        assert answer.status_code == 501
        assert "pip install 'piecework[structured]'" in answer.json()["error"]["message"]

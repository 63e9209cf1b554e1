"""The server does what its OpenAPI schema says, whatever requests can be made from that schema."""

from __future__ import annotations

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig

from piecework.server.app import make_app
from piecework.server.settings import ServerSettings
from tests.unit.server.fake import FakeService, ready

CONFIG = """
seed = 1

[generation]
max-examples = {examples}
deterministic = true
no-shrink = true
database = "none"

[checks.positive_data_acceptance]
# what a schema can't say: prompts that are too long, fields that don't go together, models that aren't there
expected-statuses = [200, 400, 404]
"""
APP = make_app(
    ready(FakeService(max_positions=64)), ServerSettings(model_names=("fake",), api_key="key", hosts=("testserver",))
)
FEW, MANY = (
    schemathesis.openapi.from_asgi(
        "/openapi.json", APP, config=SchemathesisConfig.from_str(CONFIG.format(examples=examples))
    )
    for examples in (8, 60)
)


@FEW.parametrize()
def test_every_operation_keeps_to_the_schema(case):
    check(case)


@pytest.mark.slow
@MANY.parametrize()
def test_every_operation_keeps_to_the_schema_for_long(case):
    check(case)


def check(case):
    _make_answerable(case.body)
    case.call_and_validate(headers={"Authorization": "Bearer key"})


def _make_answerable(body):
    """Replace valid values that no schema can exclude, else nearly every request would be refused because of them."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and body["model"]:
        body["model"] = "fake"
    if body.get("prompt") == "":
        body["prompt"] = "x"
    if type(body.get("max_tokens")) is int and body["max_tokens"] == 0:
        body["max_tokens"] = 1

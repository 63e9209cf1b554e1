from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from piecework.server.settings import ServerSettings
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import live_server

MODEL = "fake"


@pytest.fixture(scope="session")
def service() -> FakeService:
    return FakeService()


@pytest.fixture(scope="session")
def url(service: FakeService) -> Iterator[str]:
    with live_server(ready(service), ServerSettings(model_names=(MODEL, "alias/with-slash"))) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client

"""/v1/embeddings, /v1/rerank and /v1/score over a service without a model, as clients call them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy
import openai
import pytest

from piecework.engine.output import Stats
from piecework.engine.text.tokenizer import TextTokens
from piecework.errors import RequestError
from piecework.server.service import EncodeService
from piecework.server.settings import Limits, ServerSettings
from piecework.spec.encoder_config import Task
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import live_server

LONGEST = 16


class FakeEncoder(EncodeService):
    """Gives a text (its number of bytes, 1, 0), and a pair of texts how many letters of the first the second has."""

    def __init__(self, task: Task) -> None:
        self._task = task

    @property
    def task(self) -> Task:
        return self._task

    @property
    def max_positions(self) -> int:
        return LONGEST

    @property
    def failure(self) -> str:
        return ""

    def tokens(self, texts: Sequence[str]) -> Sequence[TextTokens]:
        return [_cut(text.encode()) for text in texts]

    def pair_tokens(self, pairs: Sequence[tuple[str, str]]) -> Sequence[TextTokens]:
        return [_cut([sum(letter in b for letter in a), *b.encode()]) for a, b in pairs]

    def check(self, texts: Sequence[TextTokens]) -> None:
        if any(token >= 256 for text in texts for token in text.ids):
            raise RequestError(asked="encode text 0", found="a token", try_="tokens below 256")

    def encode(self, texts: Sequence[TextTokens]) -> Any:
        if self._task is Task.SCORE:
            return numpy.array([[text.ids[0]] for text in texts], dtype=numpy.float32)
        return numpy.array([[len(text.ids), 1, 0] for text in texts], dtype=numpy.float32)

    def stats(self) -> Stats:
        return Stats()


def _cut(tokens: Sequence[int]) -> TextTokens:
    return TextTokens(list(tokens)[:LONGEST], [0] * min(LONGEST, len(tokens)), len(tokens) > LONGEST)


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[Task, str]]:
    settings = ServerSettings(model_names=("m",), limits=Limits(texts=4))
    embed, score = FakeEncoder(Task.EMBED), FakeEncoder(Task.SCORE)
    with live_server(ready(embed), settings) as one, live_server(ready(score), settings) as other:
        yield {Task.EMBED: one, Task.SCORE: other}


@pytest.fixture
def post(urls: dict[Task, str]) -> Any:
    def post(task: Task, path: str, **body: Any) -> httpx.Response:
        return httpx.post(urls[task] + path, json={"model": "m", **body}, timeout=10)

    return post


def test_openais_client_gets_vectors_in_their_order(urls: dict[Task, str]) -> None:
    with openai.OpenAI(base_url=f"{urls[Task.EMBED]}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="m", input=["abc", "a"])  # base64 on the wire
        plain = client.embeddings.create(model="m", input="ab", encoding_format="float")
        short = client.embeddings.create(model="m", input=[[7] * 3, [7] * 4], dimensions=1)
    assert [item.embedding for item in answer.data] == [[3, 1, 0], [1, 1, 0]]
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (4, 4)
    assert plain.data[0].embedding == [2, 1, 0]
    assert [item.embedding for item in short.data] == [[1], [1]]


def test_base64_is_of_little_endian_float32(post: Any) -> None:
    data = post(Task.EMBED, "/v1/embeddings", input="ab", encoding_format="base64").json()["data"]
    assert numpy.frombuffer(base64.b64decode(data[0]["embedding"]), dtype="<f4").tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"input": []}, "at least one is needed"),
        ({"input": ""}, "a text is empty"),
        ({"input": ["a"] * 5}, "5 texts are more than this server's 4"),
        ({"input": "a" * 17}, "more tokens than this model's 16"),
        ({"input": [1] * 17}, "more tokens than this model's 16"),
        ({"input": [300]}, "tokens below 256"),
        ({"input": "a", "dimensions": 4}, "1 to 3"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded_is_a_400(post: Any, body: dict[str, Any], found: str) -> None:
    response = post(Task.EMBED, "/v1/embeddings", **body)
    assert response.status_code == 400
    assert found in response.json()["error"]["message"]


def test_a_long_text_is_cut_off_where_that_is_asked_for(post: Any) -> None:
    response = post(Task.EMBED, "/v1/embeddings", input=["a" * 99, "b"], truncate_prompt_tokens=-1)
    assert response.json()["data"][0]["embedding"] == [16, 1, 0]


def test_reranked_documents_come_best_first(post: Any) -> None:
    documents = ["b", {"text": "abc"}, "ab"]
    answer = post(Task.SCORE, "/v1/rerank", query="abc", documents=documents, top_n=2).json()
    assert [(r["index"], r["relevance_score"], r["document"]["text"]) for r in answer["results"]] == [
        (1, 3.0, "abc"),
        (2, 2.0, "ab"),
    ]
    assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    answer = post(Task.SCORE, "/v1/rerank", query="abc", documents=["a"], return_documents=False).json()
    assert answer["results"] == [{"index": 0, "relevance_score": 1.0}]


def test_scores_are_of_pairs(post: Any) -> None:
    one_for_all = post(Task.SCORE, "/v1/score", text_1="ab", text_2=["a", "ab"]).json()
    each = post(Task.SCORE, "/v1/score", text_1=["a", "b"], text_2=["b", "b"]).json()
    assert [d["score"] for d in one_for_all["data"]] == [1, 2]
    assert [d["score"] for d in each["data"]] == [0, 1]
    assert post(Task.SCORE, "/v1/score", text_1=["a", "b"], text_2=["b"]).status_code == 400


def test_each_model_names_the_endpoints_that_it_has(post: Any) -> None:
    with live_server(ready(FakeService()), ServerSettings(model_names=("m",))) as url:
        texts = httpx.post(url + "/v1/embeddings", json={"model": "m", "input": "a"}, timeout=10)
    answers = {
        "POST /v1/completions": texts,
        "POST /v1/embeddings": post(Task.EMBED, "/v1/completions", prompt="a"),
        "POST /v1/rerank": post(Task.SCORE, "/v1/embeddings", input="a"),
    }
    for name, answer in answers.items():
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "wrong_task")
        assert name in error["message"]

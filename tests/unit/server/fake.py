"""A service that needs no model: its text follows from the prompt, the seed and the place, and from nothing else."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from piecework.engine.output import SampledToken, Stats
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.sampling.logprobs import LEAST
from piecework.engine.text.chat_template import ChatTemplate
from piecework.engine.text.deltas import TextDelta
from piecework.errors import RequestError
from piecework.server.service import Service
from piecework.server.status import BundleUse, ServerStatus
from piecework.spec.encoder_config import Task

WORDS = ("red", "green", "blue", "black", "white", "grün", "漢字", "🙂", "one", "two", "three", "four", "five", "six")
FIRST_WORD = 256  # smaller ids are the bytes of a prompt
VOCAB = FIRST_WORD + len(WORDS)
MAX_POSITIONS = 2048


TEMPLATE = ChatTemplate(
    "{% if messages[0].role == 'function' %}{{ raise_exception('it begins with a function') }}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% if thinking is defined %}thinking: {{ thinking | tojson }}\n{% endif %}"
    "assistant:",
    special_tokens={},
)


class FakeService(Service):
    """Continues with words. `step_s` seconds go by per token; `active` are the requests that hold memory."""

    def __init__(self, *, step_s: float = 0.0, max_positions: int = MAX_POSITIONS) -> None:
        self.step_s = step_s
        self.active: set[str] = set()
        self.ended: list[str] = []
        self.seen: list[GenerationRequest] = []
        self.fail_after: int | None = None
        self.failed = ""
        self.templates = ""
        self.says: str | None = None
        self.prompt_end = ""
        self.prompt_tokens = 0
        self.generated = 0
        self._max_positions = max_positions

    @property
    def task(self) -> Task:
        return Task.GENERATE

    @property
    def max_positions(self) -> int:
        return self._max_positions

    @property
    def failure(self) -> str:
        return self.failed

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        return self.encode(TEMPLATE.render(messages, tools=tools, extra=extra) + self.prompt_end)

    @property
    def chat_templates(self) -> str:
        return self.templates

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(_raw(token) for token in tokens if token < VOCAB).decode(errors="replace")

    def token_bytes(self) -> Sequence[bytes]:
        return [_raw(token) for token in range(VOCAB)]

    def check(self, generation: GenerationRequest) -> None:
        generation.params.check_tokens(VOCAB)
        if max(generation.prompt) >= VOCAB:
            raise RequestError(
                asked="continue a prompt", found=f"token {max(generation.prompt)}", try_=f"tokens below {VOCAB}"
            )

    def continuation(self, generation: GenerationRequest, index: int, length: int) -> list[int]:
        """Return the ids that `index` of a request generates."""
        if self.says is not None:
            return list(self.says.encode())[:length]
        start = f"{generation.prompt} {generation.params.seed} {index}"
        tokens = []
        for place in range(length):
            digest = hashlib.sha256(f"{start} {place}".encode()).digest()
            tokens.append(FIRST_WORD + digest[0] % len(WORDS))
        return tokens

    async def stream(self, generation: GenerationRequest) -> AsyncIterator[TextDelta]:
        self.seen.append(generation)
        self.active.add(generation.request_id)
        params = generation.params
        self.prompt_tokens += len(generation.prompt)
        room = self._max_positions - len(generation.prompt)
        length = min(params.max_tokens, room)
        if self.says is not None:
            length = min(length, len(self.says))
        plans = [self.continuation(generation, index, length) for index in range(params.n)]
        texts = [""] * params.n
        done = [False] * params.n
        try:
            for place in range(length):
                await asyncio.sleep(self.step_s)
                if self.fail_after == place:
                    raise RuntimeError("the fake was told to fail")
                for index in range(params.n):
                    if done[index]:
                        continue
                    token = plans[index][place]
                    text = _raw(token).decode()
                    texts[index] += text
                    stopped = next((s for s in params.stop if s in texts[index]), None)
                    if stopped is not None:
                        cut = texts[index].index(stopped)
                        text = text[: max(0, cut - (len(texts[index]) - len(text)))]
                    reason = None if place < length - 1 else FinishReason.LENGTH
                    if stopped is not None or (reason is not None and self.says is not None):
                        reason = FinishReason.STOP
                    done[index] = reason is not None
                    self.generated += 1
                    yield TextDelta(
                        text,
                        (_scored(token, params.logprobs),),
                        reason,
                        index=index,
                        prompt_logprobs=_prompt_logprobs(generation) if place == index == 0 else None,
                    )
        finally:
            self.active.discard(generation.request_id)
            self.ended.append(generation.request_id)

    def stats(self) -> Stats:
        return Stats(
            running=len(self.active),
            kv_blocks_used=4 * len(self.active),
            kv_blocks_total=100,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated,
        )


def ready(service: Service) -> ServerStatus:
    """Return the status of a server that is ready."""
    status = ServerStatus()
    with status.phase("weights"), status.phase("tokenizer"):
        pass
    status.serves(service, bundle=BundleUse(hit=True, backend="aoti", report=lambda: REPORT))
    return status


REPORT = {
    "digest": "0" * 64,
    "identity": {"architecture": "FakeForCausalLM"},
    "facts": {"torch/version": "0"},
    "num_pieces": 9,
    "num_unique_pieces": 3,
    "steps": ["piece 0 [aa] model.layers 0", "piecework::attention model.layers.0", "piece 1 [bb] model.layers 0-1"],
}


def _raw(token: int) -> bytes:
    return bytes([token]) if token < FIRST_WORD else f" {WORDS[token - FIRST_WORD]}".encode()


def _scored(token: int, count: int | None) -> SampledToken:
    if count is None:
        return SampledToken(token)
    top = tuple((FIRST_WORD + (token + i) % len(WORDS), -0.5 - i) for i in range(count))
    return SampledToken(token, LEAST if token % 7 == 0 else -0.25, top)


def _prompt_logprobs(generation: GenerationRequest) -> tuple[SampledToken | None, ...] | None:
    count = generation.params.prompt_logprobs
    return None if count is None else (None, *(_scored(token, count) for token in generation.prompt[1:]))

"""`Encoder`: tokens of texts in, a vector or a score for each out. Whatever waits is computed together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import numpy
import torch
from torch import Tensor

from piecework.engine.output import Stats
from piecework.engine.text.tokenizer import TextTokens
from piecework.errors import EngineError, RequestError


class EncoderModel(Protocol):
    """What runs: a `LoadedModel` of an encoder's bundle."""

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        """Return [vectors or scores of S texts] for the inputs of models/adapter.py's `build_encoder`."""

    def close(self) -> None:
        """Let go of the model."""


@dataclass
class _Job:
    """Texts of one call, and what became of them once they are computed."""

    texts: Sequence[TextTokens]
    results: list[Tensor | None] = field(default_factory=list)
    error: BaseException | None = None
    done: bool = False


@final
class Encoder:
    """Computes texts, packed one after the other into batches. Any thread may use it, several at a time.

    Args:
        model: runs a batch.
        max_tokens: most tokens of a batch.
        max_texts: most texts of a batch.
        longest: most tokens of a text.
        vocab_size: how many tokens there are.
        padded: whether the model computes each text as if it were as long as the longest one of a batch.
    """

    def __init__(
        self,
        model: EncoderModel,
        *,
        max_tokens: int,
        max_texts: int,
        longest: int,
        vocab_size: int,
        padded: bool = False,
    ) -> None:
        self._padded = padded
        self._model: EncoderModel | None = model
        self._max_tokens = max_tokens
        self._max_texts = max_texts
        self.longest = longest
        self._vocab_size = vocab_size
        self._running = threading.Lock()
        self._mutex = threading.Lock()
        self._waiting: list[_Job] = []
        self._stats = Stats()

    def check(self, texts: Sequence[TextTokens]) -> None:
        """Raise RequestError where one of the texts has no tokens, too many, or tokens that there aren't."""
        for number, text in enumerate(texts):
            wrong = next((token for token in text.ids if not 0 <= token < self._vocab_size), None)
            if not text.ids or len(text.ids) > self.longest or wrong is not None:
                length = f"{len(text.ids)} tokens"
                raise RequestError(
                    asked=f"encode text {number}",
                    found=length if wrong is None else f"the token {wrong}",
                    try_=f"1 to {self.longest} tokens, each of 0 to {self._vocab_size - 1}",
                )

    def encode(self, texts: Sequence[TextTokens]) -> Tensor:
        """Return a vector or a score for each text, in their order: [n, dim] float32, on the host.

        Raises RequestError like `check`, before anything runs, EngineError once it is closed.
        """
        if not texts:
            raise RequestError(asked="encode texts", found="none", try_="one or more")
        self.check(texts)
        job = _Job(texts)
        with self._mutex:
            self._waiting.append(job)
        with self._running:
            if not job.done:
                self._run_waiting()
        if job.error is not None:
            raise job.error
        return torch.stack([row for row in job.results if row is not None])

    def swap_runner(self, model: EncoderModel) -> None:
        """Go over to another model of the same texts and results, and let go of the one before."""
        with self._running:
            before, self._model = self._model, model
        if before is not None:
            before.close()

    def close(self) -> None:
        """Let go of the model, once what runs has ended."""
        with self._running:
            before, self._model = self._model, None
        if before is not None:
            before.close()

    def stats(self) -> Stats:
        """Return how many texts wait, and how many forwards and tokens there were."""
        with self._mutex:
            waiting = sum(len(job.texts) for job in self._waiting)
        stats = self._stats
        return Stats(waiting=waiting, prompt_tokens=stats.prompt_tokens, steps=stats.steps)

    def _run_waiting(self) -> None:
        """Compute the texts of all calls that wait: those of one call alone may leave a batch half empty."""
        with self._mutex:
            jobs, self._waiting = self._waiting, []
        for job in jobs:
            job.results = [None] * len(job.texts)
        texts = [(job, place) for job in jobs for place in range(len(job.texts))]
        try:
            for batch in self._batches(texts):
                rows = self._run([job.texts[place] for job, place in batch])
                for (job, place), row in zip(batch, rows, strict=True):
                    job.results[place] = row
        except BaseException as error:
            for job in jobs:
                job.error = error
            raise
        finally:
            for job in jobs:
                job.done = True

    def _batches(self, texts: list[tuple[_Job, int]]) -> Iterator[list[tuple[_Job, int]]]:
        """Yield the texts in batches, the longest first: texts of the same length are computed together."""
        batch: list[tuple[_Job, int]] = []
        room = self._max_tokens
        for job, place in sorted(texts, key=lambda text: -len(text[0].texts[text[1]].ids)):
            first, at = batch[0] if self._padded and batch else (job, place)
            length = len(first.texts[at].ids)  # what it takes of the room
            if length > room or len(batch) == self._max_texts:
                yield batch
                batch, room, length = [], self._max_tokens, len(job.texts[place].ids)
            batch.append((job, place))
            room -= length
        yield batch

    def _run(self, texts: Sequence[TextTokens]) -> Tensor:
        if self._model is None:
            raise EngineError(asked="encode texts", found="the model was closed", try_="open it again")
        inputs = packed(texts)
        (rows,) = self._model.run(inputs)
        tokens = self._stats.prompt_tokens + len(inputs["input_ids"])
        self._stats = Stats(prompt_tokens=tokens, steps=self._stats.steps + 1)
        return rows.cpu()


def packed(texts: Sequence[TextTokens]) -> dict[str, Any]:
    """Return the named inputs of a forward for texts, all int64 on the host; see `models/adapter.py`."""
    starts = numpy.zeros(len(texts) + 1, dtype=numpy.int64)
    numpy.cumsum([len(text.ids) for text in texts], out=starts[1:])
    return {
        "input_ids": torch.tensor([token for text in texts for token in text.ids]),
        "positions": torch.tensor([place for text in texts for place in range(len(text.ids))]),
        "token_type_ids": torch.tensor([kind for text in texts for kind in text.types]),
        "query_start": torch.from_numpy(starts),
        "places": torch.arange(max(2, *(len(text.ids) for text in texts))),
    }

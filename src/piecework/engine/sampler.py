"""From logits to tokens, each request with its own random numbers and independent of the rest of its batch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import final

import torch
from torch import Tensor

from piecework.engine.request import GenerationRequest, SamplingParams


@final
class Sampler:
    """Chooses tokens. Keeps one random number generator for each sampled request until `forget`."""

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}

    def choose(self, logits: Tensor, requests: Items[GenerationRequest]) -> list[int]:
        """Return one token per row of the logits [requests, vocab]."""
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        for row, request in enumerate(requests):
            if not request.params.greedy:
                probabilities = token_probabilities(logits[row], request.params)
                generator = self._generator(request)
                tokens[row] = int(torch.multinomial(probabilities, 1, generator=generator).item())
        return tokens

    def forget(self, request: GenerationRequest) -> None:
        """Drop what is kept for a request."""
        self._generators.pop(request.request_id, None)

    def _generator(self, request: GenerationRequest) -> torch.Generator:
        known = self._generators.get(request.request_id)
        if known is None:
            known = self._generators[request.request_id] = torch.Generator()
            if request.params.seed is None:
                known.seed()
            else:
                known.manual_seed(request.params.seed)
        return known


def token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the distribution [vocab], float32 on the host, that a request samples its next token from.

    Temperature first, then top-k, then top-p among those: the order of transformers.
    """
    scores = logits.to("cpu", torch.float32) / params.temperature
    if 0 < params.top_k < scores.shape[0]:
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if params.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # a token stays if those before it have not reached top_p, so the likeliest always does
        dropped = order[ordered.cumsum(0) - ordered >= params.top_p]
        probabilities[dropped] = 0.0
        probabilities /= probabilities.sum()
    return probabilities

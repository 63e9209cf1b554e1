"""What the sampler should do, one token at a time and in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

from piecework.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Reference:
    params: SamplingParams
    prompt: list[int]
    generated: list[int]
    end_tokens: tuple[int, ...]


def reference_logits(logits: list[float], case: Reference) -> list[float]:
    """Return the logits after min_tokens, bias and penalties."""
    params, changed = case.params, list(logits)
    for token in range(len(changed)):
        if len(case.generated) < params.min_tokens and token in (*case.end_tokens, *params.stop_token_ids):
            changed[token] = -math.inf
        changed[token] += params.logit_bias.get(token, 0.0)
        if token in case.prompt or token in case.generated:
            if changed[token] > 0:
                changed[token] /= params.repetition_penalty
            else:
                changed[token] *= params.repetition_penalty
        times = case.generated.count(token)
        changed[token] -= params.frequency_penalty * times
        if times:
            changed[token] -= params.presence_penalty
    return changed


def reference_distribution(logits: list[float], case: Reference) -> list[tuple[int, float]]:
    """Return (token, probability) of what may be drawn, likeliest first, equal ones by token; one for greedy."""
    params, changed = case.params, reference_logits(logits, case)
    order = sorted(range(len(changed)), key=lambda token: (-changed[token], token))
    if params.greedy:
        return [(order[0], 1.0)]
    greatest = changed[order[0]]
    weights = [(token, math.exp((changed[token] - greatest) / params.temperature)) for token in order]
    weights = [(token, weight) for token, weight in weights if weight >= params.min_p and weight > 0]
    if params.top_k:
        weights = weights[: params.top_k]
    total = sum(weight for _, weight in weights)
    kept, before = [], 0.0
    for token, weight in weights:
        if before < params.top_p * total or params.top_p == 1.0:
            kept.append((token, weight))
        before += weight
    total = sum(weight for _, weight in kept)
    return [(token, weight / total) for token, weight in kept]


def reference_logprobs(logits: list[float]) -> list[float]:
    greatest = max(logits)
    norm = greatest + math.log(sum(math.exp(value - greatest) for value in logits))
    return [value - norm for value in logits]

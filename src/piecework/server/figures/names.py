"""Under which names figures are given: ours, or those of vLLM, which dashboards made for it read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

OURS: Final = "piecework"
VLLM: Final = "vllm"

OF_VLLM: Final[Mapping[str, str]] = {
    "piecework_requests_waiting": "vllm:num_requests_waiting",
    "piecework_requests_running": "vllm:num_requests_running",
    "piecework_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "piecework_prompt_tokens": "vllm:prompt_tokens",
    "piecework_generated_tokens": "vllm:generation_tokens",
    "piecework_prefix_queried_tokens": "vllm:prefix_cache_queries",
    "piecework_prefix_hit_tokens": "vllm:prefix_cache_hits",
    "piecework_preemptions": "vllm:num_preemptions",
    "piecework_finished_sequences": "vllm:request_success",
    "piecework_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "piecework_inter_token_seconds": "vllm:inter_token_latency_seconds",
    "piecework_request_seconds": "vllm:e2e_request_latency_seconds",
    "piecework_queue_seconds": "vllm:request_queue_time_seconds",
    "piecework_prefill_seconds": "vllm:request_prefill_time_seconds",
    "piecework_decode_seconds": "vllm:request_decode_time_seconds",
    "piecework_request_prompt_tokens": "vllm:request_prompt_tokens",
    "piecework_request_generated_tokens": "vllm:request_generation_tokens",
}
"""Our names, and vLLM's for the same; what isn't here has no other name."""


def name_of(ours: str, *, names: str) -> str:
    """Return the name of one of our figures, under OURS or VLLM."""
    return OF_VLLM.get(ours, ours) if names == VLLM else ours

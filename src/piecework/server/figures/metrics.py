"""Figures for Prometheus, in a registry of this server's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from piecework.engine.output import Stats
from piecework.foundation.version import VERSION
from piecework.server.status import ServerStatus, State

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_FIRST_TOKEN_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_INTER_TOKEN_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_REQUEST_S: Final = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)


@final
class Metrics:
    """What is counted and timed.

    Args:
        status: read when somebody asks for the figures: engine, bundle and phases of the start.
    """

    def __init__(self, status: ServerStatus) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self.first_token = Histogram(
            "piecework_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "piecework_inter_token_seconds",
            "Between two tokens of a continuation.",
            buckets=_INTER_TOKEN_S,
            registry=self._registry,
        )
        self.request_time = Histogram(
            "piecework_request_seconds",
            "From a request's arrival to the end of its answer, of requests for text.",
            buckets=_REQUEST_S,
            registry=self._registry,
        )
        self.requests = Counter(
            "piecework_http_requests", "Answers by path and status.", ("path", "status"), registry=self._registry
        )
        self.finished = Counter(
            "piecework_finished_sequences", "Continuations by why they ended.", ("reason",), registry=self._registry
        )
        self.disconnects = Counter(
            "piecework_client_disconnects", "Requests whose client went away before the end.", registry=self._registry
        )
        self._registry.register(_StatusCollector(status))

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format, of type CONTENT_TYPE."""
        return generate_latest(self._registry)


@final
class _StatusCollector(Collector):
    """Reads what others count, at the moment somebody asks."""

    def __init__(self, status: ServerStatus) -> None:
        self._status = status

    def describe(self) -> Iterator[Metric]:
        """Name nothing in advance: the names are known not to clash."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of now."""
        yield from self._server()
        service = self._status.service
        if service is not None:
            yield from _engine(service.stats())

    def _server(self) -> Iterator[Metric]:
        status = self._status
        info = GaugeMetricFamily("piecework_info", "Always 1.", labels=("version",))
        info.add_metric((VERSION,), 1)
        yield info
        state = GaugeMetricFamily("piecework_state", "1 for the state the server is in.", labels=("state",))
        for each in State:
            state.add_metric((each.value,), float(status.state is each))
        yield state
        phases = GaugeMetricFamily(
            "piecework_startup_phase_seconds", "How long each phase of the start took.", labels=("phase",)
        )
        for phase in status.phases:
            if phase.end_s is not None:
                phases.add_metric((phase.name,), phase.end_s - phase.begin_s)
        yield phases
        lookups = CounterMetricFamily(
            "piecework_bundle_lookups", "Whether the store had a bundle at the start.", labels=("result",)
        )
        if status.bundle is not None:
            for result, holds in (("hit", status.bundle.hit), ("miss", not status.bundle.hit)):
                lookups.add_metric((result,), float(holds))
        yield lookups


def _engine(stats: Stats) -> Iterator[Metric]:
    gauges = {
        "piecework_requests_waiting": ("Sequences in the queue.", stats.waiting),
        "piecework_requests_running": ("Sequences in the batch.", stats.running),
        "piecework_kv_blocks_used": ("Blocks of the KV cache in use.", stats.kv_blocks_used),
        "piecework_kv_blocks_total": ("Blocks of the KV cache.", stats.kv_blocks_total),
        "piecework_kv_usage_ratio": (
            "Part of the KV cache in use, 0 to 1.",
            stats.kv_blocks_used / max(1, stats.kv_blocks_total),
        ),
    }
    counters = {
        "piecework_prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
        "piecework_generated_tokens": ("Tokens that were generated.", stats.generated_tokens),
        "piecework_prefix_queried_tokens": ("Tokens looked up in the prefix cache.", stats.prefix_queried_tokens),
        "piecework_prefix_hit_tokens": ("Tokens found in the prefix cache.", stats.prefix_hit_tokens),
        "piecework_preemptions": ("Sequences that gave up their blocks and are computed again.", stats.preemptions),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(name, text, value=value)
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(name, text, value=value)

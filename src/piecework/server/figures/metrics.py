"""Figures for Prometheus, in a registry of this server's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, choose_encoder
from prometheus_client.registry import Collector

from piecework.engine.output import Stats
from piecework.engine.request import FinishReason
from piecework.foundation.version import VERSION
from piecework.server.figures.names import OURS, VLLM, name_of
from piecework.server.status import ServerStatus, State

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_FIRST_TOKEN_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_INTER_TOKEN_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_REQUEST_S: Final = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

Values = Mapping[tuple[str, ...], float]
"""Values by their labels, `model_name` aside."""


@final
class Metrics:
    """What is counted and timed; every figure has the label `model_name`.

    Args:
        status: read when somebody asks for the figures: engine, bundle and phases of the start.
        model: the model's name.
        names: OURS or VLLM.
    """

    def __init__(self, status: ServerStatus, *, model: str, names: str = OURS) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._model = model
        self._names = names
        timed = self._histogram
        self.first_token = timed("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_S)
        self.inter_token = timed("inter_token_seconds", "Between two tokens of a continuation.", _INTER_TOKEN_S)
        self.request_time = timed("request_seconds", "From arrival to the end of the answer.", _REQUEST_S)
        self.queue_time = timed("queue_seconds", "From arrival to the first batch that a sequence is in.", _REQUEST_S)
        self.prefill_time = timed("prefill_seconds", "From a sequence's first batch to its first token.", _REQUEST_S)
        self.decode_time = timed("decode_seconds", "From a continuation's first token to its last.", _REQUEST_S)
        self.request_prompt = timed("request_prompt_tokens", "Tokens of each prompt.", _TOKENS)
        self.request_generated = timed("request_generated_tokens", "Tokens of each continuation.", _TOKENS)
        reason = "finished_reason" if names == VLLM else "reason"
        self._answers = self._counter("http_requests", "Answers by path and status.", "path", "status")
        self._finished = self._counter("finished_sequences", "Continuations by why they ended.", reason)
        self.disconnects = self._counter(
            "client_disconnects", "Requests whose client went away before the end."
        ).labels(model)
        self._registry.register(_StatusCollector(status, model=model, names=names))

    def answered(self, path: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(self._model, path, str(status)).inc()

    def ends(self, reason: FinishReason, *, decode_s: float, num_tokens: int) -> None:
        """Count a continuation that ended, and note how long it was."""
        self._finished.labels(self._model, reason.value).inc()
        self.decode_time.observe(decode_s)
        self.request_generated.observe(num_tokens)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return all figures and their Content-Type: Prometheus' text format, or OpenMetrics where that is accepted."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        full = name_of(f"piecework_{name}", names=self._names)
        return Histogram(full, text, ("model_name",), buckets=buckets, registry=self._registry).labels(self._model)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        full = name_of(f"piecework_{name}", names=self._names)
        return Counter(full, text, ("model_name", *labels), registry=self._registry)


@final
class _StatusCollector(Collector):
    """Reads what others count, at the moment somebody asks."""

    def __init__(self, status: ServerStatus, *, model: str, names: str) -> None:
        self._status = status
        self._model = model
        self._names = names

    def describe(self) -> Iterator[Metric]:
        """Name nothing in advance: the names are known not to clash."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of now."""
        yield from self._server()
        service = self._status.service
        if service is not None:
            yield from self._engine(service.stats())

    def _server(self) -> Iterator[Metric]:
        status = self._status
        yield self._gauge("info", "Always 1.", {(VERSION,): 1.0}, "version")
        states: Values = {(each.value,): float(status.state is each) for each in State}
        yield self._gauge("state", "1 for the state the server is in.", states, "state")
        ended: Values = {(p.name,): p.end_s - p.begin_s for p in status.phases if p.end_s is not None}
        yield self._gauge("startup_phase_seconds", "How long each phase of the start took.", ended, "phase")
        bundle = status.bundle
        found: Values = {} if bundle is None else _lookups(hit=bundle.hit)
        yield self._counter("bundle_lookups", "Whether the store had a bundle at the start.", found, "result")

    def _engine(self, stats: Stats) -> Iterator[Metric]:
        used, total = stats.kv_blocks_used, stats.kv_blocks_total
        for name, text, gauge in (
            ("requests_waiting", "Sequences in the queue.", stats.waiting),
            ("requests_running", "Sequences in the batch.", stats.running),
            ("kv_blocks_used", "Blocks of the KV cache in use.", used),
            ("kv_blocks", "Blocks of the KV cache.", total),
            ("kv_usage_ratio", "Part of the KV cache in use, 0 to 1.", used / max(1, total)),
        ):
            yield self._gauge(name, text, {(): float(gauge)})
        for name, text, count in (
            ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("generated_tokens", "Tokens that were generated.", stats.generated_tokens),
            ("prefix_queried_tokens", "Tokens looked up in the prefix cache.", stats.prefix_queried_tokens),
            ("prefix_hit_tokens", "Tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("preemptions", "Sequences that gave up their blocks and are computed again.", stats.preemptions),
        ):
            yield self._counter(name, text, {(): float(count)})

    def _gauge(self, name: str, text: str, values: Values, *labels: str) -> Metric:
        return self._family(GaugeMetricFamily, name, text, values, labels)

    def _counter(self, name: str, text: str, values: Values, *labels: str) -> Metric:
        return self._family(CounterMetricFamily, name, text, values, labels)

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        values: Values,
        labels: Sequence[str],
    ) -> Metric:
        family = kind(name_of(f"piecework_{name}", names=self._names), text, labels=("model_name", *labels))
        for of_labels, value in values.items():
            family.add_metric((self._model, *of_labels), value)
        return family


def _lookups(*, hit: bool) -> Values:
    return {("hit",): float(hit), ("miss",): float(not hit)}

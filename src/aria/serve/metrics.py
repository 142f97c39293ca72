"""Prometheus metrics of the server, for `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aria.engine import AsyncEngine

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class ServerMetrics:
    """Metrics of one server, in a registry of their own, since a process may hold several servers."""

    def __init__(self, engine: AsyncEngine, healthy: Callable[[], bool]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "aria_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.first_token = Histogram(
            "aria_time_to_first_token_seconds", "Time from the request body to the first token.", buckets=_FIRST,
            registry=self.registry,
        )  # fmt: skip
        self._per_token = Histogram(
            "aria_time_per_output_token_seconds", "Mean time between tokens of a response.", buckets=_TOKEN,
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "aria_request_duration_seconds", "Time from the request body to the last token.", buckets=_WHOLE,
            registry=self.registry,
        )  # fmt: skip
        self._prompt = Counter("aria_prompt_tokens", "Prompt tokens.", registry=self.registry)
        self._completion = Counter("aria_completion_tokens", "Generated tokens.", registry=self.registry)
        self._models = Counter(
            "aria_model_requests", "Requests that produced a token, by model or adapter.", ("model",),
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(_EngineCollector(engine, healthy))

    def finished(self, *, model: str, prompt: int, completion: int, seconds: float, per_token: float | None) -> None:
        """Count a request that ended, complete or not."""
        self._models.labels(model).inc()
        self._prompt.inc(prompt)
        self._completion.inc(completion)
        self._seconds.observe(seconds)
        if per_token is not None:
            self._per_token.observe(per_token)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's counters, read on each scrape."""

    def __init__(self, engine: AsyncEngine, healthy: Callable[[], bool]):
        self._engine, self._healthy = engine, healthy

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        yield GaugeMetricFamily("aria_healthy", "0 while steps fail or one hangs, else 1.", self._healthy())
        yield GaugeMetricFamily(
            "aria_step_seconds", "Duration of the current step, 0 if idle.", self._engine.step_seconds
        )
        yield GaugeMetricFamily("aria_requests_running", "Sequences being generated.", stats.running)
        yield GaugeMetricFamily("aria_requests_waiting", "Sequences waiting to be scheduled.", stats.waiting)
        yield GaugeMetricFamily("aria_cache_usage_ratio", "Fraction of the KV cache in use, 0 to 1.", stats.cache_usage)
        yield CounterMetricFamily(
            "aria_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries
        )
        yield CounterMetricFamily(
            "aria_prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits
        )
        yield CounterMetricFamily("aria_preemptions", "Sequences preempted and recomputed.", stats.preemptions)

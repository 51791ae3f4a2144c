"""What Prometheus reads: the engine's counts as they are, and two histograms of what clients wait for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .engine import Engine
from .worker import Stream

_PREFIX = "attngen_serve_"
_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_GAPS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        self._first = Histogram(_PREFIX + "time_to_first_token_seconds", "From submission to a choice's first token", buckets=_FIRST,
                                registry=self._registry)  # fmt: skip
        self._gaps = Histogram(_PREFIX + "inter_token_seconds", "Between two tokens of a choice", buckets=_GAPS, registry=self._registry)
        self._registry.register(self)  # type: ignore[arg-type]

    def observe(self, stream: Stream, choice: int, now: float) -> None:
        """A token of this choice came."""
        last = stream.last[choice]
        (self._first.observe(now - stream.started) if last is None else self._gaps.observe(now - last))
        stream.last[choice] = now

    content_type = CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        engine, stats, pool = self._engine, self._engine.stats, self._engine.pool
        yield GaugeMetricFamily(_PREFIX + "running_sequences", "Sequences that hold pages", engine.running)
        yield GaugeMetricFamily(_PREFIX + "waiting_requests", "Requests that wait for pages", len(engine.waiting))
        pages = GaugeMetricFamily(_PREFIX + "pages", "Pages of the KV cache", labels=["state"])
        pages.add_metric(["held"], pool.held)
        pages.add_metric(["idle"], pool.idle)
        pages.add_metric(["free"], pool.available - pool.idle)
        yield pages
        requests = CounterMetricFamily(_PREFIX + "requests", "Requests that are over", labels=["outcome"])
        for outcome in ("finished", "cancelled", "failed", "refused"):
            requests.add_metric([outcome], getattr(stats, outcome + "_requests"))
        yield requests
        for name, what in (
            ("generated_tokens", "Tokens generated"),
            ("prompt_tokens", "Tokens of prompts admitted"),
            ("cached_tokens", "Tokens of prompts found in the cache"),
            ("steps", "Steps"),
            ("failed_steps", "Steps that raised"),
        ):
            yield CounterMetricFamily(_PREFIX + name, what, getattr(stats, name))

"""What the server counts: for Prometheus, under vLLM's names where the meaning is the same, and for the live page."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kvloom.engine.request import Output

__all__ = ["CONTENT_TYPE", "Clock", "Meter"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATE = 2048  # the page's percentiles are of so many latest ones
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
GAUGES = (
    ("vllm:num_requests_running", "running", "Requests that are being answered"),
    ("vllm:num_requests_waiting", "waiting", "Requests that wait"),
    ("kvloom_kv_bytes", "kv_bytes", "Bytes of key-value caches that are held"),
    ("kvloom_kv_limit_bytes", "kv_limit", "Bytes that key-value caches may take"),
)
COUNTERS = (
    ("vllm:num_preemptions", "preempted", "Requests that gave way to others"),
    ("vllm:prefix_cache_queries", "prefix_queries", "Tokens of prompts that were looked for in the cache"),
    ("vllm:prefix_cache_hits", "prefix_hits", "Tokens of prompts that were found in the cache"),
    ("vllm:external_prefix_cache_hits", "store_hits", "Tokens of prompts that the store had"),
    ("vllm:prompt_tokens", "prompt_tokens", "Tokens of prompts"),
    ("vllm:generation_tokens", "generated_tokens", "Tokens of answers"),
    ("kvloom_steps", "steps", "Forwards of the model"),
)


@dataclass
class Clock:
    """When one request came, and when its latest token did. Seconds, `time.monotonic`."""

    arrival: float
    latest: float | None = None


class Meter:
    """Counts for one server, in a registry of its own.

    Args:
        model: the name under which it is served; a label.
        stats: the engine's numbers now.
    """

    def __init__(self, model: str, stats: Callable[[], Mapping[str, Any]]) -> None:
        self.model, self._engine, self.born = model, stats, time.monotonic()
        self.tiers: Mapping[str, int] = {}  # bytes that the store's tiers hold, as far as known
        self.registry = CollectorRegistry()
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.late: dict[str, deque[float]] = {name: deque(maxlen=LATE) for name in ("ttft", "itl", "e2e")}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            held = Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
            return held.labels(model_name=model)

        self._histograms = {
            "ttft": histogram("vllm:time_to_first_token_seconds", "From a request to its first token", FIRST),
            "itl": histogram("vllm:inter_token_latency_seconds", "From a token to the next one", BETWEEN),
            "e2e": histogram("vllm:e2e_request_latency_seconds", "From a request to its end", WHOLE),
        }
        self.registry.register(self)

    def stats(self) -> dict[str, Any]:
        """The engine's numbers, and where bytes are held."""
        found = dict(self._engine())
        return found | {"bytes_by_tier": {"memory of caches": found.get("kv_bytes", 0), **self.tiers}}

    def saw(self, output: Output, clock: Clock, now: float) -> None:
        """One output, which came now."""
        if output.token is not None:
            if clock.latest is None:
                self._add("ttft", now - clock.arrival)
            else:
                self._add("itl", now - clock.latest)
            clock.latest = now
        if output.finish is not None:
            self.finished[output.finish] += 1
            self._add("e2e", now - clock.arrival)

    def _add(self, name: str, seconds: float) -> None:
        self.late[name].append(seconds)
        self._histograms[name].observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers, for the registry."""
        found = self.stats()

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self.model], value)
            return family

        for name, key, text in GAUGES:
            yield gauge(name, text, found.get(key, 0))
        share = found.get("kv_bytes", 0) / max(1, found.get("kv_limit", 0))
        yield gauge(
            "vllm:kv_cache_usage_perc", "Share of the memory for key-value caches that is held; 1 is all", share
        )
        for name, key, text in COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self.model], found.get(key, 0))
            yield counter
        for name, key, label, text in (
            ("kvloom_kv_kind_bytes", "bytes_by_kind", "kind", "Bytes of key-value caches by kind of segment"),
            ("kvloom_kv_tier_bytes", "bytes_by_tier", "tier", "Bytes of key-value caches by where they are held"),
        ):
            kinds = GaugeMetricFamily(name, text, labels=["model_name", label])
            for kind, nbytes in found.get(key, {}).items():
                kinds.add_metric([self.model, kind], nbytes)
            yield kinds
        ends = CounterMetricFamily(
            "vllm:request_success", "Requests by how they ended", labels=["model_name", "finished_reason"]
        )
        for reason in ("stop", "length", "abort", "error"):
            ends.add_metric([self.model, reason], self.finished[reason])
        yield ends
        refused = CounterMetricFamily(
            "kvloom_requests_refused", "Requests that were refused", labels=["model_name", "status"]
        )
        for status, count in sorted(self.refused.items()):
            refused.add_metric([self.model, status], count)
        yield refused

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)

    def page(self) -> dict[str, Any]:
        """All of it for the live page. Latencies in seconds, of the latest ones."""
        return {
            **self.stats(),
            "seconds": time.monotonic() - self.born,
            "finished": dict(self.finished),
            "refused": dict(self.refused),
            **{name: _percentiles(list(held)) for name, held in self.late.items()},
        }


def _percentiles(found: list[float]) -> dict[str, float] | None:
    if not found:
        return None
    found.sort()
    return {f"p{p}": found[min(len(found) - 1, len(found) * p // 100)] for p in (50, 95, 99)}

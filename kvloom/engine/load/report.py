"""What became of all requests: percentiles, throughput, goodput, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvloom.engine.load.client import Record

__all__ = ["SLO", "percentiles", "rows", "running", "summary", "tokens_each_second"]

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class SLO:
    """Milliseconds that a request may take: to its first token, between tokens in the mean, in all. None: any."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    def given(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def met(self, record: Record) -> bool:
        """A request that failed meets nothing."""
        found = {} if record.error else {"ttft": record.first, "itl": record.gap, "e2e": record.took}
        return not record.error and all(1e3 * found[name] <= most for name, most in self.given().items())


def percentiles(seconds: Iterable[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum in milliseconds; None of nothing."""
    found = 1e3 * np.fromiter(seconds, dtype=float)
    if not len(found):
        return None
    cuts = np.percentile(found, PERCENTILES)
    named = {f"p{p}": float(cut) for p, cut in zip(PERCENTILES, cuts)}
    return {name: round(value, 3) for name, value in ({"mean": found.mean()} | named | {"max": found.max()}).items()}


def _gaps(records: Sequence[Record]) -> Iterable[float]:
    return (b - a for r in records for a, b in zip(r.arrivals, r.arrivals[1:]))


def summary(records: Sequence[Record], slo: SLO | None = None) -> dict[str, Any]:
    """Times in milliseconds unless named otherwise; throughput is from the first request sent to the last answer's end.

    `itl_ms`: gaps between arrivals of all requests. `short`: answers of fewer tokens than asked. `tokens_an_arrival`:
    where it is above 1 the server sends several tokens at once, and a gap stands for as many.
    """
    good = [r for r in records if not r.error]
    ends = [r.at + r.took for r in records]
    seconds = max(ends) - min(r.at for r in records) if records else 0.0
    tokens, arrivals = sum(r.tokens for r in good), sum(len(r.arrivals) for r in good)
    known = [r for r in good if r.prompt is not None]
    cached = [r for r in known if r.cached is not None]
    failed = Counter(r.error for r in records if r.error)
    late = percentiles(r.late for r in records)
    found: dict[str, Any] = {
        "requests": len(records), "completed": len(good), "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3) if seconds else 0.0,
        "output_tokens": tokens, "output_tokens_per_second": round(tokens / seconds, 3) if seconds else 0.0,
        "prompt_tokens": sum(r.prompt or 0 for r in known) if known else None,
        "cached_tokens": sum(r.cached or 0 for r in cached) if cached else None,
        "ttft_ms": percentiles(r.first for r in good), "itl_ms": percentiles(_gaps(good)),
        "e2e_ms": percentiles(r.took for r in good),
        "short": sum(r.tokens < r.wanted for r in good), "tokens_an_arrival": round(tokens / arrivals, 3) if arrivals else None,
        "late_ms": late and {name: late[name] for name in ("p99", "max")},
        "errors": {kind: {"count": n, "first": next(r.detail for r in records if r.error == kind)} for kind, n in failed.items()},
    }  # fmt: skip
    if slo is not None and slo.given():
        met = sum(slo.met(r) for r in records)
        found["goodput"] = {
            "slo_ms": slo.given(), "met": met, "share": round(met / len(records), 4) if records else 0.0,
            "requests_per_second": round(met / seconds, 3) if seconds else 0.0,
        }  # fmt: skip
    return found


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each request by itself, in the order of sending; times in seconds, without its text."""
    found = []
    for r in sorted(records, key=lambda r: r.at):
        row: dict[str, Any] = {"at": round(r.at, 4), "took": round(r.took, 4), "tokens": r.tokens}
        if r.error:
            row |= {"error": r.error, "detail": r.detail}
        else:
            row |= {"prompt": r.prompt, "cached": r.cached, "arrivals": [round(t, 4) for t in r.arrivals]}
        found.append(row)
    return found


def running(records: Sequence[Record], seconds: Sequence[float]) -> list[float]:
    """Requests under way at these times."""
    starts, ends = np.sort([r.at for r in records]), np.sort([r.at + r.took for r in records])
    found: list[float] = (starts.searchsorted(seconds, "right") - ends.searchsorted(seconds, "right")).tolist()
    return found


def tokens_each_second(records: Sequence[Record], edges: Sequence[float]) -> list[float]:
    """Arrivals per second between each two of the times, times the tokens of an arrival."""
    good = [r for r in records if not r.error]
    times = np.array([r.at + t for r in good for t in r.arrivals])
    weights = np.array([r.tokens / len(r.arrivals) for r in good for _ in r.arrivals])
    counted = np.histogram(times, edges, weights=weights)[0]
    found: list[float] = (counted / np.diff(edges)).tolist()
    return found

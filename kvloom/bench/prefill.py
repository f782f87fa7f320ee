"""Time to prefill a prompt under every recipe, against a stock cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from kvloom.bench import models, show
from kvloom.bench.caches import STOCK, cache_for
from kvloom.bench.timing import Tell, alternate, ratio, silent

__all__ = ["Prefill", "Row", "run", "steps"]

WARM = 1  # rounds that do not count; in them razorattention searches the model for retrieval heads
SECOND_PASS = ("h2o", "mikv")  # scored by all attention, which a fused kernel does not give away
BARS = {"nano": (1.10, 2.0), "random": (1.05, 1.60)}  # of DynamicCache: most recipes, those with a second pass


@dataclass(frozen=True)
class Row:
    """One cache: median seconds, `ratio` of DynamicCache's time."""

    cache: str
    seconds: float
    ratio: float
    bar: float | None
    met: bool | None


@dataclass(frozen=True)
class Prefill:
    """All rows, for a prompt of so many tokens."""

    model: str
    tokens: int
    rows: list[Row]

    def table(self) -> Table:
        """A row for every cache."""
        columns = ("cache", "seconds", "of stock", "bar", "met")
        cells = [(r.cache, f"{r.seconds:.2f}", f"{r.ratio:.2f}x", *show.verdict(r.ratio, r.bar)) for r in self.rows]
        return show.table(f"Prefill of {self.tokens:,} tokens, {self.model}", columns, cells)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


def steps(recipes: int, rounds: int) -> int:
    """How often `run` tells of a step."""
    return (1 + recipes) * (WARM + rounds)


def run(name: str, recipes: Sequence[str], tokens: int, rounds: int, tell: Tell = silent) -> Prefill:
    """Times the caches in turns, on a model of `models.load`."""
    model = models.load(name)
    ids = models.prompt(model, tokens)
    names = [STOCK, *recipes]
    jobs = {cache: lambda cache=cache: models.prefill(model, cache_for(model, cache), ids) for cache in names}
    taken = alternate(jobs, rounds, WARM, tell)
    rows = []
    for cache in names:
        times, bar = ratio(taken, cache, STOCK), _bar(name, cache, tokens)
        rows.append(Row(cache, median(taken[cache]), times, bar, show.met(times, bar)))
    return Prefill(name, tokens, rows)


def _bar(model: str, cache: str, tokens: int) -> float | None:
    if cache == STOCK or tokens != models.TOKENS or model not in BARS:
        return None
    return BARS[model][cache.startswith(SECOND_PASS)]

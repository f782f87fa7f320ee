"""Peak memory of a prefill on the bundled model under every recipe, against a stock cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from kvloom.bench import models, show
from kvloom.bench.caches import STOCK, cache_for
from kvloom.bench.timing import Tell, silent

__all__ = ["Memory", "Row", "run", "steps"]

BAR = 1.10


@dataclass(frozen=True)
class Row:
    """One cache: the resident set in MiB after loading and at the peak, `ratio` of DynamicCache's peak."""

    cache: str
    before: float
    peak: float
    ratio: float
    bar: float | None
    met: bool | None


@dataclass(frozen=True)
class Memory:
    """All rows, for a prompt of so many tokens."""

    tokens: int
    rows: list[Row]

    def table(self) -> Table:
        """A row for every cache."""
        columns = ("cache", "MiB before", "MiB peak", "of stock", "bar", "met")
        cells = [
            (r.cache, f"{r.before:.0f}", f"{r.peak:.0f}", f"{r.ratio:.2f}x", *show.verdict(r.ratio, r.bar))
            for r in self.rows
        ]
        title = f"Peak resident memory, prefill of {self.tokens:,} tokens, nano"
        return show.table(title, columns, cells)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


def steps(recipes: int) -> int:
    """How often `run` tells of a step."""
    return 1 + recipes


def peak(name: str, tokens: int) -> tuple[float, float]:
    """(MiB after loading, MiB at the peak of a prefill), the resident set of a process of its own."""
    command = [sys.executable, "-m", "kvloom.bench.memory", name, str(tokens)]
    loaded, top = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(loaded), float(top)


def run(recipes: Sequence[str], tokens: int, tell: Tell = silent) -> Memory:
    """One process for every cache."""
    rows: list[Row] = []
    for name in (STOCK, *recipes):
        tell(name)
        before, top = peak(name, tokens)
        times = top / rows[0].peak if rows else 1.0
        bar = None if name == STOCK or tokens != models.TOKENS else BAR
        rows.append(Row(name, before, top, times, bar, show.met(times, bar)))
    return Memory(tokens, rows)


def _measure(name: str, tokens: int) -> None:
    from resource import RUSAGE_SELF, getrusage

    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # ru_maxrss is in bytes there, in KiB elsewhere
    model = models.load("nano")
    ids, cache = models.prompt(model, tokens), cache_for(model, name)
    models.prefill(model, cache, ids[:, :16])  # what is loaded on first use
    loaded, cache = getrusage(RUSAGE_SELF).ru_maxrss, cache_for(model, name)
    models.prefill(model, cache, ids)
    print(loaded / unit, getrusage(RUSAGE_SELF).ru_maxrss / unit)


if __name__ == "__main__":
    _measure(sys.argv[1], int(sys.argv[2]))

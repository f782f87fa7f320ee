"""Peak memory of a prefill of 8192 tokens on the bundled model under every recipe, against a stock cache."""

from __future__ import annotations

import subprocess
import sys

from rich.table import Table

from benchmarks import _common as common

BAR = 1.10


def peak(name: str) -> tuple[float, float]:
    """(MiB after loading, MiB at the peak of a prefill), the resident set of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", name]
    loaded, top = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(loaded), float(top)


def run() -> Table:
    """One process for every cache."""
    peaks = {name: peak(name) for name in (common.STOCK, *common.RECIPES)}
    stock = peaks[common.STOCK][1]
    rows = []
    for name, (loaded, top) in peaks.items():
        cells = common.verdict(top / stock, None if name == common.STOCK else BAR)
        rows.append((name, f"{loaded:.0f}", f"{top:.0f}", f"{top / stock:.2f}x", *cells))
    columns = ("cache", "MiB before", "MiB peak", "of stock", "bar", "met")
    return common.table(f"Peak resident memory, prefill of {common.TOKENS} tokens", columns, rows)


def _measure(name: str) -> None:
    from resource import RUSAGE_SELF, getrusage

    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # ru_maxrss is in bytes there, in KiB elsewhere
    model = common.nano()
    ids, cache = common.prompt(model), common.cache_for(model, name)
    common.prefill(model, cache, ids[:, :16])  # what is loaded on first use
    loaded, cache = getrusage(RUSAGE_SELF).ru_maxrss, common.cache_for(model, name)
    common.prefill(model, cache, ids)
    print(loaded / unit, getrusage(RUSAGE_SELF).ru_maxrss / unit)


if __name__ == "__main__":
    _measure(sys.argv[1])

"""Time to prefill 8192 tokens on the bundled model under every recipe, against a stock cache."""

from __future__ import annotations

from statistics import median

from rich.table import Table

from benchmarks import _common as common

ROUNDS = 5
BAR, TWICE = 1.10, 2.0
SECOND_PASS = ("h2o", "mikv")  # scored by all attention, which a fused kernel does not give away


def run() -> Table:
    """Times the contenders in turns."""
    model = common.nano()
    ids = common.prompt(model)
    names = [common.STOCK, *common.RECIPES]
    jobs = {name: lambda name=name: common.prefill(model, common.cache_for(model, name), ids) for name in names}
    taken = common.alternate(jobs, ROUNDS, warm=1)
    rows = []
    for name in names:
        times = common.ratio(taken, name)
        bar = None if name == common.STOCK else TWICE if name in SECOND_PASS else BAR
        rows.append((name, f"{median(taken[name]):.2f}", f"{times:.2f}x", *common.verdict(times, bar)))
    return common.table(f"Prefill of {ids.shape[1]} tokens", ("cache", "seconds", "of stock", "bar", "met"), rows)

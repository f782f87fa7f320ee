"""Time of a decoded token behind 8192 cached ones, and the bytes of the cache."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from rich.table import Table
from transformers.cache_utils import Cache, DynamicCache

import kvloom
from benchmarks import _common as common

ROUNDS, STEPS = 9, 16
BARS = {"full": 1.10, "snapkv(budget=0.1)": 0.60}
NAMES = [
    *BARS, "streamingllm", "h2o", "kivi(bits=2)", "kivi(bits=4)", "snapkv(budget=0.1) | kivi",
]  # fmt: skip


def steps(name: str) -> tuple[Cache, Callable[[], None]]:
    """A cache that holds the prompt, and a job that decodes some tokens behind it, one by one."""
    model = common.random_llama()  # one each: a model's attention is registered for one kind of cache
    cache, ids = common.cache_for(model, name), common.prompt(model)
    common.prefill(model, cache, ids)

    @torch.inference_mode()
    def job() -> None:
        for at in range(STEPS):
            model(ids[:, at : at + 1], past_key_values=cache)

    return cache, job


def nbytes(cache: Cache) -> int:
    """Bytes of everything that the cache holds."""
    if isinstance(cache, kvloom.KVCache):
        return cache.nbytes
    assert isinstance(cache, DynamicCache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def run() -> Table:
    """Times the contenders in turns."""
    caches, jobs = {}, {}
    for name in (common.STOCK, *NAMES):
        caches[name], jobs[name] = steps(name)
    held = {name: nbytes(cache) / 2**20 for name, cache in caches.items()}
    taken = common.alternate(jobs, ROUNDS)
    rows = []
    for name in jobs:
        times = common.ratio(taken, name)
        rows.append((
            name, f"{1e3 * median(taken[name]) / STEPS:.2f}", f"{times:.2f}x", f"{held[name]:.2f}",
            *common.verdict(times, BARS.get(name)),
        ))  # fmt: skip
    columns = ("cache", "ms/token", "of stock", "MiB", "bar", "met")
    return common.table(f"Decoding behind {common.TOKENS} tokens", columns, rows)

"""Time of a decoded token behind a prompt, and the bytes of the cache: kvloom's caches against the stock ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvloom import KVCache
from kvloom.bench import models, show
from kvloom.bench.caches import BACKENDS, STOCK, LeftOut, cache_for, copied, nbytes, switch
from kvloom.bench.timing import Tell, alternate, ratio, silent

__all__ = ["LENGTHS", "RECIPES", "Decode", "Row", "lengths_of", "run", "steps"]

LENGTHS = (2048, 8192, 16384, 32768)
RECIPES = ("full", "snapkv(budget=0.1)", "kivi(bits=4)", "kivi(bits=2)", "h2o", "snapkv(budget=0.1) | kivi")
BARS = {"full": 1.10, "snapkv(budget=0.1)": 0.60}  # of DynamicCache, on the random Llama behind models.TOKENS
FAR = 16384  # tokens behind which no recipe that encodes may take longer than DynamicCache
WARM, STEPS = 1, 16  # rounds that do not count; tokens of a round


@dataclass(frozen=True)
class Row:
    """One cache behind one prompt. `ms` per token: median, fastest and slowest round; `ratio`: of DynamicCache's time, `full`: of
    the time of the recipe of that name, where it takes part."""

    model: str
    tokens: int
    cache: str
    ms: float
    fastest: float
    slowest: float
    ratio: float
    full: float | None
    mib: float
    bar: float | None
    met: bool | None


@dataclass(frozen=True)
class Decode:
    """All rows, and who could not take part, with the reason."""

    rows: list[Row]
    left_out: list[str]

    def table(self) -> Table:
        """A section for every model and prompt."""
        columns = ("model", "tokens", "cache", "ms/token", "spread", "of stock", "of full", "MiB", "bar", "met")
        cells = [
            (
                r.model, f"{r.tokens:,}", r.cache, f"{r.ms:.2f}", f"{r.fastest:.1f}-{r.slowest:.1f}",
                f"{r.ratio:.2f}x", "" if r.full is None else f"{r.full:.2f}x", f"{r.mib:.2f}", *show.verdict(r.ratio, r.bar),
            )
            for r in self.rows
        ]  # fmt: skip
        return show.table("Decoding behind a prompt", columns, cells, text=3, group=2)

    def notes(self) -> list[str]:
        """What the columns say, and who is missing."""
        meaning = f"of stock: time over {STOCK}'s; smaller is better. spread: fastest and slowest round"
        return [meaning, *(f"left out: {line}" for line in self.left_out)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


def lengths_of(model: PreTrainedModel, lengths: Sequence[int]) -> list[int]:
    """Those of the prompt lengths that the model has positions for."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return [n for n in lengths if most is None or n <= most]


def steps(lengths: int, recipes: int, against: int, rounds: int) -> int:
    """How often `run` tells of a step, unless somebody is left out."""
    return lengths * (1 + recipes + against) * (1 + WARM + rounds)


def run(
    name: str,
    model: PreTrainedModel,
    lengths: Sequence[int],
    recipes: Sequence[str],
    against: Sequence[str],
    rounds: int,
    tell: Tell = silent,
) -> Decode:
    """Behind every prompt, the caches decode in turns, `rounds` times some tokens each."""
    rows: list[Row] = []
    left_out: list[str] = []
    for n in lengths:
        caches, missing = _filled(model, n, recipes, against, n + STEPS * (WARM + rounds), tell)
        left_out += [line for line in missing if line not in left_out]
        held = {who: nbytes(cache) / 2**20 for who, cache in caches.items()}
        ids = models.prompt(model, STEPS, seed=2)
        jobs = {who: _job(model, cache, ids) for who, cache in caches.items()}
        taken = alternate(jobs, rounds, WARM, tell)
        for who in jobs:
            ms = [1e3 * seconds / STEPS for seconds in taken[who]]
            times, bar = ratio(taken, who, STOCK), _bar(name, n, caches[who], who)
            full = ratio(taken, who, "full") if "full" in taken else None
            met = show.met(times, bar)
            rows.append(Row(name, n, who, median(ms), min(ms), max(ms), times, full, held[who], bar, met))
    return Decode(rows, left_out)


def _bar(model: str, tokens: int, cache: Cache, name: str) -> float | None:
    if (model, tokens) == ("random", FAR) and isinstance(cache, KVCache):
        return None if all(kind.exact for kind in cache.recipe.kinds.values()) else 1.0
    return BARS.get(name) if (model, tokens) == ("random", models.TOKENS) else None


def _filled(
    model: PreTrainedModel, n: int, recipes: Sequence[str], against: Sequence[str], room: int, tell: Tell
) -> tuple[dict[str, Cache], list[str]]:
    """Caches by name that hold the same prompt of n tokens, and who is missing."""
    ids, caches, left_out = models.prompt(model, n), {}, []
    for recipe in (STOCK, *recipes):
        tell(f"{n:,} tokens, prefill, {recipe}")
        try:
            caches[recipe] = cache_for(model, recipe)
        except LeftOut as why:
            left_out.append(f"{recipe}: {why}")
            continue
        models.prefill(model, caches[recipe], ids)
    for other in against:
        tell(f"{n:,} tokens, filling {other}")
        try:
            with torch.inference_mode():
                caches[f"QuantizedCache({other})" if other in BACKENDS else other] = copied(
                    caches[STOCK], model, other, room
                )
        except LeftOut as why:
            left_out.append(f"{other}: {why}")
    return caches, left_out


def _job(model: PreTrainedModel, cache: Cache, ids: Tensor) -> Callable[[], None]:
    """Decodes the ids [1, m], one by one."""

    @torch.inference_mode()
    def job() -> None:
        switch(model, cache)
        for token in ids.split(1, dim=1):
            model(token, past_key_values=cache)

    return job

"""Time to the first token of a prompt that was read before: from the store's memory, from files, and computed again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

import kvloom
from kvloom.bench import models, show
from kvloom.bench.timing import Tell, alternate, ratio, silent
from kvloom.store import Session, Store
from kvloom.store.fingerprint import hashed

__all__ = ["BARS", "Reuse", "Row", "run", "steps"]

BARS = {"memory": 15.0, "files": 10.0}  # times faster than computing, for 4,096 tokens of nano under `full`
TOKENS, QUESTION = 4096, 16
WARM = 1
RECOMPUTE = "recompute"


@dataclass(frozen=True)
class Row:
    """`ms` to the first token, median; `faster`: times faster than computing the prompt with transformers' own cache."""

    source: str
    recipe: str
    tokens: int
    reused: int
    ms: float
    faster: float
    lookup_ms: float
    load_ms: float
    mib: float
    bar: float | None
    met: bool | None


@dataclass(frozen=True)
class Reuse:
    """All rows, and the rate at which weights are read for a model's identity, once."""

    model: str
    rows: list[Row]
    fingerprint_gb_s: float

    def table(self) -> Table:
        columns = ("from", "recipe", "tokens", "reused", "ms", "faster", "lookup", "load", "MiB", "bar", "met")
        cells = [
            (
                r.source, r.recipe, f"{r.tokens:,}", f"{r.reused:,}", f"{r.ms:.1f}", f"{r.faster:.1f}x",
                f"{r.lookup_ms:.1f}" if r.reused else "", f"{r.load_ms:.1f}" if r.reused else "",
                f"{r.mib:.1f}" if r.reused else "",
                "" if r.bar is None else f">= {r.bar:.0f}x", "" if r.met is None else "yes" if r.met else "NO",
            )
            for r in self.rows
        ]  # fmt: skip
        return show.table("Time to the first token of a prompt read before", columns, cells, text=2)

    def notes(self) -> list[str]:
        return [
            f"{self.model}; ms: prefill and the first token, greedy, by `generate`; faster: than {RECOMPUTE}, round by round; "
            "files are in the page cache",
            f"weights are read for the identity at {self.fingerprint_gb_s:.1f} GB/s, once per model",
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


def steps(recipes: int, rounds: int) -> int:
    """How often `run` tells of a step."""
    return (1 + 2 * recipes) * (WARM + rounds)


def run(name: str, tokens: int, recipes: list[str], rounds: int, tell: Tell = silent) -> Reuse:
    """A prompt of `tokens` tokens and a question that is new every time; contenders take turns."""
    model = models.load(name)
    document = models.prompt(model, tokens)
    turn = [0]

    def ids() -> torch.Tensor:
        turn[0] += 1
        return torch.cat([document, models.prompt(model, QUESTION, seed=100 + turn[0])], 1)

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvloom-bench-"))
        sessions: dict[str, Session] = {}
        for recipe in recipes:
            for source, url in (("memory", "memory://?max=8GiB"), ("files", f"file://{folder}?max=8GiB")):
                store = stack.enter_context(Store.open(url))
                sessions[f"{source}, {recipe}"] = store.attach(model, recipe=recipe).session()
        taken, reports = _timed(model, sessions, ids, rounds, tell)
    rows = [Row(RECOMPUTE, "", tokens + QUESTION, 0, 1e3 * median(taken[RECOMPUTE]), 1.0, 0, 0, 0, None, None)]
    for who, found in reports.items():
        source, _, recipe = who.partition(", ")
        faster = 1 / ratio(taken, who, RECOMPUTE)
        bar = BARS[source] if (name, tokens, recipe) == ("nano", TOKENS, "full") else None
        lookup, load = (1e3 * median(r.seconds[part] for r in found) for part in ("lookup", "load"))
        rows.append(
            Row(
                source, recipe, tokens + QUESTION, found[-1].hits, 1e3 * median(taken[who]), faster, lookup, load,
                found[-1].loaded_bytes / 2**20, bar, None if bar is None else faster >= bar,
            )
        )  # fmt: skip
    return Reuse(name, rows, _fingerprint_rate(model))


def _timed(
    model: PreTrainedModel, sessions: dict[str, Session], ids: Callable[[], torch.Tensor], rounds: int, tell: Tell
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    reports: dict[str, list[Any]] = {who: [] for who in sessions}
    first: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}

    def recompute() -> None:
        kvloom.detach(model)
        prompt = ids()
        cache = DynamicCache(config=model.config)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **first)

    def reuse(who: str) -> Callable[[], None]:
        def job() -> None:
            reports[who].append(sessions[who].generate(ids(), **first).report)

        return job

    for session in sessions.values():
        session.generate(ids(), **first)
    jobs = {RECOMPUTE: recompute, **{who: reuse(who) for who in sessions}}
    taken = alternate(jobs, rounds, WARM, tell)
    return taken, {who: found[WARM:] for who, found in reports.items()}


def _fingerprint_rate(model: PreTrainedModel) -> float:
    """GB/s of a fingerprint that is not known yet; the run on one token that goes with it is not part of it."""
    nbytes = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    taken = alternate({"hash": lambda: hashed(model)}, 5)["hash"]
    return nbytes / median(taken) / 1e9

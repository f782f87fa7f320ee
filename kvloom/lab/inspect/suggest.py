"""Families of methods, ranked by what the figures of this model promise: a first look, no benchmark.

One yardstick for all: which share of the cache could go while 95% stay, of the attention for methods that drop tokens, of
the energy (squares around the mean) for methods that store numbers in less. The choice is made with hindsight, so a method will do
somewhat worse, and 95% of one is not 95% of the other: `kvloom compare` says what a recipe really does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.core.registry import recipes
from kvloom.lab.inspect.figures import CODES, STACKS, Figures
from kvloom.lab.inspect.masses import windows

__all__ = ["Suggestion", "coded", "local_heads", "suggestions", "window_for"]

LOST = 0.05  # of attention or energy
LITTLE = 0.1  # a saving below this is told as paying little
SCALES = 1.0  # bits per number for scale and minimum: two 16-bit numbers for each 32 codes

# family -> recipes that belong to it, named where kvloom has them
FAMILIES: dict[str, tuple[str, ...]] = {
    "a window and the first tokens": ("streamingllm",),
    "drop what attention passes by": ("h2o", "snapkv", "scissorhands", "keyformer", "cake", "compresskv", "prefixkv"),
    "whole text in retrieval heads only": ("razorattention", "duoattention"),
    "fewer bits": (
        "kivi",
        "mikv",
        "kvquant",
        "gear",
        "zipcache",
        "kvtuner",
        "rotatekv",
        "million",
        "turboquant",
        "fireq",
        "olive",
        "xquant",
        "zipvl",
        "vidkv",
    ),
    "low rank within a layer": ("shadowkv", "matryoshkakv", "cskv"),
    "low rank across layers": ("xkv",),
    "one direction for two layers": ("minicache",),
    "merge neighbouring tokens": ("d2o", "kvmerger", "chelsea", "ems", "look-m"),
}


@dataclass(frozen=True)
class Suggestion:
    """`saving`: share of the cache, 0 to 1, by the yardstick above. `recipes`: those of the family that kvloom has."""

    family: str
    saving: float
    evidence: str
    recipes: tuple[str, ...]

    @property
    def pays(self) -> bool:
        return self.saving >= LITTLE

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"pays": self.pays}


def suggestions(found: Figures) -> list[Suggestion]:
    """All families that the figures can judge, the largest saving first. Only layers that see the whole text count."""
    if not found.wide:
        return []
    known = {_plain(name): name for name in recipes()}
    judged = [_window(found), _drop(found), _heads(found), _bits(found), *_ranks(found), *_layers(found), _merge(found)]
    made = [
        Suggestion(family, max(0.0, saving), evidence, tuple(known[name] for name in FAMILIES[family] if name in known))
        for family, saving, evidence in (x for x in judged if x is not None)
    ]
    return sorted(made, key=lambda s: -s.saving)


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


Judged = tuple[str, float, str] | None


def window_for(found: Figures, share: float = 1 - LOST) -> int | None:
    """The smallest watched window that, with the first 4 tokens, holds this share of attention on average over heads."""
    for window in windows(found.tokens):
        if float(found.flat(f"last {window} and first 4", found.wide).mean()) >= share:
            return window
    return None


def _window(found: Figures) -> Judged:
    window = window_for(found)
    if window is None:
        most = windows(found.tokens)[-1]
        held = float(found.flat(f"last {most} and first 4", found.wide).mean())
        return (
            "a window and the first tokens", 0.0,
            f"even the newest {most:,} of {found.tokens:,} tokens and the first 4 hold only {held:.0%} of attention",
        )  # fmt: skip
    return (
        "a window and the first tokens", 1 - (window + 4) / found.tokens,
        f"the newest {window:,} tokens and the first 4 hold {1 - LOST:.0%} of attention or more, on average over heads",
    )  # fmt: skip


def _drop(found: Figures) -> Judged:
    table = [
        found.tables["holders of 95%"][i].nan_to_num(0.0) for i in found.wide
    ]  # nothing old is looked at: none needed
    share = float(torch.cat(table).mean())
    return (
        "drop what attention passes by", 1 - share,
        f"{share:.0%} of the older half's tokens receive 95% of the attention that reaches it, on average over KV heads",
    )  # fmt: skip


def local_heads(found: Figures) -> tuple[Tensor, int]:
    """Which KV heads of the wide layers need only a window of at most T / 8 and the first 4 tokens: [heads], the window."""
    window = max((w for w in windows(found.tokens) if w <= found.tokens // 8), default=windows(found.tokens)[0])
    flags = []
    for i in found.wide:
        held = found.tables[f"last {window} and first 4"][i].unflatten(0, (found.kv_heads[i], -1))
        flags.append(held.amin(-1) >= 1 - LOST)
    return torch.cat(flags), window


def _heads(found: Figures) -> Judged:
    local, window = local_heads(found)
    count = int(local.sum())
    return (
        "whole text in retrieval heads only", count / len(local) * (1 - (window + 4) / found.tokens),
        f"{count} of {len(local)} KV heads put 95% of attention on the newest {window:,} and the first 4 tokens",
    )  # fmt: skip


def coded(found: Figures, kind: str) -> tuple[int | None, str]:
    """The fewest bits that lose at most 5% of this plane's energy, and the direction of grouping that loses least."""
    for bits in CODES:
        lost = {a: found.flat(f"{kind} in {bits} bits along {a}", found.wide) for a in ("tokens", "channels")}
        means = {a: float(x.mean()) for a, x in lost.items() if len(x)}
        if means and min(means.values()) <= LOST:
            return bits, min(means, key=lambda a: means[a])
    return None, ""


def _bits(found: Figures) -> Judged:
    best = {kind: coded(found, kind) for kind in ("keys", "values")}
    if any(bits is None for bits, _ in best.values()):
        return None
    total = sum(bits + SCALES for bits, _ in best.values() if bits is not None)
    by = {"tokens": "by channel", "channels": "by token"}
    told = " and ".join(f"{kind} in {bits} bits {by[along]}" for kind, (bits, along) in best.items())
    return "fewer bits", 1 - total / 32, f"{told} lose at most {LOST:.0%} of their energy (against 16-bit numbers)"


def _share(ranks: Tensor, tokens: int, dims: int) -> float:
    """Share of the numbers that a low-rank form takes, its basis included; 1 where it does not pay. ranks: shares of dims."""
    return min(1.0, float(ranks.mean()) * (1 + dims / tokens))


def _keys(found: Figures, name: str) -> str:
    """The table for keys before rotation where there is one, else as cached: rotation raises the rank."""
    return f"{name}, keys before rotation" if len(found.flat(f"{name}, keys before rotation")) else f"{name}, keys"


def _ranks(found: Figures) -> Iterator[Judged]:
    at = found.wide[0]
    (dk, dv), heads = found.dims[at], found.kv_heads[at]
    planes, shares = [], []
    for kind, dim in ((_keys(found, "rank").removeprefix("rank, "), dk), ("values", dv)):
        alone, together = (found.flat(f"{name}, {kind}", found.wide) for name in ("rank", "rank of all heads"))
        planes.append(min(_share(alone, found.tokens, dim), _share(together, found.tokens, heads * dim)))
        shares += [float(alone.mean()), float(together.mean())]
    told = (
        f"95% of energy needs {shares[0]:.0%} of a head's dimensions for keys ({shares[1]:.0%} with the heads of a layer "
        f"together) and {shares[2]:.0%} for values ({shares[3]:.0%})"
    )
    yield "low rank within a layer", 1 - sum(planes) / 2, told
    options = []
    for count in STACKS:
        names = (_keys(found, f"rank of {count} layers"), f"rank of {count} layers, values")
        if all(len(found.flat(name)) for name in names):
            planes = [_share(found.flat(n), found.tokens, count * heads * d) for n, d in zip(names, (dk, dv))]
            raw = [float(found.flat(name).mean()) for name in names]
            options.append((1 - sum(planes) / 2, count, raw))
    if options:
        saving, count, raw = max(options)
        yield (
            "low rank across layers", saving,
            f"{count} layers stacked need {raw[0]:.0%} of their dimensions for 95% of the keys' energy, "
            f"{raw[1]:.0%} for the values'",
        )  # fmt: skip


def _layers(found: Figures) -> Iterator[Judged]:
    if found.pairs:
        alike = [float(found.flat(f"alike layers, {kind}").mean()) for kind in ("keys", "values")]
        angle = [float(found.flat(f"angle, {kind}").mean()) for kind in ("keys", "values")]
        yield (
            "one direction for two layers", sum(alike) / 4,
            f"{alike[0]:.0%} of keys and {alike[1]:.0%} of values are alike in neighbouring layers (cosine 0.9 or more; mean "
            f"angle {angle[0]:.2f} and {angle[1]:.2f} of a half turn)",
        )  # fmt: skip


def _merge(found: Figures) -> Judged:
    alike = [found.flat(f"alike neighbours, {kind}", found.wide) for kind in ("keys", "values")]
    means = [float(x.mean()) for x in alike]
    return (
        "merge neighbouring tokens", min(means) / 2,
        f"{means[0]:.0%} of neighbouring tokens' keys are alike (cosine 0.9 or more), and {means[1]:.0%} of their values",
    )  # fmt: skip

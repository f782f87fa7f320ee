"""What looks at several layers at once: scores of layers that settle together, budgets that layers share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom.core.codec import Plane
from kvloom.core.group import Table
from kvloom.core.recipe import Budget, Recipe
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.segments.slerp import angle

__all__ = ["Apart", "Cascade", "FromPlace", "FromPrompt", "Looked", "MeanAndVariance", "Newest", "Prefixes"]

BLOCK = 1024  # slots at a time, where a scorer makes something of their size


@dataclass(frozen=True)
class Apart:
    """How far apart two layers that settle together point: the angle between their vectors, in units of pi.

    Averaged over keys, values and heads, so that both layers and all heads keep the same slots (MiniCache, arXiv
    2405.14366). Looks at no query.
    """

    queries = 0
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        pair, found = (step.mates[0].group.segments, step.mates[-1].group.segments), []
        for name, segment in table.parts:
            for start in range(0, segment.n, BLOCK):
                stop = min(start + BLOCK, segment.n)
                planes: tuple[Plane, Plane] = ("key", "value")
                both = [[getattr(layer[name], which).dense(start, stop) for layer in pair] for which in planes]
                keys, values = (angle(a, b) for a, b in both)
                found.append((keys + values).mean(0) / 2)
        return torch.cat(found).expand(step.heads, -1)


def smoothed(x: Tensor, table: Table, first: int, kernel: int) -> Tensor:
    """Scores [h, g, n] averaged over `kernel` neighbours in the text and a KV head's queries, [h, n]; 0 from place `first` on."""
    index = table.index
    flat = x.masked_fill((index >= first)[:, None], 0.0).flatten(0, 1)[:, None]
    order = index.argsort(-1).repeat_interleave(len(flat) // len(index), 0)[:, None]
    pooled = F.avg_pool1d(flat.gather(-1, order), kernel, 1, kernel // 2)
    return torch.empty_like(flat).scatter_(-1, order, pooled).view(x.shape).mean(1)


@dataclass(frozen=True)
class MeanAndVariance:
    """Attention of the newest `queries` tokens: its mean, and `gamma` times its variance over them (CAKE, arXiv 2503.12491).

    Notes how widely they look, and how differently, in the state "preference" [h, 2]: the entropy, and the variance over the
    queries, of attention outside the window, both summed over a KV head's queries.
    """

    queries: int
    gamma: float
    kernel: int = 5
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        a, first = step.looks(table, self.queries), step.length - self.queries
        outside = (table.index < first)[:, None]
        entropy = -(a * (a + 1e-10).log()).sum(2) * outside
        variance = a.var(2) if a.shape[2] > 1 else torch.zeros_like(entropy)
        both = [x.sum((1, 2)).expand(step.heads) for x in (entropy, variance * outside)]
        step.group.state["preference"] = torch.stack(both, 1)
        return smoothed(a.mean(2) + self.gamma * variance, table, first, self.kernel)


@dataclass(frozen=True)
class Newest:
    """Attention of the newest token, averaged over neighbours and a KV head's queries; 0 for the `window` newest slots."""

    window: int
    kernel: int = 5
    queries = 1
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        return smoothed(step.window(table, 1), table, step.length - self.window, self.kernel)


@dataclass(frozen=True)
class Cascade:
    """Layers that look widely and change often keep more (CAKE): shares of entropy^(1/tau1) * variance^(1/tau2).

    Asked after every layer, of those seen so far, with the whole budget: each keeps less as others follow. The `window` is
    every layer's. No layer gets more than it holds; what that leaves goes to the others equally.
    """

    window: int
    tau1: float = 1.0
    tau2: float = 1.0
    early = True

    def __call__(self, steps: list[list[Step]], budget: int, layers: int) -> list[int]:
        wishes = []
        for each in steps:
            entropy, variance = torch.cat([step.group.state["preference"] for step in each]).double().sum(0).tolist()
            wishes.append(max(entropy, 0.0) ** (1 / self.tau1) * variance ** (1 / self.tau2))
        most = [each[0].group.segments["main"].n - self.window for each in steps]
        shares = dealt(wishes, most, (budget - self.window) * layers)
        for each, share in zip(steps, shares, strict=True):
            for step in each:
                note(step, "size", share + self.window)
                if len(steps) == layers:
                    step.group.state.pop("preference", None)
        return [share + self.window for share in shares]


@dataclass(frozen=True)
class Prefixes:
    """In every layer the best slots up to one share of its importance, the same in all (PrefixKV, arXiv 2412.03409).

    That share is found by bisection, so that the layers hold `budget` on average; what rounding leaves is dealt in
    proportion to what they give up. `extra`: slots that each keeps besides.
    """

    extra: int
    early = False

    def __call__(self, steps: list[list[Step]], budget: int, layers: int) -> list[int]:
        masses = [Table(each[0].group, ("main",), each[0].q.device).column("score", each[0].heads)[0] for each in steps]
        curves = [x.double().clamp_min(0).sort(descending=True).values.cumsum(0) for x in masses]
        held = [len(x) for x in curves]
        away, low, high = sum(held) - budget * layers, 0.0, 1.0

        def gone(share: float) -> list[int]:
            firsts = [int((x < share * x[-1]).sum()) for x in curves]
            return [max(0, n - (first + 1) - self.extra) for n, first in zip(held, firsts, strict=True)]

        for _ in range(50):
            share = (low + high) / 2
            low, high = (share, high) if sum(gone(share)) > away else (low, share)
        lost = dealt([float(x) for x in gone(high)], [n - self.extra - 1 for n in held], max(0, away))
        for each, n, less in zip(steps, held, lost, strict=True):
            for step in each:
                note(step, "size", n - less)
                note(step, "share", (n - less) / step.length)
        return [n - less for n, less in zip(held, lost, strict=True)]


def note(step: Step, name: str, value: float) -> None:
    """Remembers a number of the layer, for every head of the group."""
    step.group.state[name] = torch.full((step.heads,), value, dtype=torch.float32, device=step.q.device)


def dealt(wishes: list[float], most: list[int], total: int) -> list[int]:
    """`total` dealt in proportion to wishes, rounded down, nobody more than `most`; the rest one by one, evenly."""
    whole = sum(wishes)
    shares = [total / len(wishes) if whole <= 0 else total * wish / whole for wish in wishes]
    given = [min(max(0, int(share)), limit) for share, limit in zip(shares, most, strict=True)]
    while (rest := total - sum(given)) > 0:
        free = [i for i, n in enumerate(given) if n < most[i]]
        if not free:
            break
        each = rest // len(free)
        for at, i in enumerate(free):
            given[i] += min(each + (at < rest % len(free)), most[i] - given[i])
    return given


@dataclass(frozen=True)
class FromPrompt:
    """While decoding, what a layer was given after the prompt: so many slots ("size"), or that "share" of the text.

    `short`: the budget where the prompt was short enough to stay whole.
    """

    name: Literal["size", "share"]
    short: Budget | None = None

    def bind(self, recipe: Recipe, sites: list[Site]) -> FromPrompt:
        return self if self.short is None else replace(self, short=self.short.bind(recipe, sites))

    def __call__(self, step: Step) -> int | None:
        held = step.group.state.get(self.name)
        if held is None:
            return None if self.short is None else self.short(step)
        return int(held[0]) if self.name == "size" else ceil(float(held[0]) * step.length - 1e-3)


@dataclass(frozen=True)
class FromPlace:
    """How far a slot stands from the one that leaves: `before` slots ahead of the end of what was kept of the prompt.

    In the middle of all, where that would be in front of the second (PrefixKV).
    """

    before: int
    queries = 0
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        target = int(step.group.state["size"][0]) - self.before
        rank = table.index.argsort(-1).argsort(-1)
        return (rank - (target if target >= 1 else table.n // 2)).abs().float().expand(step.heads, -1)


@dataclass(frozen=True)
class Looked:
    """All attention of this forward that a slot received, averaged over all heads of the layer: one score for all of them."""

    queries = -1
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        return step.mass(table).mean((0, 1)).expand(step.heads, -1)

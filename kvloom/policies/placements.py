"""Where slots go once they are ranked: stay, another class, or out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.codec import Scope
from kvloom.core.group import Table
from kvloom.core.recipe import DROP, Away
from kvloom.core.step import Step
from kvloom.policies.scorers import Probes

__all__ = ["ByMass", "Grade", "Keep"]


@dataclass(frozen=True)
class Keep:
    """Keeps the first `sinks`, the `newest`, and the best-scored others up to the budget; sends the rest to a class.

    `newest`: a number of tokens, or a share of the budget (float). Without scores the newest tokens are kept. `to`: the class
    that takes the rest; None drops it. `sinks_to`: the class that takes the sinks, for good. Slots that are encoded in units leave as whole units, lowest mean score first; a
    remainder smaller than a unit waits.
    """

    newest: int | float = 0
    sinks: int = 0
    to: str | None = None
    sinks_to: str | None = None
    scope: Scope = "head"

    @property
    def moves(self) -> tuple[str, ...]:
        return tuple(name for name in (self.to, self.sinks_to) if name is not None)

    @property
    def least(self) -> int:
        return self.sinks + (self.newest if isinstance(self.newest, int) else 0)

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor | Away | int:
        if scores is None and self.to is None and table.front is not None and table.front >= self.sinks:
            return max(0, table.n - budget)
        plain = type(self).route is Keep.route and self.sinks_to is None
        if plain and scores is not None and table.n > budget and table.rectangle:
            scores, over = self._scored(step, table.index, scores, budget), table.n - budget
            if over == 1:
                return Away(scores.argmin(-1, keepdim=True), self._target(step))
            return Away(scores.topk(over, -1, largest=False).indices.sort(-1).values, self._target(step))
        return self.route(step, table, scores, budget)

    def _target(self, step: Step) -> int:
        return DROP if self.to is None else step.classes.index(self.to)

    def _scored(self, step: Step, index: Tensor, scores: Tensor | None, budget: int) -> Tensor:
        """Scores [h, n], infinite where a slot has to stay."""
        if scores is None:
            scores = index.float()
            newest = budget - int((index[0] < self.sinks).sum())
        else:
            newest = int(self.newest * budget) if isinstance(self.newest, float) else min(self.newest, budget)
        stays = index >= step.length - newest
        return scores.masked_fill(stays | (index < self.sinks) if self.sinks else stays, torch.inf)

    def route(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor:
        """The class of every slot."""
        index = table.index
        own = torch.cat([index.new_full((s.n,), step.classes.index(name)) for name, s in table.parts]).long()
        scores = self._scored(step, index, scores, budget)
        route = own.expand(len(scores), -1)
        if self.sinks_to is not None:
            free = torch.ones_like(own, dtype=torch.bool)
            for start, stop, _ in table.units():
                free[start:stop] = False  # a slot inside a unit can't move alone
            route = torch.where((index < self.sinks) & free, step.classes.index(self.sinks_to), route)
        if table.n > budget:
            route = torch.where(self._away(scores, table, table.n - budget), self._target(step), route)
        return route

    def _away(self, scores: Tensor, table: Table, over: int) -> Tensor:
        """bool [h, n]: the `over` slots of lowest score, those of a unit only together."""
        units = table.units()
        if not units:
            lowest = scores.topk(over, -1, largest=False).indices
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)
        # Items are units (their mean score, their size) and single slots; the cheapest leave while they fit.
        owner, sizes = _items(table, units)
        count = len(sizes)
        mean = scores.new_zeros(len(scores), count).index_add_(1, owner, scores) / sizes
        order = mean.argsort(-1)
        spent = sizes[order].cumsum(-1)
        fits = (spent <= over) & mean.gather(1, order).isfinite()
        rest = over - torch.where(fits, sizes[order], 0).sum(-1)
        gone = torch.zeros(mean.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, fits)
        # What is left over goes one by one, where single slots remain.
        single = (sizes == 1) & ~gone & mean.isfinite()
        ranked = torch.where(single, mean, torch.inf).argsort(-1)
        first = torch.arange(count, device=scores.device) < torch.minimum(rest, single.sum(-1))[:, None]
        gone |= torch.zeros_like(gone).scatter_(1, ranked, first)
        return gone[:, owner]


@dataclass(frozen=True)
class ByMass:
    """Every slot leaves for one of two classes, (better, worse): as many for the better one as it takes to hold the share `mass`
    of all attention, if they are taken by what they receive, and those of the highest mean, over all heads of a layer
    (ZipVL, arXiv 2410.08584). `score` is the policy's own. The newest `window` slots are among them in any case. Without a worse
    class (None) the others are dropped.

    Both take multiples of `unit` slots, the better one rounded up; the newest that are left over stay.
    """

    mass: float
    score: Probes
    to: tuple[str, str | None]
    unit: int
    window: int = 0
    scope: Scope = "layer"
    least: int = 0

    @property
    def moves(self) -> tuple[str, ...]:
        return tuple(name for name in self.to if name is not None)

    def count(self, received: Tensor) -> int:
        """How many of the largest numbers of [n] hold the share of their sum."""
        if self.mass >= 1:
            return int((received > 0).sum())
        held = received.sort(descending=True).values.double().cumsum(-1)
        return min(len(received), int((held < self.mass * held[-1]).sum()) + 1)

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor:
        assert scores is not None
        n = table.n
        many = self.count((scores * self.score.seen(step, table)).sum(0))
        many = min(-(-max(many, min(self.window, n)) // self.unit), n // self.unit) * self.unit
        few = (n - many) // self.unit * self.unit
        index = table.index[0]
        score = scores.sum(0).masked_fill(index >= step.length - self.window, torch.inf)
        newest = index.argsort()[few + many :]
        best = score.scatter(0, newest, -torch.inf).topk(many).indices
        better, worse = (DROP if name is None else step.classes.index(name) for name in self.to)
        route = torch.full_like(score, worse, dtype=torch.long)
        route[best] = better
        route[newest] = step.classes.index(table.parts[0][0])
        return route[None]


@dataclass(frozen=True)
class Grade:
    """Every slot leaves for one of two classes, (better, worse): the share `worse` of lowest score for the worse one.

    Both take multiples of `unit` slots, `most` in all; the newest slots that are left over stay, and are ranked again later.
    """

    worse: float
    to: tuple[str, str]
    unit: int = 1
    most: int | None = None
    scope: Scope = "head"
    least: int = 0

    @property
    def moves(self) -> tuple[str, ...]:
        return self.to

    def sizes(self, n: int) -> tuple[int, int]:
        """How many of n slots go to the worse class, and how many to the better one."""
        n = n if self.most is None else min(n, self.most)
        few = int(self.worse * n + 1e-9) // self.unit * self.unit
        return few, (n - few) // self.unit * self.unit

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor:
        assert scores is not None
        few, many = self.sizes(table.n)
        newest = table.index.argsort(-1)[:, few + many :].expand(len(scores), -1)
        lowest = scores.scatter(1, newest, torch.inf).topk(few, -1, largest=False).indices
        better, worse = (step.classes.index(name) for name in self.to)
        route = torch.full_like(scores, better, dtype=torch.long).scatter_(1, lowest, worse)
        return route.scatter_(1, newest, step.classes.index(table.parts[0][0]))


def _items(table: Table, units: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """(item that each slot belongs to [n], slots of each item)."""
    starts = torch.ones(table.n, dtype=torch.long, device=table.device)
    for start, stop, unit in units:
        place = torch.arange(stop - start, device=table.device)
        starts[start:stop] = (place % unit == 0).long()
    owner = starts.cumsum(0) - 1
    return owner, torch.bincount(owner)

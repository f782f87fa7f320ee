"""Heads with roles: some keep the whole text, the others both ends; or some get more slots than the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.group import Group, Table
from kvloom.core.recipe import Away
from kvloom.core.segment import Segment
from kvloom.core.step import Step
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep

__all__ = ["Heads", "Local", "LocalTokens", "Semantic", "Uneven", "of_group"]

Heads = tuple[tuple[bool, ...], ...]  # a flag for every KV head of every layer


def of_group(heads: Heads, layer: int, group: Group) -> Tensor:
    """The flags of a group's heads, bool [h]."""
    flags = torch.tensor(heads[layer])
    return flags if group.heads is None else flags[group.heads.cpu()]


@dataclass(frozen=True)
class LocalTokens(Tokens):
    """The budget of local heads, less the sinks that lie apart; None where all heads of the group keep the whole text."""

    whole: Heads = ()

    def __call__(self, step: Step) -> int | None:
        if bool(of_group(self.whole, step.site.layer, step.group).all()):
            return None
        total, apart = super().__call__(step), step.group.segments.get("sinks")
        return total if total is None or apart is None else total - apart.n


@dataclass(frozen=True)
class Local(Keep):
    """`Keep` in local heads; the others keep the whole text."""

    whole: Heads = ()

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor | Away | int:
        if bool(of_group(self.whole, step.site.layer, step.group).any()):
            return self.route(step, table, scores, budget)
        return super().__call__(step, table, scores, budget)

    def route(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor:
        route = super().route(step, table, scores, budget).expand(step.heads, -1).clone()
        keeps = of_group(self.whole, step.site.layer, step.group).to(route.device)
        route[keeps] = step.classes.index("main")
        return route


@dataclass(frozen=True)
class Uneven:
    """Heads that are flagged get `high` times the layer's mean, and the others what is left (UNComp, arXiv 2410.03090)."""

    flagged: Heads
    high: float

    def __call__(self, steps: list[Step], tables: list[Table], scores: list[Tensor], budget: int) -> list[Tensor]:
        flags = [of_group(self.flagged, step.site.layer, step.group).to(step.q.device) for step in steps]
        count, total = sum(int(x.sum()) for x in flags), sum(len(x) for x in flags)
        if count in (0, total):
            return [torch.full((len(x),), budget, device=x.device) for x in flags]
        high = int(self.high * budget)
        low = (budget * total - high * count) // (total - count)
        return [torch.where(x, high, low) for x in flags]


@dataclass(frozen=True)
class Semantic:
    """Heads whose view of the text is far from that of the others keep all they hold (Task-KV, arXiv 2501.15113).

    A head's view is its `top` best-scored values, weighted by their scores; far is the Euclidean distance to the mean of all
    views. From `beta` of n heads in the first layer their number falls evenly to `least` in the last. `near`: also so
    many heads nearest to the mean, while one head is left. The others share what is left of the layer's budget; where that
    is less than `ends` slots each, fewer heads keep all.
    """

    beta: float
    least: int
    top: int
    near: int
    ends: int

    def heads(self, layer: int, layers: int, n: int) -> int:
        """How many of n heads are far, of a layer among so many."""
        first = max(n * self.beta, self.least)
        return max(1, min(n - 1, round(first - (first - self.least) * layer / max(1, layers - 1))))

    def __call__(self, steps: list[Step], tables: list[Table], scores: list[Tensor], budget: int) -> list[Tensor]:
        views = torch.cat([self._view(t, s) for t, s in zip(tables, scores, strict=True)])
        held = torch.cat([s.new_full((len(s),), t.n) for t, s in zip(tables, scores, strict=True)]).long()
        n, site = len(views), steps[0].site
        if n == 1:
            return [torch.full((1,), budget, device=views.device)]
        distance = (views - views.mean(0)).norm(dim=-1)
        if n == 2:
            distance = torch.zeros_like(distance)  # they are equal, and rounding should not choose
        order = distance.argsort(descending=True, stable=True)
        far = self.heads(site.layer, site.layers, n)
        near = min(self.near, n - far - 1)
        order = torch.cat([order[:far], order[n - near :].flip(0), order[far : n - near]])
        left = budget * n - held[order].cumsum(0)
        local = n - 1 - torch.arange(n, device=left.device)  # heads that are local if those up to here are not
        fits = (left >= local * self.ends) & (torch.arange(n, device=left.device) < far + near)
        count = int(fits.cumprod(0).sum())
        rest = budget * n - int(held[order[:count]].sum())
        shares = held.clone()
        each, over = divmod(rest, n - count)
        shares[order[count:]] = each
        shares[order[count : count + over]] += 1
        return list(shares.split([len(s) for s in scores]))

    def _view(self, table: Table, scores: Tensor) -> Tensor:
        """[h, Dv] fp32."""
        best, at = scores.topk(min(self.top, table.n), -1)
        return (best[:, None] @ _values([segment for _, segment in table.parts], at))[:, 0]


def _values(segments: list[Segment], at: Tensor) -> Tensor:
    """Values of the slots at [h, k] of some classes side by side, decoded, fp32."""
    assert len(segments) == 1
    return segments[0].value.rows(at).float()

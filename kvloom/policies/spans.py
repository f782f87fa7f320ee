"""Whole windows of the text stay or leave together, and neighbouring layers share one choice (WindowKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom.core.group import Table
from kvloom.core.recipe import Away
from kvloom.core.step import Step
from kvloom.policies.budgets import Pyramid
from kvloom.policies.placements import Keep

__all__ = ["Negative", "Spans", "Stairs"]


@dataclass(frozen=True)
class Spans:
    """Attention of the newest `queries` tokens, by windows of `width` slots in text order: below zero for those that leave.

    A window's score is the mean over heads of the mean of its slots ("average") or of its `width` // 2 best ("max"). As
    many windows leave as bring the slots before the newest down to the budget. The first of `shared` layers chooses, the
    others take over its choice without looking at attention. All heads of a layer keep the same (arXiv 2503.17922).
    """

    queries: int
    width: int
    reduce: Literal["max", "average"]
    shared: int
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        index = table.index[:1]
        budget = table.n if step.budget is None else step.budget
        done = step.carry.get("spans")
        if done is None or done[0] != step.length or done[1] == self.shared:
            done = (step.length, 0, self._chosen(step, table, index[0], budget))
        if done[1] + 1 < self.shared:
            step.carry["spans"] = (step.length, done[1] + 1, done[2])
        else:
            step.carry.pop("spans", None)
        stays = torch.isin(index, done[2]) | (index >= step.length - self.queries)
        return torch.where(stays, 1.0, -1.0).expand(step.heads, -1)

    def _chosen(self, step: Step, table: Table, index: Tensor, budget: int) -> Tensor:
        """Places in the text of the slots that stay, besides the newest."""
        order = index.argsort()[: int((index < step.length - self.queries).sum())]
        old, free = len(order), budget - min(self.queries, table.n)
        count, away = -(-old // self.width), -(-(old - free) // self.width)
        if away * self.width >= old:
            return index[:0]
        mass = step.window(table, self.queries).flatten(0, 1)[:, order]
        cells = F.pad(mass, (0, count * self.width - old), value=-torch.inf).unflatten(1, (count, self.width))
        if self.reduce == "max":
            cells = cells.topk(max(1, self.width // 2), -1).values
        real = cells.isfinite()
        score = (cells.masked_fill(~real, 0.0).sum(-1) / real.sum(-1)).mean(0)
        gone = score.argsort(stable=True)[:away]
        stays = torch.ones(count, dtype=torch.bool, device=index.device)
        stays[gone] = False
        return index[order[stays.repeat_interleave(self.width)[:old]]]


@dataclass(frozen=True)
class Negative(Keep):
    """Slots of negative score leave, however many they are."""

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor | Away | int:
        assert scores is not None
        return self.route(step, table, scores, table.n - int((scores[0] < 0).sum()))


@dataclass(frozen=True)
class Stairs(Pyramid):
    """`Pyramid` by groups of `shared` layers; the last group's share of the mean is shared / beta (WindowKV)."""

    shared: int = 8

    def _share(self, size: int, layer: int, prompt: int) -> int:
        mean, groups = size - self.window, -(-len(self.order) // self.shared)
        if groups < 2:
            return size
        last = min(mean, mean * self.shared // self.beta)
        step = (2 * mean - 2 * last) // (groups - 1)
        return 2 * mean - last - self.order.index(layer) // self.shared * step + self.window

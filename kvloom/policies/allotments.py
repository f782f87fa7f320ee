"""How the budget of a layer is divided among its heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.group import Table
from kvloom.core.step import Step

__all__ = ["Adaptive"]


@dataclass(frozen=True)
class Adaptive:
    """Heads whose scores are among the best of the whole layer get more (AdaKV, arXiv 2407.11550).

    Of the slots outside the `window`, which every head keeps, as many as the layer may hold are chosen over all heads
    together; a head's count of them, shrunk towards the share of `floor` that each is sure of, is its budget.
    """

    floor: float
    window: int

    def __call__(self, steps: list[Step], tables: list[Table], scores: list[Tensor], budget: int) -> list[Tensor]:
        free, sizes = budget - self.window, [len(x) for x in scores]
        pool, owner, first = [], [], 0
        for step, table, x in zip(steps, tables, scores, strict=True):
            outside = (table.index < step.length - self.window).expand_as(x)
            head = torch.arange(first, first + len(x), device=x.device)[:, None].expand_as(x)
            pool.append(x[outside])
            owner.append(head[outside])
            first += len(x)
        flat, heads = torch.cat(pool), torch.cat(owner)
        best = flat.topk(min(free * first, len(flat))).indices
        counts = torch.bincount(heads[best], minlength=first)
        exact = counts.double() * (1 - self.floor) + int(free * self.floor)
        shares = exact.long()
        # whole slots that rounding down left over go where most was cut off, so that the layer holds just its budget
        over = free * first - int(shares.sum())
        shares += over // first
        shares[(exact - exact.floor()).sort(descending=True, stable=True).indices[: over % first]] += 1
        return list((shares + self.window).split(sizes))

"""How important each slot is, from the attention it receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom.core.group import Table
from kvloom.core.step import Step

__all__ = ["Accumulated", "Window"]


@dataclass(frozen=True)
class Window:
    """Attention of the newest `queries` tokens, summed, smoothed over neighbours, averaged over a KV head's queries.

    The observation window of SnapKV (arXiv 2404.14469). Slots of the window itself score 0: a placement keeps them.
    """

    queries: int
    kernel: int
    pool: Literal["max", "avg"]
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        mass = step.window(table, self.queries)
        index = table.index
        inside = (index >= step.length - self.queries)[:, None]
        mass = mass.masked_fill(inside, 0.0).flatten(0, 1)[:, None]
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d
        # Neighbours are neighbours in the text; slots may have changed places since.
        order = index.argsort(-1).repeat_interleave(len(mass) // len(index), 0)[:, None]
        pooled: Tensor = pool(mass.gather(-1, order), self.kernel, 1, self.kernel // 2)
        pooled = torch.empty_like(mass).scatter_(-1, order, pooled)
        return pooled.reshape(step.heads, -1, table.n).mean(1)


@dataclass(frozen=True)
class Accumulated:
    """All attention that a slot has received since it entered, summed over a KV head's queries (H2O, arXiv 2306.14048)."""

    queries = -1
    columns = 1

    def __call__(self, step: Step, table: Table) -> Tensor:
        total: Tensor = table.column("mass", step.heads) + step.mass(table).sum(1)
        table.store("mass", total)
        return torch.Tensor.contiguous(total)

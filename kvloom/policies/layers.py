"""What looks at several layers at once: scores of layers that settle together, budgets that layers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.codec import Plane
from kvloom.core.group import Table
from kvloom.core.step import Step
from kvloom.segments.slerp import angle

__all__ = ["Apart"]

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

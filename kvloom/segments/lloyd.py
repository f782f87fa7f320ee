"""The best few numbers to stand for many: Lloyd's iteration in one dimension, on a histogram."""

import torch
from torch import Tensor

__all__ = ["lloyd"]


def lloyd(x: Tensor, mass: Tensor, count: int, rounds: int) -> Tensor:
    """`count` ascending numbers with least squared distance to cells x [cells], ascending, of weight mass [cells]. float64.

    Starts at equally likely numbers and stops when nothing moves. A number that is nearest to nothing stays where it is.
    """
    mass = mass / mass.sum()
    total, moment = (torch.cat([y.new_zeros(1), y.cumsum(0)]) for y in (mass, mass * x))
    wanted = (torch.arange(count, dtype=x.dtype) + 0.5) / count
    found = x[torch.searchsorted(total[1:], wanted).clamp_max(len(x) - 1)]
    for _ in range(rounds):
        edges = torch.searchsorted(x, (found[1:] + found[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(x))])
        weight = total[edges[1:]] - total[edges[:-1]]
        moved = torch.where(weight > 0, (moment[edges[1:]] - moment[edges[:-1]]) / weight.clamp_min(1e-300), found)
        if torch.equal(moved, found):
            break
        found = moved
    return found

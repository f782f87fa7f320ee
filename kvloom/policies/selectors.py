"""Which slots a decoded token reads, by bounds of the keys of each unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.site import Site
from kvloom.errors import RecipeError

__all__ = ["Bounds"]


@dataclass(frozen=True)
class Bounds:
    """Two levels of clusters of keys, ranked by a mix of their channels' largest and smallest numbers (MPCache).

    A cluster's rank is q . (`mix` * largest + (1 - `mix`) * smallest), added up over the query heads of a KV head. Of the
    clusters of two units the share `coarse` of best ones is looked into; in those, as many units as the share `fine` of all
    units is read, best ones first. The first and the last cluster are looked into and the first unit is read besides.
    Layers before `skip` read everything. See MPCache, arXiv 2501.06807.
    """

    coarse: float = 0.5
    fine: float = 0.2
    mix: float = 0.6
    skip: int = 2
    unit: int = 16

    def __post_init__(self) -> None:
        for name in ("coarse", "fine", "mix"):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int | float) or not 0 <= x <= 1:
                raise RecipeError(f"{name}={x!r} must be a share, 0.0 to 1.0.")
        if isinstance(self.skip, bool) or not isinstance(self.skip, int) or self.skip < 0:
            raise RecipeError(f"skip={self.skip!r} must be a number of layers, 0 or more.")

    def width(self, dim: int) -> int:
        return 2 * dim

    def digest(self, keys: Tensor) -> Tensor:
        return torch.cat([keys.amax(2), keys.amin(2)], -1)

    def pick(self, q: Tensor, digest: Tensor, site: Site) -> Tensor | None:
        n = digest.shape[1]
        if site.layer < self.skip or self.coarse == self.fine == 1:
            return None
        asked = q.float().sum(1)  # ranks are linear in the query
        most, least = digest.float().chunk(2, -1)
        fine = self._rank(asked, most, least)
        if n % 2:  # of the last coarse cluster only the first half is whole
            most, least = (torch.cat([x, x[:, -1:]], 1) for x in (most, least))
        coarse = self._rank(asked, most.unflatten(1, (-1, 2)).amax(2), least.unflatten(1, (-1, 2)).amin(2))
        pairs = coarse.shape[1]
        coarse[:, 0] = coarse[:, -1] = torch.inf
        opened = torch.zeros_like(coarse, dtype=torch.bool)
        opened.scatter_(1, coarse.topk(min(int(self.coarse * pairs) + 2, pairs)).indices, True)
        opened = opened.repeat_interleave(2, 1)[:, :n]
        fine.masked_fill_(~opened, -torch.inf)[:, 0] = torch.inf
        count = min(int(self.fine * n) + 1, int(opened[0].sum()))  # as many are open in every head
        return fine.topk(count).indices.sort(-1).values

    def _rank(self, q: Tensor, most: Tensor, least: Tensor) -> Tensor:
        """[h, N] of queries [h, D] and bounds [h, N, D]."""
        return ((self.mix * most + (1 - self.mix) * least) @ q[..., None])[..., 0]

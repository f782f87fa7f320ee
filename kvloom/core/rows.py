"""Slots in flight: what moves between segments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Rows"]


@dataclass
class Rows:
    """n slots of h KV heads: k [h, n, D] post-RoPE, v [h, n, Dv].

    `index` is the slots' place in the text: [h, n] or [1, n] int32, or the first place if they are consecutive.
    `cols` are named numbers that follow a slot through every move, [h, n] or [1, n]: "logw" (log of the number of
    tokens that the slot stands for, added to its logit), scores that a policy accumulates, ... `hidden` [1, n, hidden]: the
    layer's inputs, for kinds that store them.
    """

    k: Tensor
    v: Tensor
    index: Tensor | int
    cols: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None

    @property
    def n(self) -> int:
        return self.k.shape[1]

    @property
    def where(self) -> Tensor:
        """The index as a tensor, [h, n] or [1, n]."""
        if isinstance(self.index, Tensor):
            return self.index
        if self.n == 1:
            return torch.full((1, 1), self.index, dtype=torch.int32, device=self.k.device)
        return torch.arange(self.index, self.index + self.n, dtype=torch.int32, device=self.k.device)[None]

    def heads(self, heads: Tensor) -> Rows:
        """The same slots of some of the heads."""

        def pick(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x[heads]

        index = pick(self.index) if isinstance(self.index, Tensor) else self.index
        return Rows(self.k[heads], self.v[heads], index, {c: pick(x) for c, x in self.cols.items()}, self.hidden)

    def column(self, name: str) -> Tensor:
        """A column as [h, n]; zeros where the slots do not carry it."""
        shape = self.k.shape[:2]
        return self.cols[name].expand(shape) if name in self.cols else self.k.new_zeros(shape, dtype=torch.float32)

    def cat(self, other: Rows) -> Rows:
        """These slots, then the other's."""
        shape = other.k.shape[:2]
        cols = {c: torch.cat([self.column(c), other.column(c)], 1) for c in self.cols.keys() | other.cols.keys()}
        index = torch.cat([self.where.expand(self.k.shape[:2]), other.where.expand(shape)], 1)
        return Rows(torch.cat([self.k, other.k], 1), torch.cat([self.v, other.v], 1), index, cols)

    def mean(self) -> Rows:
        """One slot per head that stands for all: means weighted by the tokens behind each slot, log-weights summed.

        Its index is the largest one, so that cropping the text below it is noticed.
        """
        logw = self.column("logw")
        w = torch.softmax(logw, -1)[..., None]
        k = (self.k.float() * w).sum(1, keepdim=True).to(self.k.dtype)
        v = (self.v.float() * w).sum(1, keepdim=True).to(self.v.dtype)
        last = self.where.amax(-1, keepdim=True)
        return Rows(k, v, last, {"logw": torch.logsumexp(logw, -1, keepdim=True)})

"""What a policy sees of one forward of one layer of one sequence, for one group of KV heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.attention import Logits, segment_logits
from kvloom.core.group import Group, Table
from kvloom.core.recipe import Phase
from kvloom.core.segment import Segment
from kvloom.core.site import Site
from kvloom.kernels import reference

__all__ = ["Step"]

TILE = 1 << 18  # logits computed at a time where attention is summed: 1 MiB of fp32, which a core's cache still holds


@dataclass
class Step:
    """Queries are post-RoPE. h KV heads in the group, g query heads each, m new rows.

    q [h, g, m, D]; lse [h, g, m] of those rows over all that they saw; `first`: text index of row 0;
    `recent` [h, g, w, D]: the newest queries, older forwards included; `length`: tokens seen so far, these rows included;
    `prompt`: how many of them were prompt; `seen`: [h, g, n] attention of a single new row, where it was emitted.
    """

    site: Site
    phase: Phase
    group: Group
    classes: tuple[str, ...]
    q: Tensor
    lse: Tensor
    first: int
    length: int
    prompt: int
    logits: Logits
    recent: Tensor | None = None
    seen: dict[str, Tensor] | None = None

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    def of_heads(self, at: Tensor, group: Group) -> Step:
        """The same step for some of the heads."""
        seen = None if self.seen is None else {name: x[at] for name, x in self.seen.items()}
        recent = None if self.recent is None else self.recent[at]
        return Step(
            self.site, self.phase, group, self.classes, self.q[at], self.lse[at], self.first, self.length,
            self.prompt, self.logits, recent, seen,
        )  # fmt: skip

    def mass(self, table: Table) -> Tensor:
        """Attention that every slot of the table receives from all rows of this forward, summed: [h, g, n] fp32.

        In tiles, so nothing of size T x T exists; each row's weights over all slots sum to one.
        """
        if self.seen is not None:
            return torch.cat([self.seen[name] for name, _ in table.parts], -1)
        return torch.cat([self._mass(name, segment) for name, segment in table.parts], -1)

    def _mass(self, name: str, segment: Segment) -> Tensor:
        h, g, m, _ = self.q.shape
        past = segment.n - (m if name == "main" else 0)  # the new rows are the last slots of main, all others are older
        q = self.q.float() * self.logits.scale
        out = q.new_zeros((h, g, segment.n))
        rows = min(m, max(64, math.isqrt(TILE // (h * g))))
        cols = max(64, TILE // (h * g * max(1, rows)))
        for c in range(0, segment.n if m else 0, cols):
            d = min(c + cols, segment.n)
            keys = segment.key.dense(c, d).float().transpose(1, 2)
            for at in range(max(0, c - past), m, rows):
                stop = min(at + rows, m)
                s = torch.matmul(q[:, :, at:stop].flatten(1, 2), keys).unflatten(1, (g, -1))
                s = reference.exp_(self.logits.cap(s).sub_(self.lse[:, :, at:stop, None]))
                if d - past > at + 1:
                    place = torch.arange(c - past, d - past, device=s.device)
                    s.masked_fill_(place > torch.arange(at, stop, device=s.device)[:, None], 0.0)
                out[:, :, c:d] += s.sum(2)
        logw = segment.column("logw")
        return out if logw is None else out * logw.exp()[:, None]

    def window(self, table: Table, rows: int) -> Tensor:
        """Attention of the newest `rows` queries over what is stored now, summed: [h, g, n] fp32."""
        assert self.recent is not None
        q = self.recent[:, :, -rows:]
        w = q.shape[2]
        last = torch.arange(self.length - w, self.length, device=q.device)
        pieces = {}
        for name, segment in self.group.segments.items():
            if segment.n:
                s = segment_logits(q, self.group, segment, self.logits, segment.n)
                ahead = segment.index[:, None, None, :] > last[:, None]
                pieces[name] = s.masked_fill_(ahead, -torch.inf)
        lse = torch.logsumexp(torch.stack([torch.logsumexp(s, -1) for s in pieces.values()]), 0)
        return torch.cat([reference.exp_(pieces[name] - lse[..., None]).sum(2) for name, _ in table.parts], -1)

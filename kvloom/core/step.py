"""What a policy sees of one forward of one layer of one sequence, for one group of KV heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.attention import Logits, segment_logits
from kvloom.core.group import Group, Table
from kvloom.core.recipe import Phase
from kvloom.core.site import Site
from kvloom.kernels import reference

__all__ = ["Step"]


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

        Blocks of queries, so nothing of size T x T exists; each row's weights over all slots sum to one.
        """
        if self.seen is not None:
            return torch.cat([self.seen[name] for name, _ in table.parts], -1)
        return torch.cat([self._mass(segment_name, table) for segment_name, _ in table.parts], -1)

    def _mass(self, name: str, table: Table) -> Tensor:
        segment = self.group.segments[name]
        h, g, m, _ = self.q.shape
        out = self.q.new_zeros((h, g, segment.n), dtype=torch.float32)
        index = segment.index
        ordered = "index" not in segment.cols
        rows = max(1, reference.BLOCK // max(1, h * g * segment.n))
        for at in range(0, m, rows):
            stop = min(at + rows, m)
            width = min(segment.n, self.first + stop - segment.start) if ordered else segment.n
            if width <= 0:
                continue
            s = segment_logits(self.q[:, :, at:stop], self.group, segment, self.logits, width)
            s -= self.lse[:, :, at:stop, None]
            s.exp_()
            last = torch.arange(self.first + at, self.first + stop, device=s.device)
            ahead = index[:, None, None, :width] > last[:, None]
            s.masked_fill_(ahead, 0.0)
            out[..., :width] += s.sum(2)
        return out

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
        return torch.cat([(pieces[name] - lse[..., None]).exp_().sum(2) for name, _ in table.parts], -1)

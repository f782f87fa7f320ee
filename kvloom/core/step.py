"""What a policy sees of one forward of one layer of one sequence, for one group of KV heads."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvloom.core.attention import Logits, received, segment_logits
from kvloom.core.group import Group, Table
from kvloom.core.recipe import Phase
from kvloom.core.rope import Rope
from kvloom.core.segment import Segment
from kvloom.core.site import Site
from kvloom.kernels import reference

__all__ = ["Step"]

CHUNK = 1 << 20  # numbers of decoded keys at a time
TILE = 1 << 19  # weights at a time, where a scorer looks at those of single rows
COLUMNS, BLOCK = 512, 1 << 18  # slots and weights at a time, where it does not need whole rows: what a core has at hand


@dataclass
class Step:
    """Queries are post-RoPE. h KV heads in the group, g query heads each, m new rows.

    q [h, g, m, D]; lse [h, g, m] of those rows over all that they saw; `first`: text index of row 0;
    `recent` [h, g, w, D]: the newest queries, older forwards included; `length`: tokens seen so far, these rows included;
    `prompt`: how many of them were prompt; `seen`: [h, g, n] attention of a single new row, where it was emitted;
    `budget`: slots that each head may keep, by the policy's budget; `carry`: what an earlier layer of the sequence left for
    this one, in the same forward;
    `mates`: where layers settle together, the steps of all of them, this one among them; such steps bring no queries;
    `tokens`: what `KVCache.tokens` was told, by name, [T] each; `hidden` [m, hidden]: the layer's input, for a scorer that asks.
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
    budget: int | None = None
    carry: dict[str, Any] = field(default_factory=dict)
    mates: Sequence[Step] = ()
    tokens: dict[str, Tensor] | None = None
    hidden: Tensor | None = None

    def told(self, name: str, index: Tensor) -> Tensor | None:
        """What `KVCache.tokens` was told of the tokens at these places in the text; zeros behind what it was told. None: nothing."""
        if not self.tokens or name not in self.tokens:
            return None
        x = self.tokens[name].to(index.device)
        return torch.where(index < len(x), x[index.long().clamp_max(len(x) - 1)], 0)

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def rope(self) -> Rope | None:
        """How the layer rotates queries and keys."""
        return self.site.rope

    def of_heads(self, at: Tensor, group: Group) -> Step:
        """The same step for some of the heads."""
        seen = None if self.seen is None else {name: x[at] for name, x in self.seen.items()}
        recent = None if self.recent is None else self.recent[at]
        return type(self)(
            self.site, self.phase, group, self.classes, self.q[at], self.lse[at], self.first, self.length,
            self.prompt, self.logits, recent, seen, self.budget, self.carry,
            tokens=self.tokens, hidden=self.hidden,
        )  # fmt: skip

    def mass(self, table: Table) -> Tensor:
        """Attention that every slot of the table receives from all rows of this forward, summed: [h, g, n] fp32.

        In tiles, so nothing of size T x T exists; each row's weights over all slots sum to one.
        """
        if self.seen is not None:
            parts = [self.seen[name] for name, _ in table.parts]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return torch.cat([self._mass(name, segment) for name, segment in table.parts], -1)

    def _mass(self, name: str, segment: Segment) -> Tensor:
        h, g, m, dim = self.q.shape
        past = segment.n - (m if name == "main" else 0)  # the new rows are the last slots of main, all others are older
        q, lse = self.q.flatten(0, 1), self.lse.flatten(0, 1)
        chunk = CHUNK if q.device.type == "cpu" else CHUNK << 5  # a GPU wants more at a time
        parts, each = [], max(64, chunk // (h * dim))
        for start in range(0, segment.n, each):
            keys = segment.key.dense(start, min(start + each, segment.n)).to(q.dtype)
            parts.append(received(q, keys, lse, self.logits, past - start))
        out = torch.cat(parts, -1).view(h, g, -1)
        logw = segment.column("logw")
        return out if logw is None else out * logw.exp()[:, None]

    def rows(self, table: Table, newest: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Attention of each row of this forward, or of the newest: (place in the text [b], weights [h, g, b, n] fp32) in tiles.

        Each row's weights over all slots sum to one, as in `mass`. Where the table is of class main alone, n ends with the
        last slot that the tile sees; slots further on get nothing from it.
        """
        if self.seen is not None:
            yield torch.tensor([self.length - 1], device=self.q.device), self.mass(table)[:, :, None]
            return
        m = self.q.shape[2]
        first, main = m - min(m, newest or m), table.over == ("main",)
        each = max(1, TILE // (self.lse[..., 0].numel() * table.n))
        for start in range(first, m, each):
            stop = min(start + each, m)
            place = torch.arange(self.first + start, self.first + stop, device=self.q.device)
            parts = []
            for _, segment in table.parts:
                width = segment.n - m + stop if main else segment.n
                s = segment_logits(self.q[:, :, start:stop], self.group, segment, self.logits, width)
                s = reference.exp_(s.sub_(self.lse[:, :, start:stop, None]))
                late = width - stop + start if main else 0  # the slots before are older than every row
                ahead = segment.index[:, None, None, late:width] > place[:, None]
                s[..., late:].masked_fill_(ahead, 0.0)
                parts.append(s)
            yield place, parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def blocks(self, table: Table, rows: Tensor, ahead: float = 0.0) -> Iterator[tuple[Tensor, int, Tensor]]:
        """As `rows`, of some rows [r], ascending, and some slots at a time: (place in the text [b], first slot of the table,
        weights [h, g, b, c]). Twice as fast. For forwards of several rows; `ahead`: what slots get that a row does not see.
        """
        h, g, m, _ = self.q.shape
        log2e, soft, device = math.log2(math.e), self.logits.softcap is not None, self.q.device
        each, before = max(16, (BLOCK if device.type == "cpu" else BLOCK << 5) // (h * g * COLUMNS)), 0
        q = self.q[:, :, rows].float() * (self.logits.scale * (1.0 if soft else log2e))
        lse, place, at = self.lse[:, :, rows, None] * log2e, self.first + rows, rows.tolist()
        for name, segment in table.parts:
            logw, since = segment.column("logw"), segment.n - m if name == "main" else segment.n
            for start in range(0, segment.n, COLUMNS):
                stop = min(start + COLUMNS, segment.n)
                keys = segment.key.dense(start, stop).float().mT
                for top in range(bisect_left(at, start - since), len(at), each):
                    some, less = (x[:, :, top : top + each].reshape(h, -1, x.shape[-1]) for x in (q, lse))
                    if soft:
                        s = self.logits.cap(some @ keys) * log2e - less
                    else:
                        s = torch.baddbmm(less, some, keys, beta=-1)
                    if logw is not None:
                        s += logw[:, None, start:stop] * log2e
                    p = s.exp2_().view(h, g, -1, stop - start)
                    where = place[top : top + each]
                    if stop - since > at[top] + 1:
                        p.masked_fill_(segment.index[:, None, None, start:stop] > where[:, None], ahead)
                    yield where, before + start, p
            before += segment.n

    def probed(self, table: Table, rows: Tensor) -> Tensor:
        """Attention that every slot of the table receives from some rows [r] of this forward, summed: [h, g, n] fp32.

        In tiles, so nothing of size T x T exists. The step must have all rows of its forward.
        """
        total = torch.zeros(*self.q.shape[:2], table.n, device=self.q.device)
        for _, start, p in self.blocks(table, rows):
            total[..., start : start + p.shape[-1]] += p.sum(2)
        return total

    def window(self, table: Table, rows: int) -> Tensor:
        """Attention of the newest `rows` queries over what is stored now, summed: [h, g, n] fp32."""
        return self.looks(table, rows).sum(2)

    def looks(self, table: Table, rows: int) -> Tensor:
        """Attention of each of the newest `rows` queries over what is stored now: [h, g, w, n] fp32."""
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
        return torch.cat([reference.exp_(pieces[name] - lse[..., None]) for name, _ in table.parts], -1)

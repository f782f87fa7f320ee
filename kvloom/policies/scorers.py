"""How important each slot is, from the attention it receives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvloom.core.attention import segment_logits
from kvloom.core.codec import Plane
from kvloom.core.group import Table
from kvloom.core.segment import Segment
from kvloom.core.step import Step
from kvloom.errors import RecipeError, unknown
from kvloom.kernels import reference

__all__ = ["Accumulated", "Chosen", "Distinct", "Expected", "GlobalLocal", "LastToken", "Peak", "Probes", "Window"]

ROWS = 64  # queries at a time
BLOCK = 1024  # slots or queries at a time, where a scorer makes something of their size


@dataclass(frozen=True)
class Window:
    """Attention of the newest `queries` tokens, summed, smoothed over neighbours, averaged over a KV head's queries.

    The observation window of SnapKV (arXiv 2404.14469). Slots of the window itself score 0, as a placement keeps them, unless
    `own`.
    """

    queries: int
    kernel: int
    pool: Literal["max", "avg"]
    own: bool = False
    columns = 0

    def __post_init__(self) -> None:
        if not isinstance(self.queries, int) or self.queries < 1:
            raise RecipeError(f"window={self.queries!r} must be a number of tokens, at least 1.")
        if not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise RecipeError(f"kernel={self.kernel!r} must be odd and positive, such as 5 or 7.")
        if self.pool not in ("max", "avg"):
            raise RecipeError("pool: " + unknown("value", str(self.pool), ("max", "avg")))

    def __call__(self, step: Step, table: Table) -> Tensor:
        return self.pooled(step, table).mean(1)

    def pooled(self, step: Step, table: Table) -> Tensor:
        """Of every query head, [h, g, n]."""
        mass = step.window(table, self.queries)
        index = table.index
        if not self.own:
            mass = mass.masked_fill((index >= step.length - self.queries)[:, None], 0.0)
        mass = mass.flatten(0, 1)[:, None]
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d
        # Neighbours are neighbours in the text; slots may have changed places since.
        order = index.argsort(-1).repeat_interleave(len(mass) // len(index), 0)[:, None]
        pooled: Tensor = pool(mass.gather(-1, order), self.kernel, 1, self.kernel // 2)
        pooled = torch.empty_like(mass).scatter_(-1, order, pooled)
        return pooled.reshape(step.heads, -1, table.n)


@dataclass(frozen=True)
class Chosen(Window):
    """`Window` by some query heads of the layer alone, their average for all KV heads (CompressKV, arXiv 2508.02401).

    `finders`: numbers of these heads in every layer of the model. For placements of scope "layer".
    """

    finders: tuple[tuple[int, ...], ...] = ()

    def __call__(self, step: Step, table: Table) -> Tensor:
        pooled = self.pooled(step, table).flatten(0, 1)
        return pooled[list(self.finders[step.site.layer])].mean(0).expand(step.heads, -1)


@dataclass(frozen=True)
class Accumulated:
    """All attention that a slot has received since it entered, summed over a KV head's queries (H2O, arXiv 2306.14048)."""

    queries = -1
    columns = 1

    def __call__(self, step: Step, table: Table) -> Tensor:
        return table.add("mass", step.mass(table).sum(1))


@dataclass(frozen=True)
class GlobalLocal:
    """All attention received since a slot entered, and that of the newest `recent` queries, brought to one mean and added.

    EMS (arXiv 2412.08521). Both are summed over a KV head's queries. Slots of the window itself score 0: a placement keeps them.
    """

    recent: int
    every: int = 1  # while decoding, slots over budget from which on a placement asks
    queries = -1
    columns = 1

    def __call__(self, step: Step, table: Table) -> Tensor:
        everywhere = table.add("mass", step.mass(table).sum(1))
        if step.phase == "decode" and (step.budget is None or table.n - step.budget < self.every):
            return everywhere
        inside = table.index >= step.length - self.recent
        far, near = (x.masked_fill(inside, 0.0) for x in (everywhere, step.window(table, self.recent).sum(1)))
        scale = far.mean(-1, keepdim=True) / near.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return far + near * scale


@dataclass(frozen=True)
class LastToken:
    """Attention of the newest token, itself included, averaged over all query heads: one score for the whole layer.

    TOVA (arXiv 2401.06104). Heads of a layer hold the same slots, so this is for placements of scope "layer".
    """

    queries = 1
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        mean = step.window(table, 1).mean((0, 1))
        return mean.expand(step.heads, -1)


@dataclass(frozen=True)
class Peak:
    """The largest share of attention that any query gives a slot, over all query heads of a KV head (KVzip, EpiCache).

    Asks the rows of a probe, whose weights are over what is stored alone; after a prompt the newest `queries`, which see
    what stands before them.
    """

    queries: int = 64
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        q = step.q if step.phase == "probe" else step.recent
        assert q is not None
        m = q.shape[2]
        at = torch.arange(step.length - m, step.length, device=q.device)
        best = torch.zeros(step.heads, table.n, device=q.device)
        for start in range(0, m, ROWS):
            pieces = {}
            for name, segment in step.group.segments.items():
                if segment.n:
                    rows = q[:, :, start : start + ROWS]
                    s = segment_logits(rows, step.group, segment, step.logits, segment.n)
                    if step.phase != "probe":
                        ahead = segment.index[:, None, None, :] > at[start : start + ROWS, None]
                        s.masked_fill_(ahead, -torch.inf)
                    pieces[name] = s
            lse = torch.logsumexp(torch.stack([s.logsumexp(-1) for s in pieces.values()]), 0)
            shares = [reference.exp_(pieces[name] - lse[..., None]).amax((1, 2)) for name, _ in table.parts]
            best = torch.maximum(best, torch.cat(shares, -1))
        return best


@dataclass(frozen=True)
class Distinct:
    """How little a key points where the keys of its head point on average (KeyDiff, arXiv 2504.15364).

    Minus the cosine between the key and the mean of all keys of length one. Looks at no query.
    """

    queries = 0
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        unit = [[F.normalize(x, dim=-1) for x in _blocks(segment, "key")] for _, segment in table.parts]
        total = sum(x.sum(1, keepdim=True) for parts in unit for x in parts)
        anchor = F.normalize(torch.as_tensor(total), dim=-1)
        return -torch.cat([(x * anchor).sum(-1) for parts in unit for x in parts], -1)


@dataclass(frozen=True)
class Expected:
    """Attention that queries to come are expected to give, times the length of the value (arXiv 2510.00636).

    Queries before RoPE are taken as normally distributed, with the mean and covariance of those seen: all of a forward
    (`queries` -1) or the newest. They are rotated by the mean rotation of the next `ahead` positions. For a normal
    query the expected exponential of a logit is exp(mean + variance / 2). Sinks take no part.
    """

    queries: int = -1
    ahead: int = 512
    sinks: int = 4
    columns = 0

    def __call__(self, step: Step, table: Table) -> Tensor:
        mean, cov = self._moments(step)
        scale, parts = step.logits.scale, []
        for _, segment in table.parts:
            for k in _blocks(segment, "key"):
                s = (k[:, None] @ mean[..., None])[..., 0] * scale
                s += ((k[:, None] @ cov) * k[:, None]).sum(-1) * (scale * scale / 2)
                parts.append(s)
        s = torch.cat(parts, -1).masked_fill_((table.index < self.sinks)[:, None], -torch.inf)
        norms = torch.cat([v.norm(dim=-1) for _, segment in table.parts for v in _blocks(segment, "value")], -1)
        return s.softmax(-1).mean(1).nan_to_num_(0.0) * norms

    def _moments(self, step: Step) -> tuple[Tensor, Tensor]:
        """Mean [h, g, D] and covariance [h, g, D, D] of the queries to come, fp32."""
        q = step.q if self.queries < 0 else step.recent
        assert q is not None
        first = step.length - q.shape[2]
        skip = min(max(0, self.sinks - first), q.shape[2] - 1)  # queries of the sinks are no example of others
        rope, pivot, n = step.rope, None, q.shape[2] - skip
        total = square = torch.zeros((), device=q.device)
        for start in range(skip, q.shape[2], BLOCK):
            x = q[:, :, start : start + BLOCK].float()
            if rope is not None:
                x = rope.unrotate(x, torch.arange(first + start, first + start + x.shape[2], device=q.device))
            pivot = x.mean(2, keepdim=True) if pivot is None else pivot  # near the mean, so that little cancels
            x = x - pivot
            total, square = total + x.sum(2), square + x.mT @ x
        assert pivot is not None
        off = total / n
        mean, cov = pivot[:, :, 0] + off, square / n - off[..., :, None] * off[..., None, :]
        if rope is not None:
            ahead = torch.arange(step.length, step.length + self.ahead, device=q.device)
            mean = rope.average(mean, ahead)
            cov = rope.average(rope.average(cov, ahead).mT, ahead)
        return mean, cov


@dataclass(frozen=True)
class Probes:
    """Mean attention that a slot receives from the probe rows that can see it, summed over a KV head's queries.

    Probe rows: the last share `newest` of a forward's rows, at least one, and of the rows before as many as a share
    `random` of all, drawn with a fixed seed (ZipCache, arXiv 2405.14256). While decoding with `queries` 1, the newest token.
    """

    newest: float = 0.05
    random: float = 0.05
    queries: int = -1
    columns = 0

    def __post_init__(self) -> None:
        for name, share in (("recent", self.newest), ("random", self.random)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise RecipeError(f"{name}={share!r} must be a share of the rows, 0.0 to 1.0.")

    def rows(self, step: Step) -> Tensor:
        """Which rows of this forward probe, ascending [r]."""
        m = step.q.shape[2]
        late = max(1, int(self.newest * m))
        draw = torch.Generator().manual_seed(step.length)
        early = torch.randperm(m - late, generator=draw)[: int(self.random * m)].sort().values
        return torch.cat([early, torch.arange(m - late, m)]).to(step.q.device)

    def seen(self, step: Step, table: Table) -> Tensor:
        """How many probe rows can see each slot, [h or 1, n]."""
        if self.queries >= 0:
            return torch.ones_like(table.index)
        at = self.rows(step) + step.first
        return len(at) - torch.searchsorted(at, table.index.contiguous().to(at.dtype))

    def __call__(self, step: Step, table: Table) -> Tensor:
        mass = step.window(table, 1) if self.queries >= 0 else step.probed(table, self.rows(step))
        return mass.sum(1) / self.seen(step, table).clamp_min(1)


def _blocks(segment: Segment, which: Plane) -> Iterator[Tensor]:
    """Keys or values of a segment, decoded, [h, up to BLOCK, D] fp32 at a time."""
    plane = segment.key if which == "key" else segment.value
    for start in range(0, segment.n, BLOCK):
        yield plane.dense(start, min(start + BLOCK, segment.n)).float()

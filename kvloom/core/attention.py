"""Attention over the segments of a group: each gives a partial result, merged by log-sum-exp.

Exact stretches go through a fused kernel; where a plane is encoded, the codec computes on its own block. Queries of one KV
head's group are folded into rows, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kvloom.core.group import Group
from kvloom.core.kind import Merge
from kvloom.core.plane import SMALL
from kvloom.core.rope import Rope
from kvloom.core.segment import Segment
from kvloom.kernels import native, reference
from kvloom.kernels.dispatch import Job, kernels_for

__all__ = ["Logits", "Visible", "as_bias", "attend", "job", "joined", "many_rows", "received", "segment_logits"]

# (text index [h, n] or [1, n], heads of the group) -> [h or 1, g or 1, m, n]: bool (may row see slot) or added to the logits
Visible = Callable[[Tensor, Group], Tensor]
MANY = 64  # with more query rows than this, decoding a block once beats computing on its codes row by row


@dataclass(frozen=True)
class Logits:
    """How a layer turns dot products into logits."""

    scale: float
    softcap: float | None = None
    rope: Rope | None = None

    def cap(self, s: Tensor) -> Tensor:
        return s if self.softcap is None else s.div_(self.softcap).tanh_().mul_(self.softcap)


def tempered(logits: Logits, merge: Merge | None) -> Logits:
    """The logits of a class that joins the softmax as `merge` says."""
    return logits if merge is None else replace(logits, scale=logits.scale / merge.temperature)


def joined(parts: list[tuple[Tensor, Tensor]], merge: Merge | None) -> list[tuple[Tensor, Tensor]]:
    """Partial results over the slots of such classes as what the others are merged with."""
    if merge is None or not parts:
        return parts
    out, lse = reference.merge(parts)
    return [(out, lse * merge.power)]


def many_rows(
    q: Tensor, k: Tensor, v: Tensor, logits: Logits, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [Hq, m, D] over dense keys [h, n, D] and values, by whatever does it fastest; see `reference.dense`."""
    kernels = kernels_for(q)
    # On a GPU, torch's flash attention is the fastest there is over dense numbers, and it gives the log-sum-exp that
    # parts are merged by. Ours takes what that refuses: fp32, soft-capping, unequal head sizes.
    flash = logits.softcap is None and reference.flash_serves(q, k, v, causal)
    if bias is None and not flash and kernels is not None and kernels.fits(q, k, v):
        return kernels.prefill(q, k, v, logits.scale, causal, logits.softcap)
    if logits.softcap is None:
        return reference.dense(q, k, v, logits.scale, causal, bias)
    return reference.blocked(q, k, v, logits.scale, causal, bias, logits.softcap)


def received(q: Tensor, k: Tensor, lse: Tensor, logits: Logits, past: int) -> Tensor:
    """Attention that every slot receives from all rows of q [Hq, m, D], summed: [Hq, n] fp32; see `reference.observe`."""
    kernels = kernels_for(q)
    if kernels is not None and kernels.fits(q, k):
        return kernels.observe(q, k, lse, logits.scale, past, logits.softcap)
    return reference.observe(q, k, lse, logits.scale, past, logits.softcap)


def turned(q: Tensor, group: Group, segment: Segment, logits: Logits, length: int) -> Tensor:
    """Queries as this segment sees them: q [h, g, m, D], rotated back by what was dropped if the class asks for it."""
    if not segment.kind.turn or logits.rope is None or length == group.n:
        return q
    return logits.rope.shift(q, group.n - length)


def segment_logits(q: Tensor, group: Group, segment: Segment, logits: Logits, width: int) -> Tensor:
    """Logits [h, g, m, width] in fp32 of queries [h, g, m, D] against the first `width` slots, log-weights included."""
    h, g, m, _ = q.shape
    s = logits.cap(_dots(q.flatten(1, 2), segment, logits.scale, width))
    logw = segment.column("logw")
    if logw is not None:
        s += logw[:, None, :width]
    return s.reshape(h, g, m, width)


def _dots(q: Tensor, segment: Segment, scale: float, width: int) -> Tensor:
    parts, start = [], 0
    for run in segment.key.runs:
        stop = min(run.n, width - start)
        if stop > 0:
            whole = -(-stop // run.codec.unit) * run.codec.unit
            parts.append(run.dot(q, whole, scale)[..., :stop])
        start += run.n
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _mixed(p: Tensor, segment: Segment, width: int) -> Tensor:
    out, start = None, 0
    for run in segment.value.runs:
        stop = min(run.n, width - start)
        if stop > 0:
            whole = -(-stop // run.codec.unit) * run.codec.unit
            weights = p[..., start : start + stop]
            if whole > stop:
                weights = torch.nn.functional.pad(weights, (0, whole - stop))
            part = run.mix(weights)
            out = part if out is None else out.add_(part)
        start += run.n
    assert out is not None
    return out


def as_bias(mask: Tensor, g: int) -> Tensor:
    """A mask [h, g or 1, m, n], boolean or additive -> what is added to the logits, [h, g * m, n] fp32."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.float().expand(-1, g, -1, -1).flatten(1, 2)


def _bias(group: Group, segment: Segment, visible: Visible | None, g: int) -> Tensor | None:
    """What is added to the logits: [h or 1, g * m or 1, n] fp32, or None."""
    logw = segment.column("logw")
    bias = None if logw is None else logw[:, None]
    if visible is not None:
        shown = as_bias(visible(segment.index, group), g)
        bias = shown if bias is None else shown + bias
    return bias


def _attend_segment(
    q: Tensor, segment: Segment, logits: Logits, bias: Tensor | None, emit: bool
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """q [h, R, D] -> partial results over the stored slots and, if asked for, the logits [h, R, n]."""
    n, coded = segment.n, segment.frozen
    if q.shape[1] > MANY:
        k, v = segment.key.dense(0, n).to(q.dtype), segment.value.dense(0, n).to(q.dtype)
        if bias is None or (logits.softcap is None and bias.shape[1] == 1):
            return [many_rows(q, k, v, logits, bias=bias)], None
        return [reference.blocked(q, k, v, logits.scale, False, bias, logits.softcap)], None
    parts: list[tuple[Tensor, Tensor]] = []
    by_hand = emit or logits.softcap is not None or bias is not None or (0 < n - coded <= SMALL and coded > 0)
    split, s = n if by_hand else coded, None
    if split:
        s = logits.cap(_dots(q, segment, logits.scale, split))
        if bias is not None:
            s += bias[..., :split]
        p, lse = reference.finish(s.clone() if emit else s)
        p /= p.sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        parts.append((_mixed(p, segment, split), lse))
    for start, stop in _stretches(segment, split):
        k, v = segment.key.dense(start, stop), segment.value.dense(start, stop)
        parts.append(reference.dense(q, k, v, logits.scale))
    return parts, s if emit else None


def _stretches(segment: Segment, start: int) -> list[tuple[int, int]]:
    """The exact slots from `start` on, cut where a run of either plane ends, so that each is one view."""
    if len(segment.key.runs) == len(segment.value.runs) == 1:
        return [(start, segment.n)] if start < segment.n else []
    ends = {segment.n}
    for runs in (segment.key.runs, segment.value.runs):
        at = 0
        for run in runs:
            at += run.n
            ends.add(at)
    borders = [start, *sorted(end for end in ends if end > start)]
    return list(pairwise(borders))


def job(
    q: Tensor,
    value_dim: int,
    group: Group,
    logits: Logits,
    length: int,
    visible: Visible | None,
    emit: bool,
    merge: Merge | None = None,
) -> tuple[Job, dict[str, Tensor]] | None:
    """What `attend` does with the classes that join as `merge` says, as a job for kernels, before it is `joined`.

    Also where it will write logits. None where kernels do not serve.
    """
    h, g, m, dim = q.shape
    kernels = kernels_for(q)
    if kernels is None or visible is not None or g * m > kernels.ROWS or not kernels.serves(q, value_dim):
        return None
    parts: list[native.Part] = []
    emitted: dict[str, Tensor] = {}
    for name, segment in group.segments.items():
        if segment.n and segment.kind.merge == merge:
            rows = kernels.queries(turned(q, group, segment, logits, length).reshape(h, g * m, dim))
            part = native.Part(segment.n, logw=segment.column("logw"), kept=[rows])
            for plane, into in ((segment.key, part.keys), (segment.value, part.values)):
                for run in plane.runs:
                    described = run.describe(rows if plane is segment.key else None, part.kept)
                    if described is None:
                        return None
                    into.append(described)
            if emit:
                part.scores = emitted[name] = torch.empty(h, g * m, segment.n, device=q.device)
            parts.append(part)
    scale = tempered(logits, merge).scale
    return kernels.job(h, g * m, dim, value_dim, parts, scale, logits.softcap), emitted


def attend(
    q: Tensor,
    group: Group,
    logits: Logits,
    length: int,
    visible: Visible | None = None,
    emit: bool = False,
    merge: Merge | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Attention of q [h, g, m, D] over what a group holds in the classes that join as `merge` says, in torch.

    Returns partial results (out [h, g * m, Dv], lse [h, g * m]) for `reference.merge`, and with `emit` each class's logits
    [h, g * m, n]. `visible` hides slots from rows; without it every row sees every slot. `length`: tokens seen so far.
    """
    g = q.shape[1]
    parts, emitted = [], {}
    for name, segment in group.segments.items():
        if segment.n and segment.kind.merge == merge:
            turned_q = turned(q, group, segment, logits, length).flatten(1, 2)
            bias = _bias(group, segment, visible, g)
            found, s = _attend_segment(turned_q, segment, tempered(logits, merge), bias, emit)
            parts += found
            if s is not None:
                emitted[name] = s
    return joined(parts, merge), emitted

"""Attention of scattered rows: each sees the slots up to its own, whatever lies between the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.attention import Logits, many_rows
from kvloom.kernels import reference

__all__ = ["attend"]

TOGETHER = 64  # scattered rows that share one mask ...
STRETCH = 64  # ... and so many consecutive ones are a stretch of their own, which needs none


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """Row i of q [Hq, m, D] over the first `seen[i]` (1 or more, ascending) slots of k [H, n, D], v [H, n, Dv].

    `seen` [m] is on the host. Returns out [Hq, m, Dv] and its log-sum-exp [Hq, m] in fp32. Rows are worked on in blocks, over
    the slots up to the last that a row of the block sees, so memory is that of the rows.
    """
    parts = [_block(q[:, a:b], k, v, seen[a:b], logits) for a, b in _blocks(seen)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out.to(q.dtype) for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def _blocks(seen: Tensor) -> list[tuple[int, int]]:
    """Where to cut the rows: long consecutive stretches by themselves, all others TOGETHER at a time."""
    cuts = torch.cat([torch.tensor([0]), (seen.diff() != 1).nonzero()[:, 0] + 1, torch.tensor([len(seen)])])
    long = cuts.diff() >= STRETCH
    found: list[tuple[int, int]] = []
    at = 0
    for a, b in [*zip(cuts[:-1][long].tolist(), cuts[1:][long].tolist(), strict=True), (len(seen), len(seen))]:
        found += [(i, min(i + TOGETHER, a)) for i in range(at, a, TOGETHER)]
        found += [(a, b)] if a < b else []
        at = b
    return found


def _block(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    first, last, m = int(seen[0]), int(seen[-1]), q.shape[1]
    common = first - 1  # slots that every row of the block sees
    parts = []
    if common:
        parts.append(many_rows(q, k[:, :common], v[:, :common], logits))
    own_k, own_v = k[:, common:last], v[:, common:last]
    if last - common == m:  # consecutive: the usual triangle
        parts.append(many_rows(q, own_k, own_v, logits, causal=True))
    else:
        behind = torch.arange(common, last) >= seen[:, None]
        bias = torch.zeros(behind.shape).masked_fill_(behind, -torch.inf).to(q.device)[None]
        parts.append(many_rows(q, own_k, own_v, logits, bias=bias))
    return reference.merge(parts)

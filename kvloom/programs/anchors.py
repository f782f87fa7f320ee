"""KVCOMM's arithmetic: how near anchors are to a message, and the correction that they give."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvloom.core.rows import Rows
from kvloom.programs.chunk import Chunk

__all__ = ["Anchor", "Delta", "Weights", "by_channel", "by_token", "plus", "similarity"]

Delta = list[tuple[Tensor, Tensor]]  # by layer: what to add to keys [H, n, D] (where the chunk was computed) and values
Weights = list[tuple[Tensor, Tensor]]  # by layer, of keys and of values: [a, H or 1, n or 1, D or 1]


@dataclass
class Anchor:
    """A message for which full prefills are known. `deltas[agent, part]`: of the message, and of the text that follows it."""

    chunk: Chunk
    deltas: dict[tuple[str, int], tuple[Delta, Delta]] = field(default_factory=dict)
    uses: int = 0


def similarity(chunk: Chunk, anchors: list[Anchor]) -> Tensor:
    """How near each anchor is, by all its values: weights [a] that sum to 1, fp64 on the host."""
    n = len(chunk)
    far = [
        sum(
            float((x.v - y.v[:, :n]).float().square().sum()) for x, y in zip(chunk.rows, anchor.chunk.rows, strict=True)
        )
        for anchor in anchors
    ]
    return torch.softmax(-torch.tensor(far, dtype=torch.float64).sqrt(), 0)


def by_token(chunk: Chunk, anchors: list[Anchor], temperature: float) -> Weights:
    """Every token's own weights, from its mean distance over layers, heads and channels; texts aligned at the start."""
    n, both = len(chunk), []
    for plane in ("k", "v"):
        far = [
            torch.stack(
                [(getattr(x, plane) - getattr(y, plane)[:, :n]).float().abs().mean((0, 2))
                 for x, y in zip(chunk.rows, anchor.chunk.rows, strict=True)]
            ).mean(0)
            for anchor in anchors
        ]  # fmt: skip
        both.append(torch.softmax(-torch.stack(far) / temperature, 0)[:, None, :, None])
    return [(both[0], both[1])] * len(chunk.rows)


def by_channel(chunk: Chunk, anchors: list[Anchor], temperature: float) -> Weights:
    """Every channel's own weights, from its distance over the tokens; texts aligned at the end."""
    n, out = len(chunk), []
    for i, x in enumerate(chunk.rows):
        both = []
        for plane in ("k", "v"):
            far = [(getattr(x, plane) - getattr(a.chunk.rows[i], plane)[:, -n:]).float().norm(dim=1) for a in anchors]
            both.append(torch.softmax(-torch.stack(far) / temperature, 0)[:, :, None])
        out.append((both[0], both[1]))
    return out


def plus(chunk: Chunk, deltas: list[Delta], weights: Weights) -> Chunk:
    """The chunk with the weighted sum of the anchors' differences; layer 0 knows no context and stays."""
    n, rows = len(chunk), [chunk.rows[0]]
    for i, x in enumerate(chunk.rows[1:], 1):
        both = []
        for plane, held in enumerate((x.k, x.v)):
            total = held.float()
            for a, delta in enumerate(deltas):
                total = total + weights[i][plane][a] * delta[i][plane][:, :n].float()
            both.append(total.to(held.dtype))
        rows.append(Rows(both[0], both[1], chunk.base))
    return replace(chunk, rows=tuple(rows))

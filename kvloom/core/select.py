"""What a decoded token reads: all slots, or the units that a selector picks by a digest of each. Nothing leaves."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvloom.core.group import Group
from kvloom.core.run import Buffer
from kvloom.core.segment import Segment
from kvloom.core.site import Site

__all__ = ["Digest", "Selector", "digested", "narrowed"]


class Selector(Protocol):
    """Which units of `unit` consecutive slots of a class the queries of one token read; the one with the newest slot always.

    `width(dim)`: how many numbers of the model's dtype it remembers of a unit of keys with `dim` channels.
    """

    @property
    def unit(self) -> int: ...

    def width(self, dim: int) -> int: ...

    def digest(self, keys: Tensor) -> Tensor:
        """Keys [h, N, unit, D] of whole units -> what is remembered of each, [h, N, width]."""

    def pick(self, q: Tensor, digest: Tensor, site: Site) -> Tensor | None:
        """Units [h, u], ascending, of those in the digest that the queries q [h, g, D] of a token read; None: all."""


class Digest:
    """What a selector remembers of a segment's units but the last. Made again when slots have left, added to when slots came."""

    def __init__(self) -> None:
        self.buffer: Buffer | None = None
        self.moves = -1

    def update(self, segment: Segment, selector: Selector) -> None:
        """Brings it up to date with the segment."""
        if self.moves != segment.moves:
            self.buffer, self.moves = None, segment.moves
        done, whole = 0 if self.buffer is None else self.buffer.n, max(0, segment.n - 1) // selector.unit
        if whole > done:
            keys = segment.key.dense(done * selector.unit, whole * selector.unit)
            fresh = selector.digest(keys.unflatten(1, (whole - done, selector.unit)))
            if self.buffer is None:
                self.buffer = Buffer(fresh)
            else:
                self.buffer.append(fresh)


def digested(segment: Segment, selector: Selector) -> Buffer | None:
    """The digest of a segment, up to date; None: it has no unit but the last."""
    segment.digest = segment.digest or Digest()
    segment.digest.update(segment, selector)
    return segment.digest.buffer


def narrowed(group: Group, q: Tensor, site: Site) -> Group:
    """The group as the queries q [h, g, D] of one token see it: of classes with a selector only what it picks, as a copy."""
    picked = {}
    for name, segment in group.segments.items():
        selector = segment.kind.select
        if selector is not None and segment.n:
            held = digested(segment, selector)
            units = None if held is None else selector.pick(q, held.view, site)
            if held is not None and units is not None:
                picked[name] = _read(segment, units, selector.unit, held.n)
    if not picked:
        return group
    twin = Group({}, group.heads)
    twin.segments = group.segments | picked
    return twin


def _read(segment: Segment, units: Tensor, unit: int, whole: int) -> Segment:
    """Some whole units of a segment, and what follows the last one."""
    slots = (units[..., None] * unit + torch.arange(unit, device=units.device)).flatten(1)
    rest = torch.arange(whole * unit, segment.n, device=units.device).expand(len(units), -1)
    return Segment.of(segment.read(torch.cat([slots, rest], 1)))

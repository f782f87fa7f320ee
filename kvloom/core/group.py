"""KV heads of one layer that hold equally many slots of every class.

A layer starts as one group of all its heads. Where a policy leaves its heads with unequal counts, the group splits, so that
everything inside a group stays a plain [h, n] rectangle and unequal heads still free their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kvloom.core.kind import Kind, Merge
from kvloom.core.run import Buffer
from kvloom.core.segment import Segment
from kvloom.core.site import Site

__all__ = ["Group", "Table", "groups_of"]


class Group:
    """Some KV heads of a layer and their segments, by class name. `heads` is None while the group holds all of them.

    `state`: what policies remember besides columns, [h, ...] fp32 by name; replaced, never written to, so forks share it.
    """

    def __init__(self, kinds: dict[str, Kind], heads: Tensor | None = None) -> None:
        self.heads = heads
        self.state: dict[str, Tensor] = {}
        self.segments = {name: Segment(kind) for name, kind in kinds.items()}

    def __iter__(self) -> Iterator[Segment]:
        """The segments that hold slots."""
        return (segment for segment in self.segments.values() if segment.n)

    def kinds(self) -> list[Kind]:
        """How each class is stored."""
        return [segment.kind for segment in self.segments.values()]

    @property
    def n(self) -> int:
        """Slots that each head holds."""
        return sum(segment.n for segment in self.segments.values())

    @property
    def merges(self) -> list[Merge | None]:
        """The ways in which the slots held join the softmax; nearly always one, None: as if they were all there is."""
        return list(dict.fromkeys(segment.kind.merge for segment in self)) or [None]

    def heads_of(self, site: Site) -> int:
        """How many KV heads of the layer belong to the group."""
        return site.kv_heads if self.heads is None else len(self.heads)

    def pick(self, x: Tensor) -> Tensor:
        """The group's heads out of x [H, ...]."""
        return x if self.heads is None else x[self.heads]

    def split(self, which: list[Tensor]) -> list[Group]:
        """One group for each list of positions among this group's heads."""
        groups = []
        for at in which:
            twin = Group({name: segment.kind for name, segment in self.segments.items()})
            twin.heads = at if self.heads is None else self.heads[at]
            twin.state = {name: x[at] for name, x in self.state.items()}
            for name, segment in self.segments.items():
                twin.segments[name] = segment.of_heads(at)
            groups.append(twin)
        return groups

    def truncate(self, length: int) -> list[Group]:
        """Forgets the tokens from `length` on. Heads that are left with unequally many slots part."""
        segments = list(self)
        if not segments:
            return [self]
        h = segments[0].heads
        marks = torch.cat([segment.marks(length).expand(h, -1) for segment in segments], 1)
        found, which = torch.unique(marks, dim=0, return_inverse=True)
        lists = [(which == i).nonzero()[:, 0] for i in range(len(found))]
        groups = [self] if len(lists) == 1 else self.split(lists)
        for group in groups:
            for segment in list(group):
                segment.truncate(length)
        return groups

    def fork(self) -> Group:
        """A group that shares this one's bytes until one of the two writes."""
        twin = Group({}, self.heads)
        twin.state = dict(self.state)
        twin.segments = {name: segment.fork() for name, segment in self.segments.items()}
        return twin


def groups_of(kinds: Mapping[str, Kind], site: Site) -> list[Group]:
    """The groups that a layer begins with: one, unless heads are not stored alike."""
    planes = [part for kind in kinds.values() for part in (*kind.key.at(site, "key"), *kind.value.at(site, "value"))]
    parts: list[tuple[int, ...] | None] = list(dict.fromkeys(heads for heads, _ in planes if heads is not None))
    return [
        Group(
            {name: kind.at(site, heads) for name, kind in kinds.items()}, None if heads is None else torch.tensor(heads)
        )
        for heads in parts or [None]
    ]


class Table:
    """The slots of some classes of a group side by side, as a policy sees them: n slots of each of h heads."""

    def __init__(self, group: Group, over: tuple[str, ...], device: torch.device) -> None:
        self.group, self.over, self.device = group, over, device
        self.parts = [(name, group.segments[name]) for name in over if group.segments[name].n]
        self.n = sum(segment.n for _, segment in self.parts)

    @property
    def front(self) -> int | None:
        """Text index of the first slot, where slots are consecutive and can be dropped from the front at no cost."""
        segment = self.parts[0][1]
        return segment.start if len(self.parts) == 1 and segment.consecutive else None

    @property
    def rectangle(self) -> bool:
        """Whether all slots lie in one run of keys and one of values: then any of them can go, equally many in each head."""
        segment = self.parts[0][1]
        return len(self.parts) == len(segment.key.runs) == len(segment.value.runs) == 1 and not self.units()

    @property
    def index(self) -> Tensor:
        """Place in the text of every slot, [h, n] or [1, n] int32."""
        parts = [segment.index for _, segment in self.parts]
        rows = max(len(part) for part in parts)
        return parts[0] if len(parts) == 1 else torch.cat([part.expand(rows, -1) for part in parts], 1)

    def column(self, name: str, heads: int) -> Tensor:
        """A column of every slot, [h, n] fp32; zeros where a class does not carry it."""
        parts = []
        for _, segment in self.parts:
            held = segment.column(name)
            blank = torch.zeros((), device=self.device) if held is None else held
            parts.append(blank.expand(heads, segment.n))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def add(self, name: str, x: Tensor) -> Tensor:
        """Adds x [h, n] to a column that every class of the table keeps; returns the sums."""
        start = 0
        for _, segment in self.parts:
            new, held = x[:, start : start + segment.n], segment.cols.get(name)
            if held is None or held.data.shape[0] != len(x):
                segment.cols[name] = Buffer(new if held is None else held.view + new)
            else:
                held.view.add_(new)
            start += segment.n
        return self.column(name, len(x))

    def store(self, name: str, x: Tensor) -> None:
        """Writes a column x [h, n] back to the classes of the table."""
        start = 0
        for _, segment in self.parts:
            segment.cols[name] = Buffer(x[:, start : start + segment.n])
            start += segment.n

    def units(self) -> list[tuple[int, int, int]]:
        """(start, stop, unit) of the stretches of the table whose slots are freed `unit` at a time, unit > 1."""
        out, start = [], 0
        for _, segment in self.parts:
            out += [(start + a, start + b, unit) for a, b, unit in segment.units()]
            start += segment.n
        return out

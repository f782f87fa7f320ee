"""The ledger of bytes: what a cache really holds, counted by storage, so that nothing is counted twice or forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Entry", "Report"]


@dataclass(frozen=True)
class Entry:
    """Bytes of one kind in one layer. `room`: empty room reserved for growth, part of the storage but not of `nbytes`."""

    layer: int
    segment: str
    plane: str
    field: str
    tier: str
    nbytes: int
    room: int


@dataclass(frozen=True)
class Report:
    """All entries of a cache, and the layers that the recipe leaves to stock cache layers."""

    recipe: str
    entries: tuple[Entry, ...]
    left_alone: dict[int, str]

    @staticmethod
    def of(recipe: str, layers: Iterable[Any], left_alone: dict[int, str]) -> Report:
        """Counts the layers of a cache. Storages that several sequences share are counted once."""
        found: dict[tuple[int, str, str, str, str], list[int]] = defaultdict(lambda: [0, 0])
        seen: set[int] = set()

        def count(layer: int, segment: str, plane: str, field: str, x: Tensor, used: int) -> None:
            storage = x.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() == 0:
                return
            seen.add(storage.data_ptr())
            entry = found[layer, segment, plane, field, x.device.type]
            entry[0] += used
            entry[1] += storage.nbytes() - used

        for i, layer in enumerate(layers):
            if i in left_alone:
                for name, x in vars(layer).items():
                    if isinstance(x, Tensor) and name in ("keys", "values"):
                        count(i, "stock", name[:-1], type(layer).__name__, x, x.nbytes)
            else:
                for row in layer.rows:
                    for segment, plane, field, x, used in row.layer.tensors():
                        count(i, segment, plane, field, x, used)
        entries = tuple(Entry(*key, *sizes) for key, sizes in sorted(found.items()))
        return Report(recipe, entries, left_alone)

    @property
    def used(self) -> int:
        """Bytes of what is stored, without empty room."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def room(self) -> int:
        """Bytes of empty room reserved for growth."""
        return sum(entry.room for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes that would be freed with the cache."""
        return self.used + self.room

    def by(self, *names: str) -> dict[tuple[Any, ...], int]:
        """Stored bytes summed by some of an entry's fields, for example `by("segment", "plane")`."""
        sums: dict[tuple[Any, ...], int] = defaultdict(int)
        for entry in self.entries:
            sums[tuple(getattr(entry, name) for name in names)] += entry.nbytes
        return dict(sums)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "recipe": self.recipe,
            "nbytes": self.nbytes,
            "used": self.used,
            "room": self.room,
            "left_alone": {str(i): name for i, name in self.left_alone.items()},
            "entries": [vars(entry) for entry in self.entries],
        }

    def __str__(self) -> str:
        lines = [f"{self.recipe}: {self.nbytes:,} bytes"]
        for (segment, plane, field, tier), size in sorted(self.by("segment", "plane", "field", "tier").items()):
            lines.append(f"  {' '.join(x for x in (segment, plane, field) if x):<28} {tier:<6} {size:>14,}")
        lines.append(f"  {'empty room':<35} {self.room:>14,}")
        if self.left_alone:
            names = ", ".join(f"{i} ({name})" for i, name in self.left_alone.items())
            lines.append(f"  layers left alone: {names}")
        return "\n".join(lines)

"""Codecs that differ from layer to layer, or from head to head of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvloom.core.codec import SCOPES, Codec, Plane
from kvloom.core.site import Site

__all__ = ["Differing"]


class Differing(Codec):
    """`table[layer]`: a codec for all its heads, or codecs for some of them each, which together are all.

    Stores nothing itself: a layer begins with a group of heads for each codec. The codecs must agree on unit and tap. With
    heads apart, the constants of a codec are those of its heads, and keys and values must be divided alike.
    """

    def __init__(self, table: Mapping[int, Sequence[tuple[tuple[int, ...] | None, Codec]]]) -> None:
        self.table = table
        some = next(iter(table.values()))[0][1]
        self.unit, self.tap, self.fits, self.per = some.unit, some.tap, some.fits, some.per
        self.scope = max((codec.scope for parts in table.values() for _, codec in parts), key=SCOPES.index)
        self.fits_kept = some.fits_kept

    def __repr__(self) -> str:
        return f"Differing({dict(self.table)!r})"

    def at(self, site: Site, plane: Plane) -> Sequence[tuple[tuple[int, ...] | None, Codec]]:
        return self.table[site.layer]

    def check(self, site: Site, plane: Plane) -> None:
        for _, codec in self.table[site.layer]:
            codec.check(site, plane)

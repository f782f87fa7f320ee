"""What all codecs around another codec share."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.core.step import Step

__all__ = ["Nested", "chain"]


def chain(codec: Codec | None) -> Iterator[Codec]:
    """A codec, the one inside it, and so on."""
    while codec is not None:
        yield codec
        codec = getattr(codec, "inner", None)


class Nested(Codec):
    """A codec around `inner`, whose fields it adds to: `own` says how many slots a row of each of its own fields spans."""

    def __init__(self, inner: Codec, **own: int) -> None:
        self.inner, self.own = inner, own
        self.unit, self.scope, self.tap = inner.unit, inner.scope, inner.tap
        self.fits, self.fits_kept = inner.fits, inner.fits_kept
        self.per = {**inner.per, **own}

    def check(self, site: Site, plane: Plane) -> None:
        self.inner.check(site, plane)

    def const(self, site: Site, plane: Plane) -> Const:
        return self.inner.const(site, plane)

    def fit(self, step: Step, x: Tensor) -> Const:
        return self.inner.fit(step, x)

    def within(self, block: Block) -> Block:
        """The inner codec's part of a block."""
        return {name: block[name] for name in self.inner.per if name in block}

    def besides(self, block: Block) -> Block:
        """This codec's own part of a block."""
        return {name: block[name] for name in self.own if name in block}

    def cut(self, block: Block, start: int, stop: int) -> Block:
        return {**self.inner.cut(self.within(block), start, stop), **super().cut(self.besides(block), start, stop)}

    def take(self, block: Block, slots: Tensor) -> Block:
        return {**self.inner.take(self.within(block), slots), **super().take(self.besides(block), slots)}

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return self.inner.nbytes(n, heads, dim, itemsize)

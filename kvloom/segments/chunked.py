"""One codec for the prompt, another for the chunks that come while decoding."""

from __future__ import annotations

from kvloom.core.codec import Codec, Const, Plane
from kvloom.core.site import Site

__all__ = ["Chunked", "Short"]


class Chunked(Codec):
    """What is frozen at once goes to `late` if it is one chunk of `size` tokens, else to `whole`.

    Encodes nothing itself: the plane asks for the codec of so many slots.
    """

    def __init__(self, whole: Codec, late: Codec, size: int) -> None:
        self.whole, self.late, self.size = whole, late, size
        self.scope, self.tap, self.fits = whole.scope, whole.tap, whole.fits
        self.unit, self.per = max(whole.unit, late.unit), whole.per

    def __repr__(self) -> str:
        return f"Chunked({self.whole!r}, {self.late!r}, size={self.size})"

    def check(self, site: Site, plane: Plane) -> None:
        self.whole.check(site, plane)
        self.late.check(site, plane)

    def const(self, site: Site, plane: Plane) -> Const:
        return {**self.whole.const(site, plane), **self.late.const(site, plane)}

    def sized(self, n: int) -> Codec:
        return self.late if n == self.size else self.whole

    def forms(self) -> tuple[Codec, ...]:
        return self.whole, self.late

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return self.sized(n).nbytes(n, heads, dim, itemsize)


class Short(Chunked):
    """What is frozen at once goes to `late` if it is no more than `size` tokens, else to `whole`."""

    def sized(self, n: int) -> Codec:
        return self.late if n <= self.size else self.whole

"""Only what a layer's input adds to that of the layer before it (XQuant-CL, arXiv 2508.10395)."""

from __future__ import annotations

from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site

__all__ = ["Delta"]


class Delta(Codec):
    """Layers of a group as sums: the first by `base`, and of each later one, by `code`, its difference from what the layer
    before it reads back. So the error in a layer is that of one call of a code, and does not grow with depth.

    Both codes take a slot at a time, and have the same fields. `layers`: of the group. Fields: those of the codes with the
    place of their layer in the group behind the name; a layer has its own and, in common, those of all before it.
    """

    def __init__(self, base: Codec, code: Codec, layers: int) -> None:
        assert base.unit == code.unit == 1 and list(base.per) == list(code.per)
        self.codes, self.layers, self.scope = [base] + [code] * (layers - 1), layers, "group"
        self.per = {f"{name}{i}": 1 for i in range(layers) for name in base.per}
        self.shared = frozenset(self.per)

    def __repr__(self) -> str:
        return f"Delta({self.codes[0]!r}, {self.codes[-1]!r}, layers={self.layers})"

    def check(self, site: Site, plane: Plane) -> None:
        for codec in (self.codes[0], self.codes[-1]):
            codec.check(site, plane)

    def _terms(self, block: Block) -> list[tuple[Codec, Block]]:
        """What a block adds up, the base first."""
        names = list(self.codes[0].per)
        return [
            (codec, {name: block[f"{name}{i}"] for name in names})
            for i, codec in enumerate(self.codes)
            if f"{names[0]}{i}" in block
        ]

    def encode_together(self, planes: list[Tensor], consts: list[Const]) -> list[Block]:
        blocks: list[Block] = []
        held: Block = {}
        read: Tensor | None = None
        for i, (x, const) in enumerate(zip(planes, consts, strict=True)):
            late = x if read is None else (x.float() - read).to(x.dtype)
            some = self.codes[i].encode(late, const)
            back = self.codes[i].decode(some, const).float()
            read = back if read is None else read + back
            held = {**held, **{f"{name}{i}": y for name, y in some.items()}}
            blocks.append(held)
        return blocks

    def decode(self, block: Block, const: Const) -> Tensor:
        (codec, first), *rest = self._terms(block)
        x = codec.decode(first, const).float()
        for codec, some in rest:
            x = x + codec.decode(some, const)
        return x

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        (codec, first), *rest = self._terms(block)
        out = codec.mix(p, first, const)
        for codec, some in rest:
            out = out + codec.mix(p, some, const)
        return out

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return sum(codec.nbytes(n, heads, dim, itemsize) for codec in self.codes) // self.layers

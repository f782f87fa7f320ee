"""A factor for each channel that keys are multiplied and queries divided by, so that outliers do not widen the groups: by the
prompt at hand (MiKV, arXiv 2402.18096), or learned beforehand (FireQ, arXiv 2505.20839)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.nested import Nested

if TYPE_CHECKING:
    from kvloom.core.step import Step

__all__ = ["Balance", "Scaled"]


class Scaled(Nested):
    """Stores x * b in the inner codec and asks it with q / b; what is mixed is divided by b. `factors[layer]` [H, D] fp32,
    positive; None: ones. Constants: balance [H, D] fp32.
    """

    def __init__(self, inner: Codec, factors: Mapping[int, Tensor] | None = None) -> None:
        super().__init__(inner)
        self.factors = factors

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def const(self, site: Site, plane: Plane) -> Const:
        dim = site.key_dim if plane == "key" else site.value_dim
        factors = torch.ones(site.kv_heads, dim) if self.factors is None else self.factors[site.layer]
        return {"balance": factors, **self.inner.const(site, plane)}

    def encode(self, x: Tensor, const: Const) -> Block:
        return self.inner.encode((x.float() * self._factors(x, const)).to(x.dtype), const)

    def decode(self, block: Block, const: Const) -> Tensor:
        y = self.inner.decode(block, const)
        return y / self._factors(y, const)

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        return self.inner.dot(q.float() / self._factors(q, const), block, const, scale)

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        return self.inner.mix(p, block, const) / self._factors(p, const)

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(block, const)
        return None if tile is None else tile.affine(1 / const["balance"][:, None], per=0)

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        if q is None:
            return super().terms(block, const, q)
        return self.inner.terms(block, const, q / self._factors(q, const))

    def describe(self, block: Block, const: Const, q: Tensor | None, kept: list[Tensor]) -> Any:
        if q is None:
            return super().describe(block, const, q, kept)
        kept.append((q / self._factors(q, const)).to(q.dtype))
        return self.inner.describe(block, const, kept[-1], kept)

    def _factors(self, x: Tensor, const: Const) -> Tensor:
        return const["balance"].to(x.device)[:, None]


class Balance(Scaled):
    """b = sqrt(max |q| / max |k|) by head and channel, taken from the first prompt and then frozen: codes made with one b
    can't be read with another.
    """

    def __init__(self, inner: Codec) -> None:
        super().__init__(inner)
        self.fits = True

    def const(self, site: Site, plane: Plane) -> Const:
        return self.inner.const(site, plane)

    def fit(self, step: Step, x: Tensor) -> Const:
        q = step.q.float().abs().amax((1, 2))
        k = x.abs().amax(1)
        balance = (q / k.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        return {"balance": torch.where((q > 0) & (k > 0), balance, 1.0), **self.inner.fit(step, x)}

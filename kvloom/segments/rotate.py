"""A rotation inside each head, so that no channel stands out: folded into the query, unfolded from the output."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from kvloom.core.codec import Block, Codec, Const, Plane
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Term, Tile
from kvloom.segments.nested import Nested

__all__ = ["Rotate", "Rotation", "hadamard", "rotation"]

Rotation = Literal["haar", "hadamard", "fourier"]


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, a power of two; its own inverse. fp32, O(D log D)."""
    y: Tensor = x.float()
    step = 1
    while step < x.shape[-1]:
        a, b = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        step *= 2
    return y.mul(x.shape[-1] ** -0.5)


@functools.cache
def rotation(how: Rotation, dim: int, seed: int | None) -> Tensor:
    """An orthogonal matrix [1, D, D] fp32, always the same tensor: drawn evenly, or Hadamard's with random signs (seed=None:
    without, so that it is its own inverse)."""
    draw = torch.Generator().manual_seed(seed or 0)
    with torch.inference_mode(False):
        if how == "hadamard" and seed is None:
            return hadamard(torch.eye(dim))[None]
        if how == "hadamard":
            signs = torch.randint(0, 2, (dim,), generator=draw) * 2.0 - 1
            return (hadamard(torch.eye(dim)) * signs)[None]
        if how == "fourier":  # the real and imaginary parts of rfft, without those that are always zero, at length 1
            waves = torch.fft.rfft(torch.eye(dim, dtype=torch.float64), dim=0)
            parts = torch.cat([waves.real, waves.imag[1 : (dim + 1) // 2]])
            return torch.nn.functional.normalize(parts, dim=1).float()[None]
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64))
        even: Tensor = (q * r.diagonal().sign()).float().contiguous()[None]
        return even


class Rotate(Nested):
    """Stores P x in the inner codec. Queries are asked as P q, and sums of values turn back by P^T.

    "haar": a matrix drawn evenly among all rotations, for any head size; "hadamard": head sizes that are powers of two;
    "fourier": the real and imaginary parts of a Fourier transform, none of them twice.
    Constants: rotation [1, D, D] fp32, one for the model.
    """

    def __init__(self, inner: Codec, how: Rotation = "haar", seed: int | None = 0) -> None:
        if how not in ("haar", "hadamard", "fourier"):
            raise RecipeError(f"rotation={how!r} must be 'haar', 'hadamard' or 'fourier'.")
        super().__init__(inner)
        self.how, self.seed = how, seed

    def __repr__(self) -> str:
        return f"Rotate({self.inner!r}, {self.how!r})"

    def check(self, site: Site, plane: Plane) -> None:
        dim = site.key_dim if plane == "key" else site.value_dim
        if self.how == "hadamard" and dim & (dim - 1):
            raise RecipeError(f"rotation='hadamard' needs a head size that is a power of two, not {dim}. Use 'haar'.")
        self.inner.check(site, plane)

    def const(self, site: Site, plane: Plane) -> Const:
        dim = site.key_dim if plane == "key" else site.value_dim
        return {"rotation": rotation(self.how, dim, self.seed), **self.inner.const(site, plane)}

    def encode(self, x: Tensor, const: Const) -> Block:
        return self.inner.encode(self._on(x, const).to(x.dtype), const)

    def decode(self, block: Block, const: Const) -> Tensor:
        return self.inner.decode(block, const).float() @ self._matrix(block, const)

    def dot(self, q: Tensor, block: Block, const: Const, scale: float) -> Tensor:
        return self.inner.dot(self._on(q, const), block, const, scale)

    def mix(self, p: Tensor, block: Block, const: Const) -> Tensor:
        return self.inner.mix(p, block, const) @ self._matrix(block, const)

    def tile(self, block: Block, const: Const) -> Tile | None:
        tile = self.inner.tile(block, const)
        return None if tile is None else tile.expand(self._matrix(block, const))

    def terms(self, block: Block, const: Const, q: Tensor | None) -> list[Term] | None:
        terms = self.inner.terms(block, const, None if q is None else self._on(q, const))
        if terms is None or q is not None:
            return terms
        back = self._matrix(block, const).transpose(1, 2).contiguous()
        return [term.then(back) for term in terms]

    def _on(self, x: Tensor, const: Const) -> Tensor:
        return x.float() @ const["rotation"].to(x.device).transpose(1, 2)

    def _matrix(self, block: Block, const: Const) -> Tensor:
        return const["rotation"].to(next(iter(block.values())).device)

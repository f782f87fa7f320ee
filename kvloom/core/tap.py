"""Where in a layer keys are taken from: a codec that asks for keys before RoPE gets them so, and they turn again when read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.project import Projection
from kvloom.core.rope import Rope
from kvloom.core.site import Site
from kvloom.errors import ModelError, RecipeError
from kvloom.kernels.tile import Term, Tile

if TYPE_CHECKING:
    from kvloom.core.run import Run

__all__ = ["InputValues", "Inputs", "Tap", "inputs_of", "tap_of"]

SUMMED = 512  # channels that compiled kernels sum


@dataclass(frozen=True, eq=False)
class Tap:
    """`rope` as the layer has it (None: it does not rotate keys); `dtype`: the model's, in which it rounds."""

    rope: Rope | None
    dtype: torch.dtype

    def off(self, keys: Tensor, at: Tensor) -> Tensor:
        """Keys [h, n, D] as the model caches them -> before RoPE; at [h or 1, n]: their places in the text."""
        return keys if self.rope is None or not keys.shape[-1] else self.rope.unrotate(keys, at)

    def on(self, keys: Tensor, at: Tensor) -> Tensor:
        """The inverse."""
        return keys if self.rope is None or not keys.shape[-1] else self.rope.rotate(keys.to(self.dtype), at)

    def tile(self, tile: Tile, at: Tensor | None, start: int) -> Tile:
        """`on` as a step of a tile, for slots at these places [h or 1, n] or from `start` on. Products are not rounded."""
        rope = self.rope
        if rope is None:
            return tile
        most = start + tile.n if at is None else int(at.max()) + 1
        rounded = torch.float32 if rope.rounding == "none" else self.dtype
        return tile.turn(
            rope.inv_freq, rope.scaling, rope.offset, rope.layout == "interleaved", at, start, most, rounded
        )


@dataclass(frozen=True, eq=False)
class Inputs(Tap):
    """Keys made of the layer's inputs, which are what is stored: [1, n, hidden]. `project`: the layer's own weights."""

    project: Projection | None = None

    def off(self, keys: Tensor, at: Tensor) -> Tensor:
        """What comes are inputs already."""
        return keys

    def check(self, x: Tensor, hidden: Tensor, layer: int) -> None:
        """Raises ModelError if x [H, n, D], first in its text, is not what comes of these inputs."""
        if not hidden.shape[-1]:
            return
        found = self.on(hidden, torch.arange(x.shape[1], device=x.device)[None]).float()
        if float((found - x).abs().max()) > max(1e-3, 16 * torch.finfo(x.dtype).eps) * float(x.abs().max()):
            raise ModelError(
                f"layer {layer}: keys and values are not just its input times its weights, so they can't be made of it again. "
                "Use a recipe that stores them, such as kivi."
            )

    def on(self, keys: Tensor, at: Tensor) -> Tensor:
        """Inputs -> keys [H, n, D] as the model caches them."""
        if self.project is None or not keys.shape[-1]:
            return keys
        return super().on(self.project.keys(keys[0].to(self.dtype)), at)

    def term(self, tile: Tile, q: Tensor | None, at: Tensor | None, start: int) -> Term | None:
        """Inputs as keys for kernels; None where these can't make them. `q`: the queries, `at`, `start`: as `tile` has them."""
        if self.project is None or self.project.norm is not None or q is None:
            return None
        tile = tile.expand(self.project.key.mT.contiguous())
        if self.project.key_bias is not None:
            tile = tile.affine(None, self.project.key_bias[:, None], per=0)
        return Term(self.tile(tile, at, start), q)


@dataclass(frozen=True, eq=False)
class InputValues(Inputs):
    """Values made of the layer's inputs."""

    def on(self, keys: Tensor, at: Tensor) -> Tensor:
        """Inputs -> values [H, n, Dv]."""
        return keys if self.project is None or not keys.shape[-1] else self.project.values(keys[0].to(self.dtype))

    def term(self, tile: Tile, q: Tensor | None, at: Tensor | None, start: int) -> Term | None:
        """Inputs as values: summed as they are and projected once, where kernels hold so wide a sum."""
        if self.project is None:
            return None
        value, bias = self.project.value, self.project.value_bias
        if tile.width <= SUMMED and bias is None:
            return Term(tile).then(value.contiguous())
        tile = tile.expand(value.mT.contiguous())
        return Term(tile if bias is None else tile.affine(None, bias[:, None], per=0))

    def mix(self, run: Run, p: Tensor) -> Tensor:
        """Sums of values weighted by p [H, R, n]: those of the inputs, projected once."""
        assert self.project is not None
        h, rows, n = p.shape
        x = run.codec.mix(p.reshape(1, h * rows, n), run.part(0, n), run.const)
        return self.project.mixed(x.view(h, rows, -1), p.sum(-1, keepdim=True))


def tap_of(site: Site, recipe: str = "") -> Tap:
    """The tap of a layer. Raises RecipeError where its frequencies change with the length of the text."""
    rope = site.rope
    if rope is not None and rope.varies:
        raise RecipeError(
            f"{recipe or 'a codec'} stores keys from before RoPE, but frequencies of rope_type={rope.kind!r} in layer "
            f"{site.layer} change with the length of the text, so keys can't be turned back. Use a recipe such as kivi."
        )
    return Tap(rope, site.dtype)


def inputs_of(site: Site, recipe: str = "") -> tuple[Inputs, InputValues]:
    """Taps of a layer whose inputs are stored in the place of its keys and values. Raises RecipeError or ModelError."""
    tap = tap_of(site, recipe)
    return tuple(kind(tap.rope, tap.dtype, site.projection) for kind in (Inputs, InputValues))  # type: ignore[return-value]

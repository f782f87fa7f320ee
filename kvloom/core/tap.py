"""Where in a layer keys are taken from: a codec that asks for keys before RoPE gets them so, and they turn again when read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.rope import Rope
from kvloom.core.site import Site
from kvloom.errors import RecipeError
from kvloom.kernels.tile import Tile

__all__ = ["Tap", "tap_of"]


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


def tap_of(site: Site, recipe: str = "") -> Tap:
    """The tap of a layer. Raises RecipeError where its frequencies change with the length of the text."""
    rope = site.rope
    if rope is not None and rope.varies:
        raise RecipeError(
            f"{recipe or 'a codec'} stores keys from before RoPE, but frequencies of rope_type={rope.kind!r} in layer "
            f"{site.layer} change with the length of the text, so keys can't be turned back. Use a recipe such as kivi."
        )
    return Tap(rope, site.dtype)

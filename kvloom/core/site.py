"""Where a recipe acts: one attention layer of one model, as numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvloom.core.project import Projection
    from kvloom.core.rope import Rope

__all__ = ["Site"]


@dataclass(frozen=True)
class Site:
    """One attention layer. `layers` counts the layers that the recipe manages, the base of a budget in bytes."""

    layer: int
    layers: int
    q_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    find_rope: Callable[[], Rope | None] = field(repr=False, compare=False)
    hidden: int = 0
    find_projection: Callable[[Site], Projection] | None = field(default=None, repr=False, compare=False)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @property
    def itemsize(self) -> int:
        """Bytes of one exact number."""
        return self.dtype.itemsize

    @property
    def projection(self) -> Projection | None:
        """How this layer makes keys and values of its input, [n, hidden]; None where there is no model to ask."""
        return None if self.find_projection is None else self.find_projection(self)

    @property
    def rope(self) -> Rope | None:
        """How this layer rotates keys; None where it has no rotary embedding."""
        return self.find_rope()

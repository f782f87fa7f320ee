"""What a class of slots is: how it is stored, when it is encoded, how attention takes it in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from kvloom.core.codec import SCOPES, Codec, Const, Exact, Plane, Scope, of_heads
from kvloom.core.site import Site
from kvloom.core.tap import InputValues, Tap, inputs_of, tap_of

if TYPE_CHECKING:
    from kvloom.core.select import Selector

__all__ = ["EXACT", "Kind", "Merge", "Tail"]

EXACT = Exact()


@dataclass(frozen=True)
class Tail:
    """When a plane freezes: `every` slots at a time, of those older than the newest `keep`; `decode`: while decoding, too."""

    every: int = 1
    keep: int = 0
    decode: bool = True

    def due(self, n: int, decoding: bool = False) -> int:
        """How many of n exact slots are to be frozen now."""
        return 0 if decoding and not self.decode else max(0, n - self.keep) // self.every * self.every


@dataclass(frozen=True)
class Merge:
    """How a class joins the softmax if it is attended to apart: its logits are divided by `temperature`, and the log-sum-exp
    of all its slots together is multiplied by `power` before it is merged with that of the others (APE, arXiv 2502.05431).
    """

    temperature: float = 1.0
    power: float = 1.0


@dataclass(frozen=True)
class Kind:
    """How one class of slots is stored. `fold`: what arrives is merged into one slot per head.

    `turn`: the class keeps its distance to the newest tokens as if nothing between had been dropped, by rotating the
    query (StreamingLLM's positions inside the cache). `hidden`: the key plane holds the layer's inputs [1, n, hidden], of
    which both keys and values are made again when they are read; the value plane holds nothing. `merge`: the class is attended to apart, and joined that way.
    `select`: decoded tokens read only what it picks; its slots stay in the order in which they came.
    """

    key: Codec = EXACT
    value: Codec = EXACT
    key_tail: Tail = Tail()
    value_tail: Tail = Tail()
    fold: bool = False
    turn: bool = False
    hidden: bool = False
    merge: Merge | None = None
    select: Selector | None = None
    tap: Tap | None = field(default=None, compare=False, repr=False)
    value_tap: InputValues | None = field(default=None, compare=False, repr=False)
    key_const: Const = field(default_factory=dict, compare=False, repr=False)
    value_const: Const = field(default_factory=dict, compare=False, repr=False)

    def at(self, site: Site, heads: tuple[int, ...] | None = None) -> Kind:
        """The kind in one layer, or for some of its heads: where keys are taken from, and what its codecs know there before
        any text.
        """
        key, key_const = _of(self.key, site, "key", heads)
        value, value_const = _of(self.value, site, "value", heads)
        tap, value_tap = inputs_of(site) if self.hidden else (tap_of(site) if key.tap == "pre-rope" else None, None)
        return replace(
            self, key=key, value=value, tap=tap, value_tap=value_tap, key_const=key_const, value_const=value_const
        )

    def shape(self, site: Site, plane: Plane) -> tuple[int, int]:
        """Heads and channels of what a plane holds."""
        if self.hidden:
            return (1, site.hidden) if plane == "key" else (1, 0)
        return site.kv_heads, site.key_dim if plane == "key" else site.value_dim

    @property
    def scope(self) -> Scope:
        """The widest set of heads or layers that is encoded together."""
        return max((self.key.scope, self.value.scope, "layer" if self.hidden else "head"), key=SCOPES.index)

    @property
    def exact(self) -> bool:
        return self.key.exact and self.value.exact and not self.hidden

    @property
    def unit(self) -> int:
        """Slots that are freed together once frozen."""
        return max(self.key.unit, self.value.unit)

    def frozen(self, n: int) -> tuple[int, int]:
        """Slots of the key plane and of the value plane that are encoded when n are held."""
        keys = 0 if self.key.exact else self.key_tail.due(n)
        return keys, 0 if self.value.exact else self.value_tail.due(n)


def _of(codec: Codec, site: Site, plane: Plane, heads: tuple[int, ...] | None) -> tuple[Codec, Const]:
    """The codec of some heads of a layer, or of all, and its constants."""
    parts = dict(codec.at(site, plane))
    if heads in parts:
        return parts[heads], parts[heads].const(site, plane)
    const = parts[None].const(site, plane)
    return parts[None], {name: of_heads(x, torch.tensor(heads)) for name, x in const.items()}

"""One reading of a text with a full cache: keys and values as cached, before rotation, and where queries looked.

Sliding-window layers, which kvloom else leaves to their stock cache, are read in full here, under their own mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvloom.core.attention import Logits
from kvloom.core.cache import KVCache, KVLayer
from kvloom.core.group import Group
from kvloom.core.rope import Rope
from kvloom.core.site import Site
from kvloom.core.update import Mask, watched
from kvloom.core.view import sites_of, text_config
from kvloom.errors import KvloomError, ModelError
from kvloom.lab.inspect.masses import Masses

__all__ = ["LEAST", "Capture", "Captured", "capture"]

CHUNK = 512  # tokens of one forward
LEAST = 64  # tokens that a text needs, so that half of them are a context
Tell = Callable[[str], None]


@dataclass
class Captured:
    """One layer after the reading. keys, values [H, T, D] in the model's dtype, keys as cached (rotated).

    `unrotated`: why keys cannot be given as before rotation, or "" if they can. `window`: tokens that a row of this layer
    sees at most, None if all.
    """

    layer: int
    keys: Tensor
    values: Tensor
    masses: Masses
    rope: Rope | None
    unrotated: str
    window: int | None

    def before_rotation(self) -> Tensor | None:
        """Keys [H, T, D] before rotation (after the key norm, if there is one); None: see `unrotated`."""
        if self.unrotated or self.rope is None:
            return None
        return self.rope.unrotate(self.keys, torch.arange(self.keys.shape[1], device=self.keys.device))


@dataclass
class Capture:
    """All attention layers that keep a KV cache, and why the others do not count."""

    tokens: int
    layers: list[Captured]
    others: dict[int, str] = field(default_factory=dict)


def _whole(model: PreTrainedModel) -> tuple[KVCache, dict[int, KVLayer]]:
    """A full cache, and its layers that keep keys and values, those with sliding windows included."""
    cache = KVCache(model, "full")
    stock = {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    for i, site in sites_of(model).items():
        if type(cache.layers[i]).__name__ in stock:
            cache.left_alone.pop(i, None)
            cache.layers[i] = KVLayer(cache, site)
    return cache, {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, KVLayer)}


def _stored(layer: KVLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole text so far, [H, n, D]."""
    main = layer.rows[0].layer.groups[0].segments["main"]
    return main.key.dense(0, main.n), main.value.dense(0, main.n)


def _bias(mask: Mask, layer: KVLayer, keys: Tensor) -> Tensor | None:
    """What the mask adds to the logits of n tokens where it is more than causal, [1 or H, 1 or g, m, n] fp32, for keys [H, n, D]."""
    visible = None if mask is None else mask.row(0, layer.rows[0].gaps, None)
    if visible is None:
        return None
    shown = visible(torch.arange(keys.shape[1], device=keys.device)[None], Group({}))
    if shown.dtype == torch.bool:
        return torch.zeros(shown.shape, device=shown.device).masked_fill_(~shown, -torch.inf)
    return shown.float()


def _window(config: Any, layer: int, tokens: int) -> int | None:
    """Tokens that the layer sees at most, by the configuration's word; None if that is no limit for this text."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "sliding_attention"
    size = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }.get(kind)
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return size if isinstance(size, int) and size < tokens else None


def _unrotated(site: Site) -> tuple[Rope | None, str]:
    """The layer's rotation, and why its keys cannot be turned back ("" if they can)."""
    try:
        rope = site.rope
    except ModelError as error:
        return None, str(error)
    if rope is None:
        return None, "this layer does not rotate its keys"
    if rope.varies:
        return rope, f"the frequencies of {rope.kind!r} RoPE change with the length of the text"
    return rope, ""


@torch.no_grad()
def capture(model: PreTrainedModel, ids: Tensor, tell: Tell = lambda step: None) -> Capture:
    """Reads token ids [1, T] in chunks of 512 with a full cache. `tell` is called before each chunk.

    Raises KvloomError for a text that is too short or longer than the model's positions, ModelError for a model without
    a KV cache of its own in any layer, or one whose layers share keys and values.
    """
    tokens, config = ids.shape[1], text_config(model)
    if ids.shape[0] != 1 or tokens < LEAST:
        raise KvloomError(
            f"a text of {tokens} tokens (batch {ids.shape[0]}) is too short; give one of at least {LEAST}."
        )
    cache, held = _whole(model)
    if not held:
        raise ModelError(f"model {type(model).__name__} has no layer with a KV cache, so there is nothing to inspect.")
    turns = {i: _unrotated(layer.site) for i, layer in held.items()}
    longest = getattr(config, "max_position_embeddings", None)
    stretches = any(rope is not None and rope.varies for rope, _ in turns.values())
    if longest and tokens > longest and not stretches:
        raise KvloomError(f"tokens={tokens} is more than the model's {longest} positions; give at most that.")
    masses = {i: Masses(tokens) for i in held}

    def look(i: int, query: Tensor, output: Tensor, logits: Logits, mask: Mask, sinks: Tensor | None) -> None:
        keys, _ = _stored(held[i])
        bias = _bias(mask, held[i], keys)
        masses[i].add(query[0], keys, logits.scale, logits.softcap, bias, sinks)

    training = model.training
    model.eval()
    try:
        for at in range(0, tokens, CHUNK):
            tell(f"reading token {at:,} of {tokens:,}")
            chunk = ids[:, at : at + CHUNK].to(model.device)
            with watched(look):
                model.base_model(chunk, past_key_values=cache, use_cache=True)
    finally:
        model.train(training)
    layers = []
    for i, layer in held.items():
        if not layer.rows:
            continue  # keys come from another layer
        keys, values = _stored(layer)
        layers.append(Captured(i, keys, values, masses[i].mean(), *turns[i], _window(config, i, tokens)))
    return Capture(tokens, layers, dict(cache.left_alone))

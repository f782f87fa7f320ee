"""What a recipe needs to know of a transformers model: its attention layers as sites, and a fingerprint."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from kvloom.core.project import projection_of
from kvloom.core.rope import Rope, rope_of
from kvloom.core.site import Site
from kvloom.errors import ModelError

__all__ = ["fingerprint", "kv_heads_of", "last_logits", "sites_from", "sites_of", "text_config"]


def text_config(model: PreTrainedModel) -> Any:
    """The decoder's configuration. Raises ModelError for what is not a decoder-only transformers model."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model is a {type(model).__name__}; pass a transformers PreTrainedModel.")
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"model {type(model).__name__} is an encoder-decoder; KVCache serves decoder-only models. Use a stock cache."
        )
    return model.config.get_text_config(decoder=True)


def sites_of(model: PreTrainedModel) -> dict[int, Site]:
    """One site for each decoder layer, from the configuration; shapes are confirmed by the first keys."""
    config = text_config(model)
    dtype = model.dtype if isinstance(model.dtype, torch.dtype) else torch.float32
    found = sites_from(config, dtype, partial(partial, rope_of, model), f"model {type(model).__name__}")
    return {i: replace(site, find_projection=partial(projection_of, model)) for i, site in found.items()}


def last_logits(model: PreTrainedModel) -> dict[str, int]:
    """The option of a forward that wants no more logits than the last token's, where the model has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def kv_heads_of(config: Any) -> int:
    """KV heads that a layer caches, as a decoder's configuration tells them."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def sites_from(
    config: Any, dtype: torch.dtype, find_rope: Callable[[int], Callable[[], Rope | None]], name: str
) -> dict[int, Site]:
    """`sites_of` a decoder's configuration alone. `find_rope(layer)()`: how that layer rotates keys."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not hasattr(config, "num_hidden_layers"):
        raise ModelError(f"{name} has no attention heads that its configuration tells of.")
    kv_heads = kv_heads_of(config)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        i: Site(i, config.num_hidden_layers, heads, kv_heads, dim, dim, dtype, find_rope(i), config.hidden_size)
        for i in range(config.num_hidden_layers)
    }


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration's shape and of numbers from every weight: another model has another one."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((model.config.model_type, type(model).__name__)).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()

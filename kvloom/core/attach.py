"""Registers kvloom's attention and mask functions with transformers, reversibly.

The registered functions serve kvloom caches; everything else goes to the implementation that the model had before.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvloom.core.handle import Handle
from kvloom.core.mask import LazyMask
from kvloom.core.project import attentions
from kvloom.core.view import text_config
from kvloom.errors import CacheError

__all__ = ["announce", "attach", "detach", "follow", "listen", "registered"]

NAME = "kvloom"
_local = threading.local()


class _Name(str):
    """The name of kvloom's attention in a model's configuration. Remembers the former name, also in copies of the model."""

    before: str

    @classmethod
    def over(cls, before: str) -> _Name:
        name = cls(NAME)
        name.before = before
        return name


def registered(config: Any) -> bool:
    """Whether the model with this text configuration calls kvloom's attention function."""
    return bool(config._attn_implementation == NAME)


def attach(model: PreTrainedModel) -> None:
    """Makes the model call kvloom's attention function. A model that calls torch itself is served through its handles."""
    config = text_config(model)
    if registered(config) or not getattr(model, "_supports_attention_backend", False):
        return
    config._attn_implementation = _Name.over(config._attn_implementation)


def listen(model: PreTrainedModel) -> None:
    """Makes attention layers tell the input of each call to a kvloom cache that came with it. Other caches notice nothing."""
    for module in attentions(model).values():
        if _hear not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_hear, with_kwargs=True)


def _hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = next((x for x in (*kwargs.values(), *args) if hasattr(x, "hear")), None)
    if cache is not None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache.hear(module.layer_idx, hidden.detach())


def detach(model: PreTrainedModel) -> None:
    """Gives the model its own attention implementation back."""
    for module in attentions(model).values():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _hear:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    config = text_config(model)
    for key, hook in list(model._forward_hooks.items()):
        if hook is _after:
            del model._forward_hooks[key], model._forward_hooks_with_kwargs[key]
    if registered(config):
        config._attn_implementation = _stock(config)


def follow(model: PreTrainedModel) -> None:
    """Makes the model tell a cache whose recipe reads the text again, after each forward, which tokens it was fed."""
    if _after not in model._forward_hooks.values():
        model.register_forward_hook(_after, with_kwargs=True)


def _after(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    fed = getattr(kwargs.get("past_key_values"), "fed", None)
    if fed is not None:
        fed(model, args[0] if args else kwargs.get("input_ids"))


def _stock(config: Any) -> str:
    return getattr(config._attn_implementation, "before", "sdpa")


def announce(cache: Any, query_length: int, kv_length: int) -> None:
    """Tells the mask function, which transformers calls next in this thread, whose mask it is to make."""
    _local.asked = (weakref.ref(cache), query_length, kv_length)


def _mask(**arguments: Any) -> Any:
    """The registered mask function: a lazy mask for kvloom caches, the former implementation's mask otherwise."""
    asked, _local.asked = getattr(_local, "asked", None), None
    config = arguments.get("config")
    cache = asked[0]() if asked is not None else None
    sizes = (arguments["q_length"], arguments["kv_length"])
    if asked is None or cache is None or cache.config is not config or asked[1:] != sizes:
        stock = _stock(config)
        return ALL_MASK_ATTENTION_FUNCTIONS[stock](**arguments) if stock in ALL_MASK_ATTENTION_FUNCTIONS else None
    return LazyMask(arguments, cache)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: query [B, Hq, m, D] -> [B, m, Hq, Dv]."""
    if isinstance(key, Handle):
        if module.config is not key.update.layer.cache.config:
            raise CacheError("this KVCache was made for another model. Make a new KVCache(model, recipe).")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return key.update.attend(query, attention_mask, scale, softcap, s_aux), None
    stock = _stock(module.config)
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.dense(stock)
    for name, x in (("scaling", scaling), ("softcap", softcap), ("s_aux", s_aux)):
        if x is not None:
            kwargs[name] = x
    return _function(stock, module)(module, query, key, value, attention_mask, **kwargs)


def _function(stock: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    eager: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(stock, eager)
    return found


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)

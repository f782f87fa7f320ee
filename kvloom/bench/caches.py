"""Caches by name: kvloom's, and the stock ones that they stand beside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache, StaticCache

import kvloom
from kvloom.bench import models
from kvloom.bench.timing import silent
from kvloom.core.attach import attach
from kvloom.core.profile import default_path
from kvloom.core.registry import recipes
from kvloom.core.view import text_config
from kvloom.errors import ModelError, ProfileError, RecipeError

__all__ = [
    "AGAINST",
    "BACKENDS",
    "RECIPES",
    "STOCK",
    "LeftOut",
    "cache_for",
    "codecs",
    "copied",
    "nbytes",
    "quantized",
    "switch",
]

STOCK = "DynamicCache"
RECIPES = ("full", "streamingllm", "h2o", "snapkv", "razorattention", "mikv", "kivi(bits=2)", "snapkv | kivi")
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}  # what transformers needs for them; fp8 needs nothing
BACKENDS: dict[str, dict[str, int]] = {  # options that transformers advises; 4 bits in groups of 64
    "quanto": {"nbits": 4, "axis_key": 0, "axis_value": 0},
    "hqq": {"nbits": 4, "axis_key": 1, "axis_value": 1},
    "fp8": {},
}
AGAINST = ("StaticCache", *BACKENDS)
TEXT = 1024  # tokens that a profile of a random model is made of


class LeftOut(Exception):
    """A contender that cannot take part; the text says why."""


def codecs(model: PreTrainedModel) -> list[str]:
    """Every recipe that stores numbers in fewer bits or channels, at its default options, and others of which two ways count."""
    found = []
    for name in recipes():
        made = kvloom.parse(name)
        with contextlib.suppress(RecipeError):  # it looks at weights first
            made = made.sketched(text_config(model))
        if not all(kind.exact for kind in made.kinds.values()):
            found.append(name)
    return [*found, "xkv(keys='post-rope')", "xquant(across=True)", "million(width=4)"]


def cache_for(model: PreTrainedModel, name: str) -> Cache:
    """DynamicCache or a recipe's cache; the model's attention is registered to match.

    What a recipe has to learn of a random model it learns of random text: its time is the same. Raises LeftOut where it lacks a
    profile of another model or can't serve it.
    """
    if name == STOCK:
        kvloom.detach(model)
        return DynamicCache(config=model.config)
    try:
        return kvloom.KVCache(model, name)
    except ProfileError as error:
        learn = kvloom.parse(name).calibrate
        if learn is None or model.config._name_or_path:
            raise LeftOut(str(error)) from error
        learn(model, models.prompt(model, TEXT)[0], default_path(model, name.partition("(")[0]), silent)
        return kvloom.KVCache(model, name)
    except (RecipeError, ModelError) as error:
        raise LeftOut(str(error)) from error


def switch(model: PreTrainedModel, cache: Cache) -> None:
    """Registers the attention that goes with a cache, so that one model serves all of them in turns."""
    (attach if isinstance(cache, kvloom.KVCache) else kvloom.detach)(model)


def quantized(backend: str, config: Any) -> Cache:
    """An empty QuantizedCache of transformers. Raises LeftOut if the backend is not there."""
    try:
        return QuantizedCache(backend, config, **BACKENDS[backend])
    except ImportError as error:
        package = PACKAGES.get(backend, backend)
        raise LeftOut(f"not installed (pip install {package})") from error
    except ValueError as error:  # layers with sliding windows, or a backend that this transformers does not know
        raise LeftOut(str(error)) from error


def copied(source: DynamicCache, model: PreTrainedModel, name: str, room: int) -> Cache:
    """A stock cache of AGAINST with the keys and values of a full one, and room for that many slots in all.

    Saves a prefill, and the mask of slots x slots that a static cache asks for in one.
    """
    if any(type(layer) is not DynamicLayer for layer in source.layers):
        raise LeftOut("only layers that attend to everything are copied")
    if name == "StaticCache":
        cache: Cache = StaticCache(config=model.config, max_cache_len=room)
    else:
        cache = quantized(name, model.config)
    for i, layer in enumerate(source.layers):
        cache.update(layer.keys, layer.values, i)
    return cache


def nbytes(cache: Cache) -> int:
    """Bytes of everything that the cache holds, scales and empty room included."""
    if isinstance(cache, kvloom.KVCache):
        return cache.nbytes
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors([*map(vars, cache.layers)])}
    return sum(held.values())


def _tensors(x: Any) -> Iterator[Tensor]:
    """All plain tensors inside; those of quanto consist of others."""
    if isinstance(x, Tensor) and hasattr(x, "__tensor_flatten__"):
        x = [getattr(x, name) for name in x.__tensor_flatten__()[0]]
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict | list | tuple):
        for each in x.values() if isinstance(x, dict) else x:
            yield from _tensors(each)

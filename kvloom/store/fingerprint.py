"""The identity of a model's caches: every weight, the tokenizer, rotations, adapters, and all that a recipe does to numbers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.portable import Shape, movable, shape_of
from kvloom.core.recipe import Recipe
from kvloom.errors import ModelError, StoreError
from kvloom.kernels import native
from kvloom.store.extra import need
from kvloom.store.identity import Identity, digest_of

if TYPE_CHECKING:
    import xxhash
else:
    xxhash = need("xxhash")

__all__ = ["describe", "fingerprint", "forget", "hashed", "identity_of", "shapes_of", "tokenizer_digest"]

_Known = tuple[Any, str, tuple[Shape, ...]]  # what was looked at, the digest, shapes of keys and values by layer
_known: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()


def identity_of(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe | str,
    adapter: str,
    tenant: str,
    block: int,
    shard: tuple[int, int],
) -> Identity:
    """See `Identity.of`."""
    if not isinstance(block, int) or block < 1:
        raise StoreError(f"block={block!r} tokens in a chunk; give 1 or more.")
    cache = KVCache(model, recipe)
    _refuse(cache)
    _, weights, shapes = _look(model)
    return Identity(
        weights=weights,
        tokenizer=tokenizer_digest(tokenizer),
        dtype=str(shapes[0][3]).removeprefix("torch."),
        layout=tuple(shape[:3] for shape in shapes),
        rope=_rope(cache),
        adapter=digest_of("adapter", adapter, *_adapters(model)) if adapter or _adapters(model) else "",
        recipe=describe(cache.recipe, block),
        salt=tenant,
        shard=shard,
    )


def _refuse(cache: KVCache) -> None:
    try:
        layers = movable(cache)
    except ModelError as error:
        raise StoreError(str(error)) from error
    for layer in layers:
        rope = layer.site.rope
        if rope is not None and rope.varies:
            raise StoreError(
                f"frequencies of {rope.kind!r} RoPE change with the length of the text, so keys of a beginning do not serve "
                "a longer text. Give the model a fixed kind, such as 'yarn'."
            )


# ---- weights


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of every byte of every parameter and buffer, and of the configuration. XXH3-128 by tensor, BLAKE2b over all.

    Remembered for the model until a tensor of it is another one or was written to. Writes through `.data` leave no trace in
    torch, and none here, except those of merged adapters; call `forget(model)` after others.
    """
    return _look(model)[1]


def shapes_of(model: PreTrainedModel) -> tuple[Shape, ...]:
    """Heads, widths and dtype of the keys and values that every layer really caches: the model runs on one token."""
    return _look(model)[2]


def forget(model: PreTrainedModel) -> None:
    """The next look at a model reads all of it again."""
    _known.pop(model, None)


def _look(model: PreTrainedModel) -> _Known:
    now = _signature(model)
    known = _known.get(model)
    if known is None or now is None or known[0] != now:
        known = (now, hashed(model), _probe(model))
        if now is not None:
            known = (_signature(model), *known[1:])  # the probe may have been the first to use a buffer
        _known[model] = known
    return known


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _signature(model: PreTrainedModel) -> Any:
    """What changes when a weight does; None where torch does not tell (inference tensors)."""
    found = []
    for name, x in _tensors(model):
        if x.is_inference():
            return None
        found.append((name, x.data_ptr(), x._version, x.dtype, x.device.type))
    return found, _adapters(model), _config(model)


def hashed(model: PreTrainedModel) -> str:
    """`fingerprint`, computed now."""
    parts: list[Any] = ["weights", type(model).__qualname__, _config(model)]
    for name, x in _tensors(model):
        parts.append((name, str(x.dtype), tuple(x.shape), digest_of_tensor(x)))
    return digest_of(*parts)


def digest_of_tensor(x: Tensor) -> str:
    """XXH3-128 of a tensor's bytes, in order."""
    if x.is_meta:
        raise StoreError("weights are on the meta device; load them before the store is attached.")
    if hasattr(x, "__tensor_flatten__"):  # made of other tensors, as quantized weights of torchao are
        names, context = x.__tensor_flatten__()
        return digest_of(str(type(x)), repr(context), *(digest_of_tensor(getattr(x, name)) for name in names))
    flat = x.detach().contiguous().cpu().flatten()
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return str(xxhash.xxh3_128(data).hexdigest())


def _config(model: PreTrainedModel) -> str:
    """The configuration without what says nothing of the numbers: names, versions, how attention is computed."""
    found = model.config.to_dict()
    for name in ("transformers_version", "architectures", "use_cache", "attn_implementation", "dtype", "torch_dtype"):
        found.pop(name, None)
    return json.dumps({k: v for k, v in found.items() if not k.startswith("_")}, sort_keys=True, default=str)


def _adapters(model: PreTrainedModel) -> tuple[Any, ...]:
    """What PEFT's layers say of themselves: which adapters are on, merged or switched off, and how strong they are.

    Their weights are parameters of the model and in its fingerprint.
    """
    found = []
    for name, module in model.named_modules():
        on = getattr(module, "active_adapters", None)
        if on is None or callable(on) or not hasattr(module, "scaling"):
            continue
        strength = tuple(sorted((str(k), str(v)) for k, v in dict(module.scaling).items()))
        merged = tuple(map(str, getattr(module, "merged_adapters", ())))
        found.append((name, tuple(map(str, on)), strength, merged, bool(getattr(module, "disable_adapters", False))))
    return tuple(found)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> tuple[Shape, ...]:
    cache = KVCache(model)
    training = model.training
    model.eval()
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model.base_model(token, past_key_values=cache, use_cache=True)
    finally:
        model.train(training)
    return tuple(shape_of(layer.site) for layer in movable(cache))


def _rope(cache: KVCache) -> tuple[tuple[str, Any], ...]:
    """How each layer rotates keys, as far as it differs from the layer before."""
    found: list[tuple[str, Any]] = []
    for layer in cache.managed():
        rope = layer.site.rope
        facts: Any = None
        if rope is not None:
            inv_freq = digest_of_tensor(rope.inv_freq)
            facts = (rope.kind, inv_freq, rope.layout, rope.rotary_dim, rope.offset, float(rope.scaling))
        if not found or found[-1][1] != facts:
            found.append((f"from layer {layer.site.layer}", facts))
    return tuple(found)


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of how a tokenizer turns text into tokens; "ids" where there is none and texts come as token ids."""
    if tokenizer is None:
        return "ids"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return digest_of("tokenizer", backend.to_str())
    special = {str(k): str(v) for k, v in getattr(tokenizer, "special_tokens_map", {}).items()}
    rest = json.dumps([sorted(tokenizer.get_vocab().items()), special], sort_keys=True)
    return digest_of("tokenizer", type(tokenizer).__qualname__, rest)


# ---- recipes


def describe(recipe: Recipe, block: int) -> str:
    """Digest of all that a recipe (ready, bound) does to numbers; "" for one that keeps the model's own.

    It is not the name: two recipes of one name may differ in their code, their profile, their budget in tokens.
    """
    if not recipe.policy and all(kind.exact and kind.merge is None for kind in recipe.kinds.values()):
        return ""
    # what attends to encoded slots in other arithmetic computes other keys behind them
    return digest_of("recipe", recipe.name, block, _version(), native.DOT, _told(recipe.policy), _told(recipe.kinds))


def _version() -> str:
    try:
        return importlib.metadata.version("kvloom")
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return "source"


def _told(x: Any) -> Any:
    """Any part of a recipe as nested tuples of plain values."""
    if x is None or isinstance(x, bool | int | float | str | bytes):
        return x
    if isinstance(x, Tensor):
        return str(x.dtype), tuple(x.shape), digest_of_tensor(x)
    if isinstance(x, torch.dtype):
        return str(x)
    if isinstance(x, Mapping):
        return "mapping", *((_told(k), _told(v)) for k, v in x.items())
    if isinstance(x, list | tuple | set | frozenset):
        return type(x).__name__, *(_told(each) for each in (sorted(x) if isinstance(x, set | frozenset) else x))
    if isinstance(x, partial):
        return "partial", _told(x.func), _told(x.args), _told(x.keywords)
    if inspect.isroutine(x) or isinstance(x, type):
        return _code(x)
    if dataclasses.is_dataclass(x):
        fields = ((f.name, _told(getattr(x, f.name))) for f in dataclasses.fields(x))
        return type(x).__qualname__, _source(type(x)), *fields
    return type(x).__qualname__, _source(type(x)), *((k, _told(v)) for k, v in sorted(vars(x).items()))


def _code(x: Any) -> Any:
    cells = getattr(x, "__closure__", None) or ()
    held = tuple(_told(cell.cell_contents) for cell in cells if not callable(cell.cell_contents))
    return getattr(x, "__module__", ""), getattr(x, "__qualname__", ""), _source(x), held


def _source(x: Any) -> str:
    """The text of code that is not kvloom's: a recipe of one's own is known by it, since its version says nothing."""
    if str(getattr(x, "__module__", "")).startswith(("kvloom.", "torch", "builtins")):
        return ""
    try:
        return digest_of(inspect.getsource(x))
    except (OSError, TypeError):
        return ""

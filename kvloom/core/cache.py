"""`KVCache`: the cache that `model.generate(..., past_key_values=cache)` takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from kvloom.core import attach, stack
from kvloom.core.handle import Handle
from kvloom.core.layer import Layer
from kvloom.core.ledger import Report
from kvloom.core.mask import Gaps
from kvloom.core.recipe import Recipe
from kvloom.core.registry import parse
from kvloom.core.rope import Rope
from kvloom.core.site import Site
from kvloom.core.update import Update
from kvloom.core.view import last_logits, sites_of, text_config
from kvloom.errors import CacheError, ModelError

__all__ = ["KVCache", "KVLayer"]


@dataclass
class _Row:
    """One sequence of the batch in one layer, and where its padding was."""

    layer: Layer
    gaps: Gaps

    def fork(self) -> _Row:
        return _Row(self.layer.fork(), self.gaps.copy())


class KVLayer(CacheLayerMixin):
    """One managed layer: a sequence per row of the batch. Lengths told to transformers count padding and dropped tokens."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: KVCache, site: Site) -> None:
        super().__init__()
        self.cache, self.site = cache, site
        self.rows: list[_Row] = []
        self.seen = 0
        self.recording = False
        self.waiting: Update | None = None
        self.heard: Tensor | None = None  # the input that the next update belongs to, where the recipe asks

    def __repr__(self) -> str:
        return f"KVLayer({self.cache.recipe.name!r}, tokens={self.seen})"

    @cached_property
    def mates(self) -> tuple[int, ...]:
        """The layers that settle together with this one."""
        return self.cache.recipe.mates(self.site.layer)

    @cached_property
    def rope(self) -> Rope | None:
        """What turns queries to slots that keep their distance, if the recipe has such (its rotation never varies)."""
        return self.site.rope if any(kind.turn for kind in self.cache.recipe.kinds.values()) else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes the layer's true shape and the batch size from the first keys and values."""
        b, h, _, d = key_states.shape
        shape = (h, d, value_states.shape[-1], key_states.dtype)
        if shape != (self.site.kv_heads, self.site.key_dim, self.site.value_dim, self.site.dtype):
            self.site = self.cache.refine(self.site, shape)
        self.rows = [_Row(Layer(self.site, self.cache.recipe), Gaps()) for _ in range(b)]
        for row, told in zip(self.rows, self.cache.told(b), strict=True):
            row.layer.tokens = told
        self.is_initialized = True
        self._defer()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes new keys and values [B, H, m, D]; returns handles for the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != len(self.rows):
            raise CacheError(
                f"this cache holds a batch of {len(self.rows)}, but {key_states.shape[0]} rows came. "
                "Make a new KVCache, or use cache.batch_repeat_interleave / batch_select_indices."
            )
        if (key_states.shape[1], key_states.shape[3]) != (self.site.kv_heads, self.site.key_dim):
            raise CacheError(
                f"layer {self.site.layer} of this cache has {self.site.kv_heads} KV heads of size {self.site.key_dim}, "
                f"but keys of shape {tuple(key_states.shape)} came. Make a KVCache for this model."
            )
        if self.waiting is not None:
            raise CacheError(
                f"layer {self.site.layer} was updated twice without attention in between. "
                "Another attention implementation may be active: make a new KVCache for this model."
            )
        hidden, self.heard = self.heard, None
        if self.cache.recipe.hidden and (hidden is None or hidden.shape[:2] != key_states.shape[::2]):
            raise CacheError(
                f"layer {self.site.layer}: its input did not come with its keys. Make a new KVCache(model, recipe) for this model."
            )
        update = self.waiting = Update(self, key_states, value_states, hidden)
        self.seen += key_states.shape[2]
        return Handle.of(update, 0, key_states, self.seen), Handle.of(update, 1, value_states, self.seen)

    def materialize(self, which: int, update: Update) -> Tensor:
        """Keys or values [B, H, positions, D] in full, for a model that looks inside the cache."""
        raise ModelError(
            f"this model's attention in layer {self.site.layer} reads keys and values directly, which a managed cache "
            "does not keep in that form. Load it with attn_implementation='sdpa', or use a stock cache."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """From now on nothing lossy happens to new tokens before `crop` or the next forward."""
        self.record_past = True

    @property
    def record_past(self) -> bool:
        return self.recording

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self.recording = on
        self._defer()

    def _defer(self) -> None:
        for row in self.rows:
            row.layer.defer = self.recording
        if not self.recording:
            self.resolve()

    def settle(self) -> None:
        """Layers that settle together do so once the last of them has settled alone, some also when this one has."""
        if self.mates and (self.site.layer == self.mates[-1] or self.cache.recipe.early):
            upto = self.mates[: self.mates.index(self.site.layer) + 1]
            for mates in self._stacks(upto):
                stack.settle(mates, len(self.mates))

    def resolve(self) -> None:
        """Settles rows that waited, in all layers that settle together with this one."""
        if not any(row.layer.waits for row in self.rows):
            return
        if not self.mates:
            for row in self.rows:
                row.layer.resolve()
            return
        for mates in self._stacks(self.mates):
            for layer in mates:
                layer.resolve()
            stack.settle(mates, len(self.mates))

    def _stacks(self, layers: tuple[int, ...]) -> Iterator[list[Layer]]:
        """These layers of each sequence."""
        rows = [self.cache.layers[i].rows for i in layers]
        return ([row.layer for row in each] for each in zip(*rows, strict=False))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` positions (a number <= 0), then settles what had waited for it."""
        tokens_to_remove = int(tokens_to_remove)  # some versions of transformers pass a tensor
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number, "
                f"here crop({tokens_to_remove - self.seen}) to keep {tokens_to_remove}."
            )
        self.seen = max(0, self.seen + tokens_to_remove)
        for row in self.rows:
            row.layer.truncate(row.gaps.index(self.seen, row.layer.length))
            row.gaps.cut(row.layer.length)
        if self.mates and self.site.layer == self.mates[-1]:
            for mates in self._stacks(self.mates):
                stack.share(mates)
            self.settle()

    def reset(self) -> None:
        self.rows, self.seen, self.waiting, self.is_initialized = [], 0, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.resolve()
        self.rows = [row.fork() for row in self.rows for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        at = torch.arange(len(self.rows))[indices.cpu()].tolist()
        if at != list(range(len(self.rows))):
            self.resolve()
            self.rows = [self.rows[i].fork() for i in at]

    def offload(self) -> None:
        raise CacheError("offloading is not supported by a managed cache; use a smaller budget or fewer bits.")

    prefetch = offload


class KVCache(Cache):
    """The KV cache of one model under one recipe.

    Args:
        model: a decoder-only transformers model. Its attention is registered with kvloom (undo with `kvloom.detach`); with
            any other cache, without one, and in training it behaves as before.
        recipe: a `Recipe`, or a string such as "snapkv(budget=1024) | kivi(bits=4)". `kvloom.recipes()` lists the names.

    Raises RecipeError for an unknown or impossible recipe and ModelError for a model that it cannot serve.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe | str = "full") -> None:
        found = parse(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(found, Recipe):
            raise CacheError(f"recipe={recipe!r} is a {type(recipe).__name__}; pass a string or a kvloom Recipe.")
        sites = sites_of(model)
        self.config = text_config(model)
        layers: list[Any] = list(DynamicCache(config=self.config).layers)
        managed = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        sites = {i: sites[i] for i in managed}
        self.recipe = found.ready(model).bind([_counted(site, len(sites)) for site in sites.values()])
        self.left_alone = {i: type(layer).__name__ for i, layer in enumerate(layers) if i not in sites}
        for i, site in sites.items():
            layers[i] = KVLayer(self, _counted(site, len(sites)))
        super().__init__(layers=layers)
        attach.attach(model)
        if self.recipe.hidden:
            attach.listen(model)
        if self.recipe.again is not None:
            attach.follow(model)
        self._registered = attach.registered(self.config)
        self._told: dict[str, Tensor] = {}
        self._carries: dict[int, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"KVCache({self.recipe.name!r}, tokens={self.get_seq_length()}, {self.nbytes:,} bytes)"

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        twin = KVCache.__new__(KVCache)
        twin.__dict__.update(self.__dict__)
        memo[id(self)] = twin
        twin.layers, twin._carries = [], {}
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.resolve()
                other = KVLayer(twin, layer.site)
                other.rows, other.seen = [row.fork() for row in layer.rows], layer.seen
                other.is_initialized, other.recording = layer.is_initialized, layer.recording
                twin.layers.append(other)
            else:
                twin.layers.append(copy.deepcopy(layer, memo))
        return twin

    def __reduce__(self) -> Any:
        raise CacheError(
            "a KVCache is not pickled: it holds a model's registration. Save the text, or keep the process."
        )

    def refine(self, site: Site, shape: tuple[int, int, int, torch.dtype]) -> Site:
        """The site with the shape that the model really has, checked again before anything is stored."""
        heads, key_dim, value_dim, dtype = shape
        fields = {**site.__dict__, "kv_heads": heads, "key_dim": key_dim, "value_dim": value_dim, "dtype": dtype}
        found = Site(**fields)
        self.recipe.bind([found])
        return found

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        attach.announce(self, query_length, sizes[0])
        return sizes

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx.cpu())  # all layers ask it: one wait for the GPU in place of one each

    @torch.no_grad()
    def probe(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Reads ids [B, m] behind what is cached, keeps nothing of them, and lets their queries settle what is cached.

        Raises CacheError for an empty cache, or a recipe without a policy for probes.
        """
        if "probe" not in self.recipe.policy:
            raise CacheError(
                f"{self.recipe.name} has no policy for probes. Use a recipe that has one, such as epicache."
            )
        if self.get_seq_length() == 0:
            raise CacheError("the cache is empty; feed it before it is probed.")
        managed, others = list(self.managed()), {i: copy.deepcopy(self.layers[i]) for i in self.left_alone}
        seen = [layer.seen for layer in managed]
        for layer in managed:
            for row in layer.rows:
                row.layer.probing = True
        try:
            model(ids, past_key_values=self, use_cache=True, **last_logits(model))
        finally:
            for layer, before in zip(managed, seen, strict=True):
                layer.seen = before
                for row in layer.rows:
                    row.layer.probed()
                    row.gaps.cut(row.layer.length)
            for i, layer in others.items():
                self.layers[i] = layer

    def tokens(self, kinds: Tensor, relevance: Tensor | None = None) -> KVCache:
        """Tells which tokens of the prompts are text (0) and to which image or frame the others belong (1, 2, ...).

        kinds [T] or [B, T] integers, counted from each prompt's first real token; relevance, of the same shape: how much image
        tokens matter to the text, for recipes that ask. What is not told is text. Returns the cache.

        Raises CacheError for another shape, or once the cache holds tokens.
        """
        if self.get_seq_length():
            raise CacheError(
                f"tokens(): this cache holds {self.get_seq_length()} tokens already. Tell it before the prompt."
            )
        if kinds.dim() not in (1, 2) or kinds.is_floating_point() or bool((kinds < 0).any()):
            raise CacheError("tokens(kinds): give whole numbers, 0 or more, of shape [tokens] or [rows, tokens].")
        if relevance is not None and relevance.shape != kinds.shape:
            raise CacheError(
                f"tokens(relevance): its shape is {tuple(relevance.shape)}, that of kinds {tuple(kinds.shape)}."
            )
        self._told = {"kinds": kinds.detach()} | (
            {} if relevance is None else {"relevance": relevance.detach().float()}
        )
        return self

    def told(self, rows: int) -> list[dict[str, Tensor] | None]:
        """What `tokens` said of each row of a batch; rows that were repeated, as for beams, are told the same."""
        if not self._told:
            return [None] * rows
        given = {name: x if x.dim() == 2 else x[None] for name, x in self._told.items()}
        count = len(given["kinds"])
        if rows % count:
            raise CacheError(f"tokens(kinds): it has {count} rows, but a batch of {rows} came.")
        return [{name: x[b * count // rows] for name, x in given.items()} for b in range(rows)]

    def hear(self, layer: int, hidden: Tensor) -> None:
        """Takes the input [B, m, hidden] of an attention layer, just before its keys and values come."""
        if self.recipe.hidden and isinstance(self.layers[layer], KVLayer):
            self.layers[layer].heard = hidden

    def fed(self, model: PreTrainedModel, ids: Tensor | None) -> None:
        """After a forward of ids [B, m], for recipes that read the text again: notes it, and at the end of a prompt lets them."""
        layers = list(self.managed())
        if self.recipe.again is None or not layers or not layers[0].rows or layers[0].rows[0].layer.probing:
            return
        if ids is None:
            raise CacheError(f"{self.recipe.name} reads the text again, so it needs input_ids, not embeddings.")
        for at, row in zip(ids, layers[0].rows, strict=True):
            row.layer.fed(at)
        if not layers[0].recording and ids.shape[1] in range(
            1 + (self.get_seq_length() > 1), self.get_seq_length() + 1
        ):
            self.recipe.again(model, self)

    def check_caller(self) -> None:
        """Raises if a model that should come through the registered attention function came another way."""
        if getattr(self.config, "kv_lora_rank", None):
            raise ModelError(
                "this model caches one latent for keys and values (multi-head latent attention), which KVCache does not "
                "manage. Use a stock cache; the latent is small already."
            )
        if self._registered:
            raise CacheError(
                "this cache was reached through an attention implementation that is not kvloom's: it was made for another "
                "model, or the model's attention was switched since. Make a new KVCache(model, recipe)."
            )

    def carry(self, row: int) -> dict[str, Any]:
        """What layers of a row of the batch leave for later ones in the same forward."""
        return self._carries.setdefault(row, {})

    def managed(self) -> Iterator[KVLayer]:
        return (layer for layer in self.layers if isinstance(layer, KVLayer))

    @property
    def nbytes(self) -> int:
        """Bytes that would be freed if this cache were deleted: every storage held, empty room included."""
        return self.report().nbytes

    def report(self) -> Report:
        """The bytes by layer, class, plane and field, and the layers that the recipe leaves alone."""
        return Report.of(self.recipe.name, self.layers, self.left_alone)


def _counted(site: Site, layers: int) -> Site:
    return Site(**{**site.__dict__, "layers": layers})

"""A text across all layers of a model: what a recipe holds of it, and where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvloom.core import attach, stack
from kvloom.core.attention import Logits, Visible, job
from kvloom.core.blocks import rowwise
from kvloom.core.forecast import forecast
from kvloom.core.group import Group
from kvloom.core.harder import harder
from kvloom.core.kind import Kind
from kvloom.core.layer import Layer
from kvloom.core.plane import SMALL
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import parse
from kvloom.core.rope import Rope
from kvloom.core.run import ROOM
from kvloom.core.site import Site
from kvloom.core.view import sites_of, text_config
from kvloom.errors import ModelError, RecipeError
from kvloom.kernels import native
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep

__all__ = ["Outline", "Sequence"]


class Outline:
    """How sequences of one model under one recipe are stored. Layers with a sliding window keep what it shows, exactly.

    `free`: every token is stored by itself and read as it was computed, so a prompt may be cut anywhere. `chains`: a longer
    text only adds to what a shorter one holds. `context`: the longest text; `part`: the most tokens that are fed at once.

    Raises RecipeError or ModelError for what can't be served in packed steps.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe | str, context: int, part: int) -> None:
        found = parse(recipe) if isinstance(recipe, str) else recipe
        self.config = text_config(model)
        stock = list(DynamicCache(config=self.config).layers)
        self.windows = {i: int(x.sliding_window) for i, x in enumerate(stock) if type(x) is DynamicSlidingWindowLayer}
        kinds = getattr(self.config, "layer_types", None) or ()
        odd = [i for i, x in enumerate(stock) if type(x) is not DynamicLayer and i not in self.windows]
        if odd or "chunked_attention" in kinds:
            what = "chunked attention" if not odd else type(stock[odd[0]]).__name__
            raise ModelError(
                f"{type(model).__name__} has layers of {what}, which packed steps can't serve. Use KVCache with generate."
            )
        attach.attach(model)
        sites = _shaped(model, {i: s for i, s in sites_of(model).items() if i < len(stock)})
        managed = [site for i, site in sites.items() if i not in self.windows]
        managed = [replace(site, layers=len(managed)) for site in managed]
        self.recipe = found.ready(model).bind(managed)
        if self.recipe.again is not None:
            raise RecipeError(
                f"{self.recipe.name} reads every prompt a second time, which packed steps don't do. Use KVCache with generate, "
                "or a recipe that needs one pass, such as snapkv."
            )
        if self.recipe.hidden:
            attach.listen(model)
        for site in sites.values():
            if site.rope is not None and site.rope.varies and context > _steady(self.config, site.rope):
                raise ModelError(
                    f"rope_type={site.rope.kind!r} turns keys by the length of the longest text beside them, so answers would "
                    f"hang on what runs together. Use a context of at most {_steady(self.config, site.rope)} tokens, or KVCache with generate."
                )
        self.rope: Rope | None = managed[0].rope if any(k.turn for k in self.recipe.kinds.values()) else None
        bound = {site.layer: (site, self.recipe) for site in managed}
        self.layers = [bound.get(i) or (site, _windowed(self.windows[i]).bind([site])) for i, site in sites.items()]
        self.mates = [self.recipe.mates(i) if i not in self.windows else () for i in sites]
        self.free = rowwise(self.recipe) and not self.windows
        self.chains = not self.recipe.policy and not self.windows
        self.part, self._known = part, dict[int, int]()
        self.logits: dict[int, Logits] = {}  # how each layer attends, once it has
        self._row = sum(s.kv_heads * (s.key_dim + s.value_dim) * s.itemsize for s in sites.values())

        self._tail = sum(  # what waits, exact, until enough of it can be encoded
            (tail.every - 1) * heads * dim * site.itemsize
            for site in managed
            for kind in self.recipe.kinds.values()
            for codec, tail, (heads, dim) in (
                (kind.key, kind.key_tail, kind.shape(site, "key")),
                (kind.value, kind.value_tail, kind.shape(site, "value")),
            )
            if not codec.exact
        )

    def nbytes(self, tokens: int) -> int:
        """Bytes, empty room included, that a sequence of so many tokens holds at most, as far as can be told before."""
        step = 64 if tokens <= 1024 else 256 if tokens <= 8192 else 1024
        n = -(-tokens // step) * step
        if n not in self._known and n:
            own = [site for site, recipe in self.layers if recipe is self.recipe]
            held = [*forecast(self.recipe, own, n)]
            for site, recipe in self.layers:
                if recipe is not self.recipe:
                    held += forecast(recipe, [site], n)
            self._known[n] = sum(x.nbytes for x in held) + self._tail
        return self._known[n] if n else 0

    def more(self, start: int, stop: int) -> int:
        """Bytes that a sequence of `start` tokens may need to grow to `stop`, with what it drops at the end of each part."""
        passing = 0 if self.chains else min(self.part, stop - start) * self._row
        return max(0, self.nbytes(stop) - self.nbytes(start)) + passing

    def copied(self, tokens: int) -> int:
        """Bytes that a fork of so many tokens takes at most when it grows: a short last run is shared no longer."""
        return min(SMALL, tokens) * self._row if self.part < SMALL else 0

    @property
    def room(self) -> int:
        """Bytes of empty room in what a fork adds to."""
        return ROOM * self._row

    def visible(self, layer: int, start: int, m: int) -> Visible | None:
        """What rows [start, start + m) of a text see in this layer, where it is more than causal."""
        window = self.windows.get(layer)
        if window is None or m == 1 or start + m <= window:  # before a single row the layer holds only what it sees
            return None

        def visible(index: Tensor, group: Group) -> Tensor:
            behind = torch.arange(start, start + m)[None, None, :, None] - index[:, None, None, :]
            return (behind >= 0) & (behind < window)

        return visible


def _steady(config: Any, rope: Rope) -> int:
    """The longest text at which frequencies stay what they are."""
    known = getattr(config, "original_max_position_embeddings", None) or (config.rope_parameters or {}).get(
        "original_max_position_embeddings"
    )
    return int(known or config.max_position_embeddings)


def _windowed(window: int) -> Recipe:
    size = max(1, window - 1)  # the next token sees itself too
    policy = Policy(Tokens(size), Keep(scope="layer"))
    return Recipe("window", {"prompt": policy, "decode": policy}, {"main": Kind()})


@torch.no_grad()
def _shaped(model: PreTrainedModel, sites: dict[int, Site]) -> dict[int, Site]:
    """The sites with the shapes that the model really has, seen in a forward of two tokens."""
    cache = DynamicCache(config=text_config(model))
    was = text_config(model)._attn_implementation
    model(torch.zeros(1, 2, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    assert text_config(model)._attn_implementation == was
    found = {}
    for i, site in sites.items():
        k, v = cache.layers[i].keys, cache.layers[i].values
        found[i] = replace(site, kv_heads=k.shape[1], key_dim=k.shape[3], value_dim=v.shape[3], dtype=k.dtype)
    return found


class Sequence:
    """One text. Forks share what is stored until one of them writes.

    `standing`: for each layer, what kernels need to decode on their own, if they can; `ahead`: tokens that they have decoded and the
    layer has yet to be told of.
    """

    def __init__(self, outline: Outline, layers: list[Layer] | None = None) -> None:
        self.outline = outline
        self.layers = [Layer(site, recipe) for site, recipe in outline.layers] if layers is None else layers
        self.standing: list[Any] = [None] * len(self.layers)
        self.ahead = [0] * len(self.layers)
        carry: dict[str, Any] = {}
        for layer in self.layers:
            layer.carry = carry

    @property
    def length(self) -> int:
        """Tokens fed."""
        return self.layers[0].length + self.ahead[0]

    def layer(self, at: int) -> Layer:
        """A layer that knows of everything that was decoded."""
        layer, ahead = self.layers[at], self.ahead[at]
        self.standing[at] = None
        if ahead:
            layer.groups[0].segments["main"].grown(ahead, layer.length)
            layer.length += ahead
            self.ahead[at] = 0
        return layer

    def stand(self, at: int, q: Tensor, logits: Logits) -> None:
        """Lets kernels decode on their own from now on, if nothing is in the way. q [Hq, m, D]: queries like those to come."""
        layer = self.layers[at]
        group = layer.groups[0]
        main = group.segments["main"]
        if not layer.quiet or len(layer.groups) > 1 or group.heads is not None or main.n != group.n:
            return
        room = int(min(layer.quiet, main.room))
        if room > 0:
            like = q.new_empty(layer.site.kv_heads, layer.site.group, 1, layer.site.key_dim)
            found = job(like, layer.site.value_dim, group, logits, layer.length, None, False)
            if found is not None and isinstance(found[0], native.Job):
                self.standing[at] = native.standing(
                    found[0], room, -1 if main.value.flow is None else main.value.rule.keep
                )

    @torch.no_grad()
    def settled(self, layer: int) -> None:
        """After a layer's forward: layers that settle together do so once the last of them has run, some also earlier."""
        mates = self.outline.mates[layer]
        if mates and (layer == mates[-1] or self.outline.recipe.early):
            stack.settle([self.layers[i] for i in mates[: mates.index(layer) + 1]], len(mates))

    def fork(self) -> Sequence:
        """Another sequence of the same text."""
        return Sequence(self.outline, [self.layer(i).fork() for i in range(len(self.layers))])

    def squeezed(self, outline: Outline) -> Sequence:
        """The same text under a stricter recipe, as far as what is held allows. This sequence is used up."""
        layers = []
        for i, (_, recipe) in enumerate(outline.layers):
            layer = self.layer(i)
            if layer.recipe is self.outline.recipe:
                layer = harder(layer, recipe, replace(self.outline.logits[layer.site.layer], rope=outline.rope))
            layers.append(layer)
        return Sequence(outline, layers)

    def storages(self) -> Iterator[tuple[int, int, str]]:
        """(address, bytes, class) of every storage held, some more than once."""
        for layer in self.layers:
            for kind, _, _, x, _ in layer.tensors():
                storage = x.untyped_storage()
                yield storage.data_ptr(), storage.nbytes(), kind

"""APE: contexts are encoded each for itself behind one prefix, at the same positions, and attended to side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.card import Card
from kvloom.core.kind import Merge
from kvloom.core.recipe import Recipe
from kvloom.core.registry import parse
from kvloom.core.rows import Rows
from kvloom.errors import CacheError, RecipeError
from kvloom.programs.chunk import Chunk, compute, context_of, whole_model

__all__ = ["CARD", "ParallelContexts"]

CARD = Card(
    name="ape",
    title="APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding",
    year=2025,
    arxiv="2502.05431",
    code="Infini-AI-Lab/APE",
    idea="Encode each context alone behind a shared prefix, all at the same positions. Attend to all contexts together with "
    "sharper logits (temperature), scale their log-sum-exp, and merge that with attention over everything else.",
    claims="98 % (RAG) and 93 % (ICL) of the quality of sequential encoding; 4.5x faster end to end and 28x less prefill time "
    "at 128k tokens; hundreds of contexts.",
    differs="Contexts are stored once and copied into each request's cache; any codec may store them. Log-sum-exps are fp32.",
    open="The authors tune temperature and scale by task. The defaults are those of their demo.",
    measured="`kvloom bench reuse`: docs/reuse.md.",
    bytes="(prefix + sum of the contexts + query) * (D_k + D_v) * itemsize per KV head, and 4 per context token",
)


class ParallelContexts:
    """Caches whose contexts were encoded in parallel behind `prefix` (APE, arXiv 2502.05431).

        ape = ParallelContexts(model, prefix)
        passages = [ape.encode(ids) for ids in texts]      # once each, in any order, at any time
        cache, ids = ape.prompt(passages[:3], query)       # nothing of a passage is computed here
        model.generate(ids, past_key_values=cache)

    Args:
        model: a model whose layers all attend to the whole text.
        prefix: token ids in front of every context, encoded once; usually with the token that begins a text.
        temperature: logits over the contexts are divided by it; in (0, 1] as the authors use it.
        scale: their log-sum-exp is multiplied by `scale * temperature`.
        recipe: how slots are stored, one that drops none, such as "kivi(bits=4)".

    With one context, temperature 1 and scale 1, logits are those of the plain text. Order among contexts means nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: Sequence[int] | Tensor = (),
        *,
        temperature: float = 0.9,
        scale: float = 0.9,
        recipe: Recipe | str = "full",
    ) -> None:
        for name, x in (("temperature", temperature), ("scale", scale)):
            if not 0 < x < float("inf"):
                raise RecipeError(f"ape: {name}={x!r} must be a number above 0, such as 0.9; 1 changes nothing.")
        stored = parse(recipe) if isinstance(recipe, str) else recipe
        if stored.policy or len(stored.kinds) > 1:
            raise RecipeError(
                f"ape: recipe={stored.name!r} places or drops slots; contexts need one that only stores them."
            )
        merge = Merge(temperature, scale * temperature)
        kinds = {**stored.kinds, "contexts": replace(stored.kinds["main"], merge=merge)}
        self.model, self.prefix = model, _ids(prefix)
        self._exact = KVCache(model, "full")  # what contexts are computed behind
        self._stored = KVCache(model, replace(stored, name=f"ape | {stored.name}", kinds=kinds))
        whole_model(self._stored)
        if self.prefix:
            self._run(self._exact, self.prefix)
            self._run(self._stored, self.prefix)

    @torch.no_grad()
    def _run(self, cache: KVCache, tokens: Sequence[int]) -> None:
        self.model(torch.tensor([tokens], device=self.model.device), past_key_values=cache, logits_to_keep=1)

    def encode(self, context: Sequence[int] | Tensor) -> Chunk:
        """One context's keys and values, computed behind the prefix and nothing else; `kvloom.programs.save` can store it."""
        tokens = _ids(context)
        if not tokens:
            raise CacheError("ape: a context without tokens cannot be encoded. Leave it out.")
        return compute(self.model, tokens, self.prefix, held=self._exact if self.prefix else None)

    def cache(self, contexts: Sequence[Chunk]) -> KVCache:
        """A cache that holds the prefix and these contexts; the next token stands behind the longest of them."""
        for context in contexts:
            if (context.base, context.context) != (len(self.prefix), context_of(self.prefix)):
                raise CacheError("ape: a context was encoded behind another prefix. Encode it with this object.")
        cache = copy.deepcopy(self._stored)
        for i, layer in enumerate(cache.managed() if contexts else ()):
            rows = [context.rows[i] for context in contexts]
            if not layer.is_initialized:
                layer.lazy_initialization(rows[0].k[None], rows[0].v[None])
            held = layer.rows[0].layer
            index = torch.cat([each.where for each in rows], 1)
            k, v = (torch.cat([getattr(each, plane) for each in rows], 1) for plane in "kv")
            held.groups[0].segments["contexts"].append(Rows(k, v, index))
            # Contexts of unequal lengths end there, so nothing in front of that can be cropped.
            layer.seen = held.length = held.prompt = held.dropped_at = self.length(contexts)
        return cache

    def length(self, contexts: Sequence[Chunk]) -> int:
        """The place in the text at which a query begins: behind the prefix and the longest context."""
        return len(self.prefix) + max((len(context.tokens) for context in contexts), default=0)

    def prompt(self, contexts: Sequence[Chunk], query: Sequence[int] | Tensor) -> tuple[KVCache, Tensor]:
        """The cache, and the ids [1, n] that `generate` takes: prefix, the longest context, query. It reads the query only."""
        longest = max((context.tokens for context in contexts), key=len, default=())
        ids = torch.tensor([[*self.prefix, *longest, *_ids(query)]], device=self.model.device)
        return self.cache(contexts), ids


def _ids(tokens: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens)

"""EpiCache (arXiv 2509.17396): a long conversation as several small caches, one for each of its episodes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.recipe import Recipe
from kvloom.core.registry import parse
from kvloom.core.view import last_logits
from kvloom.errors import KvloomError
from kvloom.programs.episodes import Embedder, Episodes, episodes

__all__ = ["EpiCache", "Told"]

ASK = "Answer a question about this part of the conversation."


@dataclass(frozen=True)
class Told:
    """An answer: its text and tokens, and the episode whose cache gave it."""

    text: str
    tokens: list[int]
    episode: int


class EpiCache:
    """A conversation that was read once for each of its episodes, in blocks, and is then asked.

    Args:
        recipe: what each episode's cache keeps. It needs a policy for probes: epicache(window=None), alone or over a codec.
        count: episodes at most.
        window: utterances that are embedded together.
        shown: such windows that stand for an episode when a block is read.
        block: tokens read at a time; no cache ever holds more than its budget and one block.
        embed: texts to vectors [n, dim]; None: words and pairs of words, weighted by how rare they are.
        ask: what is said behind an episode's text in a probe.
        tell: called with the share done, 0 to 1.

    Raises KvloomError for bad numbers, RecipeError for a recipe that no probe settles.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        utterances: Sequence[str],
        recipe: Recipe | str = "epicache(budget=8192, window=None)",
        *,
        count: int = 4,
        window: int = 4,
        shown: int = 4,
        block: int = 2048,
        seed: int = 42,
        embed: Embedder | None = None,
        ask: str = ASK,
        tell: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.recipe = parse(recipe) if isinstance(recipe, str) else recipe
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise KvloomError(f"block={block!r} must be a number of tokens, at least 1.")
        if "probe" not in self.recipe.policy or "prompt" in self.recipe.policy:
            raise KvloomError(
                f"recipe={self.recipe.name!r}: only probes may settle the caches of episodes. "
                "Use epicache(window=None), or a recipe with a policy for the phase 'probe' and none for 'prompt'."
            )
        self.episodes: Episodes = episodes(utterances, count, window, shown, seed, embed)
        self.history = self._ids("\n".join(utterances) + "\n")
        self.caches: list[KVCache] = []
        for i, text in enumerate(self.episodes.texts):
            probe, cache = self._ids(f"{text}\n{ask}\n"), KVCache(model, self.recipe)
            length = self.history.shape[1]
            for at in range(0, length, block):
                self._read(cache, self.history[:, at : at + block])
                cache.probe(model, probe)
                done = i + min(1.0, (at + block) / length)
                tell(done / len(self.episodes.texts))
            self.caches.append(cache)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of all episodes."""
        return sum(cache.nbytes for cache in self.caches)

    def cache(self, question: str) -> tuple[KVCache, int]:
        """A cache to answer the question with, its own from now on, and the number of the episode."""
        which = self.episodes.match(question)
        return copy.deepcopy(self.caches[which]), which

    @torch.no_grad()
    def ask(self, question: str, **options: Any) -> Told:
        """Answers a question with the cache of the episode that it is about; the next one finds that as it was."""
        cache, which = self.cache(question)
        whole = torch.cat([self.history, self._ids(question)], 1)
        found = self.model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=cache, **options)
        sequences: Tensor = found if isinstance(found, Tensor) else found.sequences
        new = sequences[0, whole.shape[1] :].tolist()
        return Told(str(self.tokenizer.decode(new, skip_special_tokens=True)), new, which)

    def _ids(self, text: str) -> Tensor:
        ids: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids.to(self.model.device)

    @torch.no_grad()
    def _read(self, cache: KVCache, ids: Tensor) -> None:
        self.model(ids, past_key_values=cache, use_cache=True, **last_logits(self.model))

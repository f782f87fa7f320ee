"""PIE: after an edit only the new tokens are encoded; the text behind it keeps its values, and its keys are turned."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.card import Card
from kvloom.errors import CacheError
from kvloom.programs.chunk import Chunk, take
from kvloom.programs.diff import Edit, edits
from kvloom.programs.partial import feed
from kvloom.programs.place import place

__all__ = ["CARD", "CodeSession", "Edited"]

CARD = Card(
    name="pie",
    title="Let the Code LLM Edit Itself When You Edit the Code (PIE, Positional Integrity Encoding)",
    year=2024,
    arxiv="2407.03157",
    code="zhenyuhe00/PIE (no code published)",
    idea="Keep keys and values before and after an edit, encode the new tokens alone, and rotate the keys behind the edit to "
    "their new positions.",
    claims="Over 85 % less computation than encoding anew, at well approximated quality (RepoBench-C-8k; insertion, deletion, "
    "several places; DeepSeek-Coder 1.3B to 33B).",
    differs="The last token is run again after every edit, for the logits behind the text. Keys are rotated once from where "
    "they were computed, however many edits came since. `refresh` encodes text behind an edit again, which the paper "
    "does not: all of it gives the logits of a full prefill.",
    open="How the authors treat the last token, and the order of several edits: here all new tokens go in one forward, each "
    "seeing the new ones before it.",
    measured="`kvloom bench reuse`: docs/reuse.md.",
    bytes="twice a full cache: as computed, and as placed",
)
MANY = 64  # pieces that are worth gathering into one


@dataclass(frozen=True)
class Edited:
    """What an edit did, in tokens: `encoded` anew, `moved` to another place, `kept` as they were. Up to the next logits."""

    encoded: int
    moved: int
    kept: int
    seconds: float


class CodeSession:
    """The cache of a text that changes, such as a file in an editor (PIE, arXiv 2407.03157).

        session = CodeSession(model, source, tokenizer)
        session.update(changed_source)                 # or edit([...]), insert(at, tokens), delete(start, stop)
        cache, ids = session.prompt()
        model.generate(ids, past_key_values=cache)     # the session's own cache stays as it is

    `tokens`: the text as it is now; `logits` [1, V]: behind its last token. Text behind an edit does not know of it: a
    variable that was renamed above keeps its old name in the keys and values below.

    Args:
        model: a decoder-only transformers model whose layers all attend to the whole text and rotate keys.
        text: token ids, or text if there is a tokenizer.
        tokenizer: for text.
        refresh: how many tokens behind each edit are encoded again too.
    """

    def __init__(
        self, model: PreTrainedModel, text: str | Sequence[int], tokenizer: Any = None, *, refresh: int = 0
    ) -> None:
        if not isinstance(refresh, int) or refresh < 0:
            raise CacheError(f"pie: refresh={refresh!r} must be a number of tokens, 0 or more.")
        self.model, self.tokenizer, self.refresh = model, tokenizer, refresh
        self.tokens = self._ids(text)
        if not self.tokens:
            raise CacheError("pie: text=''; a session starts with at least one token.")
        self.cache = KVCache(model)
        self.logits = self._feed(torch.arange(len(self.tokens)))
        self._pieces = [(0, take(self.cache, self.tokens, 0, ""))]

    def _ids(self, text: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(text, str):
            return tuple(int(t) for t in text)
        if self.tokenizer is None:
            raise CacheError("pie: text was given, and no tokenizer. Give one to CodeSession, or token ids.")
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _feed(self, index: Tensor) -> Tensor:
        logits = feed(self.model, self.cache, torch.tensor(self.tokens)[index], index).logits
        assert logits is not None
        return logits

    def update(self, text: str | Sequence[int]) -> Edited:
        """Makes this the text; what changed is found by comparing tokens."""
        return self.edit(edits(self.tokens, self._ids(text)))

    def insert(self, at: int, tokens: Sequence[int]) -> Edited:
        """Puts token ids in front of token `at`."""
        return self.edit([Edit(at, at, tuple(tokens))])

    def delete(self, start: int, stop: int) -> Edited:
        """Takes the tokens [start, stop) out."""
        return self.edit([Edit(start, stop)])

    def edit(self, changes: Sequence[Edit]) -> Edited:
        """Applies edits, given by places in the text as it is now. Raises CacheError where they overlap or leave nothing."""
        begun = perf_counter()
        changes = [c for c in sorted(changes, key=lambda c: (c.start, c.stop)) if c.tokens or c.start < c.stop]
        at, kept = 0, []
        text: list[int] = []
        new: list[int] = []
        for change in [*changes, Edit(len(self.tokens), len(self.tokens))]:
            if not at <= change.start <= change.stop <= len(self.tokens):
                raise CacheError(
                    f"pie: edit [{change.start}, {change.stop}) of {len(self.tokens)} tokens overlaps another or lies outside."
                )
            if at < change.start:
                kept.append((at, change.start, len(text)))
                text += self.tokens[at : change.start]
            new += range(len(text), len(text) + len(change.tokens))
            text += change.tokens
            at = change.stop
        if not text:
            raise CacheError("pie: the edit deletes the whole text. Start a new CodeSession.")
        if not changes:
            return Edited(0, 0, len(text), perf_counter() - begun)
        fed = torch.zeros(len(text), dtype=torch.bool)
        fed[torch.tensor(new, dtype=torch.long)] = True
        for _, _, to in kept[kept[0][0] == 0 :] if kept else ():
            fed[to : to + self.refresh] = True
        fed[-1] = True
        parts = [part for span in kept for part in self._parts(*span)]
        moved = sum(len(c) for to, c, was in parts if to != was)
        cache = KVCache(self.model)
        place(cache, [chunk for _, chunk, _ in parts], [to for to, _, _ in parts])
        self.cache, self.tokens = cache, tuple(text)
        self.logits = self._feed(fed.nonzero()[:, 0])
        self._pieces = self._gathered([(to, chunk) for to, chunk, _ in parts], fed)
        count = int(fed.sum())
        seconds = perf_counter() - begun
        return Edited(count, moved, sum(len(c) for _, c, _ in parts) - moved, seconds)

    def _parts(self, start: int, stop: int, to: int) -> list[tuple[int, Chunk, int]]:
        """(new place, piece, place before) of the tokens [start, stop) that are to stand at `to`."""
        found = []
        for first, chunk in self._pieces:
            a, b = max(start, first), min(stop, first + len(chunk))
            if a < b:
                found.append((to + a - start, chunk.part(a - first, b - first), a))
        return found

    def _gathered(self, parts: list[tuple[int, Chunk]], fed: Tensor) -> list[tuple[int, Chunk]]:
        """The text in pieces again: those that stayed as they were, and what has just been encoded."""
        pieces = []
        for to, chunk in parts:
            for a, b in _stretches(~fed[to : to + len(chunk)]):
                pieces.append((to + a, chunk.part(a, b)))
        pieces += [(a, take(self.cache, self.tokens[a:b], a, "")) for a, b in _stretches(fed)]
        if len(pieces) > MANY:
            return [(0, take(self.cache, self.tokens, 0, ""))]
        return sorted(pieces, key=lambda piece: piece[0])

    def prompt(self) -> tuple[KVCache, Tensor]:
        """A cache and the ids [1, n] with which `generate` goes on behind the text; it reads the last token only."""
        cache = copy.deepcopy(self.cache)
        cache.crop(-1)
        return cache, torch.tensor([self.tokens], device=self.model.device)


def _stretches(marks: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of every run of True."""
    edges = torch.diff(marks.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int()).nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))

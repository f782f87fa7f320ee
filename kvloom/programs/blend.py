"""Retrieval-augmented prompts: a system prompt, passages in any order, a question; passages come from a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.errors import CacheError
from kvloom.programs.chunk import Chunk, compute, context_of, load, save, take
from kvloom.programs.method import Method, Span, Text, parse_method
from kvloom.programs.partial import feed
from kvloom.programs.place import place
from kvloom.store import Identity, Store

__all__ = ["Blend", "Part", "Prefilled", "Report"]

Written = str | Sequence[int]  # text, or token ids


@dataclass(frozen=True)
class Part:
    """One stretch of the prompt: "system", "passage" or "question". `hit`: it came from the store; `exact`: nothing stale."""

    kind: str
    start: int
    tokens: int
    hit: bool
    exact: bool


@dataclass(frozen=True)
class Report:
    """What a prefill did. `rows[layer]`: rows that went through that layer. Seconds up to the logits of the first token.

    `loading` (store), `computing` (passages that the store did not have), `placing`, `feeding` add up to `seconds`;
    `saving` came after. `recomputed`: rows through layers, as a share of those of a full prefill; missed passages that were
    computed by themselves not counted.
    """

    method: str
    tokens: int
    parts: tuple[Part, ...]
    rows: tuple[int, ...]
    loading: float
    computing: float
    placing: float
    feeding: float
    saving: float

    @property
    def seconds(self) -> float:
        return self.loading + self.computing + self.placing + self.feeding

    @property
    def recomputed(self) -> float:
        return sum(self.rows) / (self.tokens * len(self.rows))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"seconds": self.seconds, "recomputed": self.recomputed}

    def __str__(self) -> str:
        hits = sum(part.hit for part in self.parts if part.kind == "passage")
        passages = sum(part.kind == "passage" for part in self.parts)
        return (
            f"{self.method}: {self.tokens:,} tokens, {hits} of {passages} passages from the store, "
            f"{self.recomputed:.0%} computed, {self.seconds:.3f} s to the first token"
        )


@dataclass(frozen=True)
class Prefilled:
    """A cache that holds `tokens`, the logits [1, V] behind the last of them, and what it took."""

    cache: KVCache
    tokens: tuple[int, ...]
    logits: Tensor
    report: Report


class Blend:
    """Prefills prompts of a system prompt, passages and a question, reusing passages wherever they stand.

    Args:
        model: a decoder-only transformers model that `feed` serves.
        tokenizer: for prompts given as text; without it, give token ids.
        store: where chunks are kept; without it, 1 GiB of this process's memory.
        method: one of `kvloom methods`, such as "cacheblend(ratio=0.15)".
        behind: passages are computed behind the system prompt, so that the first tokens of a prompt, which attention leans
            on, are there; False: alone, as the papers do. Without a system prompt there is no difference.
        tenant: a secret of the tenant; others cannot find its chunks.

    Raises RecipeError for an unknown method.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        store: Store | None = None,
        method: str | Method = "cacheblend",
        *,
        behind: bool = True,
        tenant: str = "",
    ) -> None:
        self.model, self.tokenizer, self.behind = model, tokenizer, behind
        self.method = parse_method(method) if isinstance(method, str) else method
        self.store = store if store is not None else Store.open("memory://?max=1GiB")
        self.identity = Identity.of(model, tokenizer, tenant=tenant)

    def prefill(self, system: Written, passages: Sequence[Written], question: Written) -> Prefilled:
        """Fills a new cache with the prompt. Passages are tokenized one by one, so put what stands between into them.

        Raises CacheError for an empty question and for text without a tokenizer.
        """
        head = self._ids(system, first=True)
        bodies = [ids for ids in (self._ids(passage) for passage in passages) if ids]
        tail = self._ids(question)
        if not tail:
            raise CacheError("question='': the last part of a prompt has to be computed; give at least one token.")
        pieces = [head, *bodies] if head else bodies
        tokens = tuple(t for piece in (*pieces, tail) for t in piece)
        clock = _Clock()
        found = self._prefix(pieces, clock) if self.method.reuse == "exact" else self._chunks(head, pieces, clock)
        spans = tuple(span for span, _ in found)
        text = Text(tokens, spans)
        cache = KVCache(self.model)
        with clock("placing"):
            place(cache, [span.chunk for span in spans], [span.start for span in spans])
        with clock("feeding"):
            rows, choose = self.method.plan(text)
            ids = torch.tensor(tokens)[rows]
            fed = feed(self.model, cache, ids, rows, choose)
        assert fed.logits is not None
        if self.method.reuse == "exact":
            with clock("saving"):
                self._keep(cache, pieces, len(spans))
        parts = self._parts(pieces, found, bool(head), len(tail))
        report = Report(str(self.method), len(tokens), parts, fed.rows, *(clock.taken[n] for n in CLOCKS))
        return Prefilled(cache, tokens, fed.logits, report)

    def answer(
        self, system: Written, passages: Sequence[Written], question: Written, **generate: Any
    ) -> tuple[str, Report]:
        """The model's answer as text, and what the prefill did. `generate`: options of `model.generate`."""
        if self.tokenizer is None:
            raise CacheError("answer() writes text, so Blend needs a tokenizer; use prefill() for token ids.")
        done = self.prefill(system, passages, question)
        done.cache.crop(-1)  # generate computes the last row again, for logits of its own
        ids = torch.tensor([done.tokens], device=self.model.device)
        mask = torch.ones_like(ids)
        out = self.model.generate(ids, attention_mask=mask, past_key_values=done.cache, **generate)
        return self.tokenizer.decode(out[0, len(done.tokens) :], skip_special_tokens=True), done.report

    def _ids(self, text: Written, first: bool = False) -> tuple[int, ...]:
        if not isinstance(text, str):
            return tuple(int(t) for t in text)
        if self.tokenizer is None:
            raise CacheError(f"{text[:40]!r} is text, and this Blend has no tokenizer; give one, or token ids.")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        bos = self.tokenizer.bos_token_id
        if first and bos is not None and ids[:1] != [bos] and self.tokenizer.encode("a")[:1] == [bos]:
            ids = [bos, *ids]  # one in front of everything, none in front of passages
        return tuple(ids)

    def _chunks(self, head: tuple[int, ...], pieces: list[tuple[int, ...]], clock: _Clock) -> list[tuple[Span, bool]]:
        """A span for every piece, and whether the store had it."""
        known: dict[tuple[tuple[int, ...], int], tuple[Chunk, bool]] = {}
        found: list[tuple[Span, bool]] = []
        start, held = 0, None
        for i, piece in enumerate(pieces):
            before = head if self.behind and not (i == 0 and head) else ()
            if (piece, len(before)) not in known:
                with clock("loading"):
                    chunk = load(self.store, self.identity, piece, len(before), context_of(before))
                hit = chunk is not None
                if chunk is None:
                    with clock("computing"):
                        if before and held is None:
                            held = KVCache(self.model)
                            place(held, found[0][0].chunk, 0)
                        begun = perf_counter()
                        chunk = compute(self.model, piece, before, held if before else None)
                        seconds = perf_counter() - begun
                    with clock("saving"):
                        save(self.store, self.identity, chunk, seconds)
                known[piece, len(before)] = chunk, hit
            chunk, hit = known[piece, len(before)]
            exact = chunk.base == start and (start == 0 or (len(before) == start and i == 1))
            found.append((Span(start, start + len(piece), chunk.to(self.model.device), exact), hit))
            start += len(piece)
        return found

    def _prefix(self, pieces: list[tuple[int, ...]], clock: _Clock) -> list[tuple[Span, bool]]:
        """A span for each of the first pieces that the store has behind the very text before it."""
        found: list[tuple[Span, bool]] = []
        before: tuple[int, ...] = ()
        for piece in pieces:
            with clock("loading"):
                chunk = load(self.store, self.identity, piece, len(before), context_of(before))
            if chunk is None:
                break
            span = Span(len(before), len(before) + len(piece), chunk.to(self.model.device), True)
            found.append((span, True))
            before += piece
        return found

    def _keep(self, cache: KVCache, pieces: list[tuple[int, ...]], had: int) -> None:
        before: tuple[int, ...] = ()
        for i, piece in enumerate(pieces):
            if i >= had:
                save(self.store, self.identity, take(cache, piece, len(before), context_of(before)))
            before += piece

    @staticmethod
    def _parts(
        pieces: list[tuple[int, ...]], found: list[tuple[Span, bool]], has_head: bool, tail: int
    ) -> tuple[Part, ...]:
        parts, start = [], 0
        for i, piece in enumerate(pieces):
            span, hit = found[i] if i < len(found) else (None, False)
            kind = "system" if has_head and i == 0 else "passage"
            parts.append(Part(kind, start, len(piece), hit, span is None or span.exact))
            start += len(piece)
        return (*parts, Part("question", start, tail, False, True))


CLOCKS = ("loading", "computing", "placing", "feeding", "saving")


class _Clock:
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self.taken = dict.fromkeys(CLOCKS, 0.0)
        self._what, self._begun = "", 0.0

    def __call__(self, what: str) -> _Clock:
        self._what = what
        return self

    def __enter__(self) -> None:
        self._begun = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.taken[self._what] += perf_counter() - self._begun

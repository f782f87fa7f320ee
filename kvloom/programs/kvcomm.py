"""KVCOMM: agents that read the same messages behind different prompts correct shared keys and values by earlier examples."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core.cache import KVCache
from kvloom.core.card import Card
from kvloom.errors import CacheError, unknown
from kvloom.programs.anchors import Anchor, Delta, by_channel, by_token, plus, similarity
from kvloom.programs.chunk import Chunk, compute, take
from kvloom.programs.partial import feed
from kvloom.programs.place import moved, place

__all__ = ["CARD", "AgentTeam", "Anchor", "Read"]

CARD = Card(
    name="kvcomm",
    title="KVCOMM: Online Cross-context KV-cache Communication for Efficient LLM-based Multi-agent Systems",
    year=2025,
    arxiv="2510.12872",
    code="FastMAS/KVCOMM",
    idea="A message stands behind another prompt in every agent. Its keys are rotated to their place, and keys and values get a "
    "correction: the mean difference that a full prefill made for earlier messages (anchors), weighted by similarity.",
    claims="Over 70 % of the cache is reused in retrieval, mathematics and coding workloads without loss of quality; prefill "
    "up to 7.8 times faster (five agents, 1k tokens of input each).",
    differs="Anchors and differences are kept in the frame of the message computed alone, so requests with other offsets do not "
    "mix frames. Templates are computed with empty placeholders. Anchors count as used up to the one that reaches top_p.",
    open="gamma * log2(n) grows with the number of anchors, and distances are sums over all tokens, so long messages are nearly "
    "always reused: `Read.entropy` says what was decided on.",
    measured="`kvloom bench reuse`: docs/reuse.md.",
    bytes="an anchor: a full cache of its message, and one of message and following segment for each agent that read it",
)


@dataclass(frozen=True)
class Read:
    """What `AgentTeam.read` gives: the cache of `tokens`, the logits [1, V] behind them, and how it came about.

    `reused`: tokens that were not computed. `entropy`: bits by placeholder, where there were anchors to choose from. `why`: the
    placeholder that asked for a full prefill, and the reason; "" if there was none.
    """

    cache: KVCache
    tokens: tuple[int, ...]
    logits: Tensor
    reused: int
    entropy: dict[str, float]
    why: str
    seconds: float


class _Piece(NamedTuple):
    part: int
    name: str  # of the placeholder, or ""
    chunk: Chunk
    start: int


class AgentTeam:
    """Agents of one model that read each other's messages (KVCOMM, arXiv 2510.12872).

        team = AgentTeam(model)
        team.add("critic", [instructions, "question", middle, "draft", end])      # ids, and names of placeholders
        read = team.read("critic", {"question": ids, "draft": other_ids})
        read.cache.crop(-1)
        model.generate(torch.tensor([read.tokens]), past_key_values=read.cache)

    Args:
        model: a decoder-only transformers model whose layers all attend to the whole text and rotate keys.
        gamma: a placeholder is prefilled if the entropy of its anchors' weights is above gamma * log2(their number).
        anchors: how many are kept for each placeholder.
        window: if there are more, the least used of so many of the oldest leaves.
        top_p: anchors that together have this weight count as used.
        temperature: of the weights; near 0 the nearest anchor alone corrects.
        neutral: ids in front of a message that is computed alone; by default the token that begins a text, if there is one.
        messages: how many messages computed alone are remembered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        gamma: float = 0.3,
        anchors: int = 20,
        window: int = 5,
        top_p: float = 0.9,
        temperature: float = 1.0,
        neutral: Sequence[int] | None = None,
        messages: int = 64,
    ) -> None:
        for name, x, good in (
            ("gamma", gamma, gamma >= 0), ("anchors", anchors, anchors >= 2), ("window", window, window >= 1),
            ("top_p", top_p, 0 < top_p <= 1), ("temperature", temperature, temperature > 0),
            ("messages", messages, messages >= 1),
        ):  # fmt: skip
            if not good:
                raise CacheError(
                    f"kvcomm: {name}={x!r} is out of range; the paper has gamma 0.3, anchors 20, window 5, top_p 0.9."
                )
        self.model, self.gamma, self.limit, self.window = model, gamma, anchors, window
        self.top_p, self.temperature, self.messages = top_p, temperature, messages
        bos = model.config.get_text_config(decoder=True).bos_token_id
        self.neutral = tuple(neutral) if neutral is not None else (bos,) if isinstance(bos, int) else ()
        self.anchors: dict[str, list[Anchor]] = {}
        self._agents: dict[str, list[str | Chunk]] = {}
        self._shared: OrderedDict[tuple[int, ...], Chunk] = OrderedDict()
        self._layers = list(KVCache(model).managed())

    def add(self, agent: str, template: Sequence[str | Sequence[int]]) -> None:
        """Adds an agent: its prompt as token ids, with names where messages stand. Computes its text once."""
        texts = [() if isinstance(part, str) else tuple(int(t) for t in part) for part in template]
        if agent in self._agents:
            raise CacheError(f"kvcomm: agent {agent!r} is there already; give the other one another name.")
        if not texts or not texts[-1]:
            raise CacheError(f"kvcomm: the template of {agent!r} has to end in token ids, behind which it answers.")
        whole = compute(self.model, [t for text in texts for t in text])
        parts: list[str | Chunk] = []
        at = 0
        for part, text in zip(template, texts, strict=True):
            if isinstance(part, str):
                parts.append(part)
            elif text:
                parts.append(whole.part(at, at + len(text)))
            at += len(text)
        self._agents[agent] = parts

    def share(self, message: Sequence[int]) -> Chunk:
        """A message computed alone, behind the neutral tokens; remembered, so that all agents take the same."""
        tokens = tuple(int(t) for t in message)
        if tokens not in self._shared:
            self._shared[tokens] = compute(self.model, tokens, self.neutral)
            if len(self._shared) > self.messages:
                self._shared.popitem(last=False)
        self._shared.move_to_end(tokens)
        return self._shared[tokens]

    def said(self, cache: KVCache, tokens: Sequence[int], start: int) -> Chunk:
        """The message that stands at `start` in the cache of the agent that wrote it, instead of computing it alone."""
        at, chunk = len(self.neutral), take(cache, tokens, start, "")
        chunk = replace(chunk, base=at, rows=tuple(moved(chunk, layer, at) for layer in self._layers))
        self._shared[chunk.tokens] = chunk
        return chunk

    def read(self, agent: str, messages: Mapping[str, Sequence[int]]) -> Read:
        """The agent's prompt with these messages, ready to be answered: corrected from anchors, or prefilled."""
        begun = perf_counter()
        if agent not in self._agents:
            raise CacheError("kvcomm: " + unknown("agent", agent, self._agents))
        names = {part for part in self._agents[agent] if isinstance(part, str)}
        if names != set(messages) or not all(len(x) for x in messages.values()):
            raise CacheError(
                f"kvcomm: {agent!r} reads {sorted(names)}; give token ids for each, not {sorted(messages)}."
            )
        pieces, at = [], 0
        for i, part in enumerate(self._agents[agent]):
            chunk = self.share(messages[part]) if isinstance(part, str) else part
            pieces.append(_Piece(i, part if isinstance(part, str) else "", chunk, at))
            at += len(chunk)
        tokens = tuple(t for piece in pieces for t in piece.chunk.tokens)
        chosen: dict[int, tuple[list[Anchor], Tensor]] = {}
        entropy: dict[str, float] = {}
        why = ""
        for piece in pieces:
            if piece.name and not why:
                found = [
                    a for a in self.anchors.get(piece.name, ())
                    if len(a.chunk) >= len(piece.chunk) and (agent, piece.part) in a.deltas
                ]  # fmt: skip
                if len(found) < 2:
                    why = f"{piece.name}: {len(found)} anchors of its length"
                    continue
                p = similarity(piece.chunk, found)
                bits = float(torch.special.entr(p).sum()) / math.log(2)
                entropy[piece.name] = bits
                chosen[piece.part] = found, p
                if bits > self.gamma * math.log2(len(found)):
                    why = f"{piece.name}: entropy {bits:.2f} bits"
        cache = KVCache(self.model)
        if why:
            logits, reused = (
                self._dense(agent, pieces, tokens, cache),
                len(pieces[0].chunk) if not pieces[0].name else 0,
            )
        else:
            for found, p in chosen.values():
                self._count(found, p)
            place(cache, self._corrected(agent, pieces, chosen), [piece.start for piece in pieces])
            last = len(tokens) - 1
            logits, reused = feed(self.model, cache, tokens[last:], [last]).logits, last
        assert logits is not None
        return Read(cache, tokens, logits, reused, entropy, why, perf_counter() - begun)

    def _count(self, anchors: list[Anchor], p: Tensor) -> None:
        mass = 0.0
        for i in p.argsort(descending=True).tolist():
            if mass >= self.top_p:
                break
            anchors[i].uses += 1
            mass += float(p[i])

    def _corrected(
        self, agent: str, pieces: list[_Piece], chosen: Mapping[int, tuple[list[Anchor], Tensor]]
    ) -> list[Chunk]:
        """The pieces with their corrections, where they were computed."""
        out = []
        for before, piece in zip([None, *pieces], pieces):
            if piece.name:
                anchors = chosen[piece.part][0]
                deltas = [anchor.deltas[agent, piece.part][0] for anchor in anchors]
                weights = by_token(piece.chunk, anchors, self.temperature)
            elif before is not None and before.name:
                anchors = chosen[before.part][0]
                deltas = [anchor.deltas[agent, before.part][1] for anchor in anchors]
                weights = by_channel(before.chunk, anchors, self.temperature)
            else:  # at the head of the prompt: exact as it is
                out.append(piece.chunk)
                continue
            out.append(plus(piece.chunk, deltas, weights))
        return out

    def _dense(self, agent: str, pieces: list[_Piece], tokens: tuple[int, ...], cache: KVCache) -> Tensor | None:
        """A full prefill behind the head of the prompt; its messages become anchors."""
        head = 0 if pieces[0].name else len(pieces[0].chunk)
        if head == len(tokens):
            head -= 1
        if head:
            place(cache, pieces[0].chunk.part(0, head), 0)
        logits = feed(self.model, cache, tokens[head:], range(head, len(tokens))).logits
        for piece, after in zip(pieces, [*pieces[1:], None]):
            if piece.name:
                held = self.anchors.setdefault(piece.name, [])
                anchor = next((a for a in held if a.chunk.tokens == piece.chunk.tokens), None)
                if anchor is None:
                    held.append(anchor := Anchor(piece.chunk))
                follows = [] if after is None or after.name else self._delta(cache, after)
                anchor.deltas[agent, piece.part] = self._delta(cache, piece._replace(chunk=anchor.chunk)), follows
                if len(held) > self.limit:
                    oldest = [a for a in held[: self.window] if a is not anchor]
                    held.remove(min(oldest, key=lambda a: a.uses))
        return logits

    def _delta(self, cache: KVCache, piece: _Piece) -> Delta:
        """What a full prefill differs by, with its keys turned back to where the piece was computed."""
        true = take(cache, piece.chunk.tokens, piece.start, "")
        rows = [moved(true, layer, piece.chunk.base) for layer in self._layers]
        return [(a.k - b.k, a.v - b.v) for a, b in zip(rows, piece.chunk.rows, strict=True)]

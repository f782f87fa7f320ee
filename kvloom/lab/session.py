"""One recipe on one example: the prompt, the answers, and what the cache weighs in between."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import KVCache, Recipe
from kvloom.lab import fidelity
from kvloom.lab.chat import encode, first_turn, next_turn, stops_of
from kvloom.lab.clock import Clock
from kvloom.lab.metrics import score
from kvloom.lab.tasks import Example, Turn

__all__ = ["MODES", "Mode", "Outcome", "Reply", "Session", "run"]

Mode = Literal["multi-turn", "multi-request"]
MODES: tuple[Mode, ...] = ("multi-turn", "multi-request")


@dataclass
class Reply:
    """The answer to one turn. `score` from 0 to 1, or bits per byte; `tokens`: how many were generated or read."""

    prediction: str
    score: float
    tokens: int


@dataclass
class Outcome:
    """Bytes right after the prompt (`used` stored, `room` reserved for growth), times, answers.

    `peak`: bytes that the prefill took at most, above what was there before, where the system tells. `decode_ms`: median of
    one decoded token. `perplexity`: per token, of text that was read. `fidelity`: how far the predictions moved from the full cache's, for tasks that measure it.
    """

    tokens: int
    used: int
    room: int
    prefill_seconds: float
    peak: int | None
    decode_ms: float | None = None
    replies: list[Reply] = field(default_factory=list)
    fidelity: dict[str, Any] | None = None
    perplexity: float | None = None


class Session:
    """A model with one cache of a recipe. `times`: seconds of each decoded token."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, recipe: Recipe | str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = KVCache(model, recipe)
        self.times: list[float] = []

    def read(self, cache: KVCache, ids: Tensor) -> Tensor:
        """Feeds ids [1, m]; logits [V] of the last token."""
        logits: Tensor = self.model(ids.to(self.model.device), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        return logits

    def step(self, cache: KVCache, token: int) -> Tensor:
        """One decoded token, timed; logits [V] after it."""
        clock = Clock()
        logits = self.read(cache, torch.tensor([[token]]))
        self.times.append(clock.seconds())
        return logits

    def answer(self, logits: Tensor, turn: Turn, cache: KVCache) -> tuple[str, int]:
        """Greedy decoding into a copy of the cache, which goes with it."""
        probe, stops, got = copy.deepcopy(cache), stops_of(self.model, self.tokenizer), []
        for left in range(turn.limit - 1, -1, -1):
            token = int(logits.argmax(-1))
            if token in stops:
                break
            got.append(token)
            if left == 0 or (turn.stop_at_line and "\n" in self.tokenizer.decode(got).lstrip("\n")):
                break
            logits = self.step(probe, token)
        return str(self.tokenizer.decode(got, skip_special_tokens=True)), len(got)

    def bits(self, logits: Tensor, turn: Turn) -> tuple[float, int]:
        """Bits of the turn's text, read token by token behind the prompt, and how many tokens it has."""
        text = turn.answers[0]
        ids = encode(self.tokenizer, text)[0].tolist()
        nats = 0.0
        for at, token in enumerate(ids):
            nats -= float(logits.float().log_softmax(-1)[token])
            if at + 1 < len(ids):
                logits = self.step(self.cache, token)
        return nats / math.log(2), len(ids)


def between(tokenizer: Any, turn: Turn, question: str, chat: bool) -> str:
    """The text from the right answer to `turn` to where the answer to the next question begins."""
    said = f"{turn.prefix} {turn.right}" if turn.prefix else turn.right
    if chat and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        messages.append({"role": "user", "content": question})
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        before = first_turn(tokenizer, "?")
        if whole.startswith(before) and said in whole:
            rest = whole[len(before) :]
            return rest.partition(turn.prefix)[2] if turn.prefix else rest
    return f" {turn.right}{next_turn(tokenizer, question, chat)}"


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    example: Example,
    mode: Mode = "multi-turn",
    reference: fidelity.Reference | None = None,
) -> tuple[Outcome, fidelity.Reference | None]:
    """One example under one recipe.

    multi-turn: the first question stands in the prompt, before anything is compressed; later ones come behind the *right*
    answers to those before. multi-request: the context alone is read and compressed, then each question is asked of a copy
    of its cache. What is generated is dropped after each turn. `reference`: what the full cache predicted, for tasks that
    compare with it; the full cache itself runs without and returns it.
    """
    session = Session(model, tokenizer, recipe)
    head, tail = example.parts(tokenizer)
    ids = encode(tokenizer, head)
    alone = mode == "multi-request" or example.separate
    if not alone:
        ids = torch.cat([ids, encode(tokenizer, tail)], 1)
    clock = Clock(memory=True)
    logits = session.read(session.cache, ids)
    report = session.cache.report()
    out = Outcome(ids.shape[1], report.used, report.room, clock.seconds(), clock.peak())
    made = None
    for i, turn in enumerate(example.turns):
        cache = session.cache
        if alone:
            _, tail = example.parts(tokenizer, i)
            rest = encode(tokenizer, tail)
            cache = copy.deepcopy(session.cache)
            logits = session.read(cache, rest) if rest.shape[1] else logits
        elif i:
            prefix = f"{between(tokenizer, example.turns[i - 1], turn.question, example.chat)}{turn.prefix}"
            logits = session.read(cache, encode(tokenizer, prefix))
        if turn.metric == "fidelity":
            made = fidelity.read(model, cache, logits, turn.limit, reference, session.times)
            out.fidelity = None if reference is None else fidelity.compare(reference, made)
            agreed = 1.0 if out.fidelity is None else out.fidelity["top1"]
            out.replies.append(Reply(tokenizer.decode(made.tokens), agreed, len(made.tokens)))
        elif turn.metric == "bits_per_byte":
            value, count = session.bits(logits, turn)
            out.perplexity = 2 ** (value / count)
            out.replies.append(Reply("", value / len(turn.answers[0].encode()), count))
        else:
            text, count = session.answer(logits, turn, cache)
            out.replies.append(Reply(text, score(text, turn), count))
    out.decode_ms = 1000 * statistics.median(session.times) if session.times else None
    return out, made

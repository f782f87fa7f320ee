"""What is asked of a server: when, a prompt of which spans, how long an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvloom.errors import KvloomError

__all__ = ["Ask", "Lengths", "lengths", "own", "poisson", "shared", "synthetic", "warming"]

OWN, SHARED, BLOCK = range(3)  # what a source stands for
Span = tuple[int, int]


def _source(what: int, index: int) -> int:
    return index * 4 + what


def own(index: int, tokens: int) -> Span:
    """Tokens of one request alone."""
    return _source(OWN, index), tokens


def shared(index: int, tokens: int) -> Span:
    """The first tokens of a prefix or context that several requests begin with."""
    return _source(SHARED, index), tokens


def block(index: int, tokens: int) -> Span:
    """The first tokens of a trace's block: equal where the index is."""
    return _source(BLOCK, index), tokens


@dataclass(frozen=True)
class Ask:
    """One request. `at`: seconds after the start. `spans`: (source, tokens) one after another; equal sources give equal
    tokens. `output`: tokens of the answer.
    """

    spans: tuple[Span, ...]
    output: int
    at: float = 0.0

    @property
    def prompt(self) -> int:
        return sum(n for _, n in self.spans)


@dataclass(frozen=True)
class Lengths:
    """From `low` to `high` tokens, each as likely."""

    low: int
    high: int

    def draw(self, random: np.random.Generator) -> int:
        return self.low if self.low == self.high else int(random.integers(self.low, self.high + 1))


def lengths(text: str, option: str) -> Lengths:
    """Reads "512" or "64:512"."""
    low, _, high = text.partition(":")
    try:
        found = Lengths(int(low), int(high or low))
    except ValueError:
        found = Lengths(0, 0)
    if not 1 <= found.low <= found.high <= 10_000_000:
        raise KvloomError(f"{option} {text!r} is no length. Give a number of tokens as 512, or a range as 64:512.")
    return found


def synthetic(
    requests: int, prompt: Lengths, output: Lengths, *, share: float = 0.0, prefixes: int = 1, users: int = 0, seed: int = 0
) -> list[Ask]:  # fmt: skip
    """Requests that come all at once (see `poisson`).

    `share`: part of each prompt that is one of `prefixes` common ones, in turn. `users`: that part is a context of the
    user's own instead; users ask in turn, each again and again over the same context.
    """
    if not 0 <= share < 1:
        raise KvloomError(f"--prefix-share {share} must be from 0 to below 1: the rest of a prompt is its own.")
    if users and not share:
        raise KvloomError(
            f"--users {users} ask again over their contexts: say how much of a prompt with --prefix-share."
        )
    random = np.random.default_rng(seed)
    asks = []
    for i in range(requests):
        total, answer = prompt.draw(random), output.draw(random)
        common = min(round(total * share), total - 1)
        begin = (shared(i % (users or prefixes), common),) if common else ()
        asks.append(Ask((*begin, own(i, total - common)), answer))
    return asks


def poisson(asks: Sequence[Ask], rate: float, seed: int) -> list[Ask]:
    """The same requests, `rate` a second in the mean, with exponential gaps."""
    times = np.random.default_rng((seed, 1)).exponential(1 / rate, len(asks)).cumsum()
    return [dataclasses.replace(ask, at=float(at)) for ask, at in zip(asks, times)]


def warming(asks: Sequence[Ask]) -> list[Ask]:
    """One request for each shared beginning, with an answer of one token: sent before what is measured."""
    longest: dict[int, Span] = {}
    for ask in asks:
        source, tokens = ask.spans[0]
        if source % 4 == SHARED and tokens > longest.get(source, (0, 0))[1]:
            longest[source] = (source, tokens)
    return [Ask((span,), 1) for span in longest.values()]

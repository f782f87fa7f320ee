"""Bits per byte: how well a model goes on reading a long text behind a cache of it."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from functools import lru_cache
from typing import Any

from kvloom.errors import LabError
from kvloom.lab.tasks.base import Example, Kit, Turn, generated
from kvloom.models.training.tokenizer import DOCUMENT_END

__all__ = ["CONTINUED"]

CONTINUED = 64


@lru_cache(maxsize=2)
def _plain(text: str) -> str:
    return re.sub(rf"\n*{re.escape(DOCUMENT_END)}\n*", "\n\n", text)


@lru_cache(maxsize=2)
def _per_token(tokenizer: Any, text: str) -> float:
    """About how many characters of a text make a token."""
    sample = text[:50_000]
    return len(sample) / len(tokenizer.encode(sample, add_special_tokens=False, verbose=False))


@generated("text/bits", "Bits per byte of 64 tokens behind a long piece of text; pieces follow one another.")
def bits(kit: Kit, rng: random.Random, length: int, index: int) -> Example:
    """Pieces of the kit's text in their order, from the first one again when it is used up; the same for every seed.

    The continuation is the turn's answer: read token by token behind the context, not generated.
    """
    text = _plain(kit.text)
    per_token = _per_token(kit.tokenizer, text)
    span, ahead = int(1.3 * per_token * length), int(2 * per_token * CONTINUED)
    last = len(text) - ahead
    if last < span:
        raise LabError(
            f"length={length} needs a text of {span + ahead} characters or more, but the kit's has {len(text)}."
        )
    border = span + index * span % (last - span + 1)
    border = text.rindex(" ", 0, border) if " " in text[:border] else border
    stops = [found.end() for found in re.finditer(r"\s*\S+", text[border : border + ahead])]
    stop = stops[max(0, bisect_right(stops, CONTINUED, key=lambda at: kit.count(text[border : border + at])) - 1)]
    before = text[max(0, border - span) : border]
    starts = [found.start() for found in re.finditer(r"\S+", before)]
    turn = Turn("", (text[border : border + stop],), CONTINUED, "bits_per_byte")

    def build(words: int) -> Example:
        return Example("", before[starts[-min(words, len(starts))] :], (turn,), "{context}{question}", chat=False)

    return kit.fit(build, length, length // 2)

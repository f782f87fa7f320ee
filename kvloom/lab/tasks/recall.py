"""The bundled model's own tasks: planted facts in wordings it was trained on, with keys it never saw, asked in two or three turns.

Later turns ask for other facts of the same document, so a cache that kept only what the first question looked at fails there.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from kvloom.errors import LabError
from kvloom.lab.tasks.base import Example, Kit, Turn, generated
from kvloom.models.training.evaluate import holds
from kvloom.models.training.recall import KINDS, Haystack, Sample, make_sample
from kvloom.models.training.tokenizer import DOCUMENT_END

__all__: list[str] = []

MOST = 250_000  # characters of the text that facts are planted in


@lru_cache(maxsize=2)
def _haystack(tokenizer: Any, text: str) -> Haystack:
    return Haystack(text, lambda piece: len(tokenizer.encode(piece, add_special_tokens=False)))


LIMITS = {"single": 32, "multi-key": 32, "multi-value": 80, "multi-query": 80}  # tokens of an answer


def _example(sample: Sample) -> Example:
    turns = tuple(
        Turn(
            question.text,
            (question.answer,),
            LIMITS[question.kind],
            "recalled",
            extra={"keys": question.keys, "values": {fact.key: fact.values for fact in sample.facts}},
        )
        for question in sample.questions
    )
    return Example("", sample.document, turns, sample.frame.replace("{document}", "{context}"))


def _made(kind: str, turns: int, limit: int, kit: Kit, rng: random.Random, length: int, index: int) -> Example:
    haystack = _haystack(kit.tokenizer, kit.text[:MOST].replace(DOCUMENT_END, "\n"))
    seed, room = rng.getrandbits(32), length - turns * limit
    for _ in range(20):  # the sample's own length is within 2 %, and other facts come with another length
        if room < 32:
            break
        sample = make_sample(kind, room, seed, haystack, kit.count, turns=turns)
        if not all(holds(question.answer, question, sample.facts) for question in sample.questions):
            seed += 1  # a value is also the number in a key such as "word-461"
            continue
        example = _example(sample)
        over = kit.size(example) - length
        if over <= 0:
            return example
        room -= over + length // 200
    raise LabError(
        f"length={length} is too short for the facts and {turns} answers of {limit} tokens of recall/{kind}."
    )


for _kind, _turns, _limit, _about in (
    ("single", 3, 32, "three facts, one asked in each of three turns"),
    ("multi-key", 3, 32, "eleven facts, one asked in each of three turns"),
    ("multi-value", 2, 80, "two keys with three values, all values of one key asked in each of two turns"),
    ("multi-query", 2, 80, "nine facts, three keys asked in each of two turns"),
):
    generated(f"recall/{_kind.replace('-', '_')}", f"Planted facts: {_about}.")(partial(_made, _kind, _turns, _limit))


@generated(
    "selection",
    "Planted facts of three kinds in one document, asked in three turns; every third example begins with another kind.",
)
def _kinds(kit: Kit, rng: random.Random, length: int, index: int) -> Example:
    """`about`: the number of the first turn's kind; see `kvloom.lab.selection`."""
    example = _made(KINDS, 3, 48, kit, rng, length, index)
    first = index % 3
    return replace(example, turns=(*example.turns[first:], *example.turns[:first]), about={"first": first})

"""Recall tasks: facts planted in text, and questions about them.

Used for training, evaluation, tests and the demo. ``plan_facts`` writes needles, questions and answers from a
seed; ``make_sample`` plants them in any text to a length in tokens of any tokenizer. Keys, nouns and wordings
come in two disjoint splits, "train" and "held-out".
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from kvloom.models.training.wordings import EASY, HELD_OUT, LOOSE, TRAIN, Wordings

TASKS = ("single", "multi-key", "multi-value", "multi-query")
SHARED = "shared"  # one document for the last three: 9 keys with one value, 1 key with 3
KINDS = "kinds"  # one document for the first three: a fact of another kind than 8 keys with one value and 1 key with 3
FOLDER = Path(__file__).parent


@cache
def words(kind: str, split: str) -> tuple[str, ...]:
    """The words of ``words_<kind>.txt`` ("keys" or "names") in a split; every eighth line is held out."""
    lines = (FOLDER / f"words_{kind}.txt").read_text(encoding="utf-8").split()
    return tuple(word for index, word in enumerate(lines) if (index % 8 == 7) == (split == "held-out"))


def wordings(split: str) -> Wordings:
    """The wordings of a split: "train", "held-out", "easy" (one plain one), "loose" (train and random sentences)."""
    return {"train": TRAIN, "held-out": HELD_OUT, "easy": EASY, "loose": LOOSE}[split]


@dataclass
class Fact:
    """One key with its values in order of appearance, and the sentences that state them."""

    key: str
    noun: str
    plural: str
    values: list[str]
    needles: list[str] = field(default_factory=list)
    prep: str = ""  # what links kind and key, where sentences leave it open

    @property
    def quotes(self) -> list[str]:
        """What each needle says from its key to its value: "cedar is 48213"."""
        key = re.compile(rf"(?<!\w){re.escape(self.key)}(?!\w)")
        found = []
        for needle, value in zip(self.needles, self.values, strict=True):
            place = key.search(needle)
            assert place is not None
            found.append(needle[place.start() : needle.rindex(value) + len(value)])
        return found


@dataclass
class Question:
    """A question and its answer; ``keys`` are the keys asked for and ``kind`` the task."""

    text: str
    answer: str
    kind: str
    keys: list[str]


@dataclass
class Sample:
    """A document with planted facts, and the chat that asks about them.

    ``messages`` ends with the user turn that holds the document and the first question; ``answer`` is its
    right answer. ``spans`` gives the character range of each needle in ``document``.
    """

    task: str
    document: str
    facts: list[Fact]
    questions: list[Question]
    messages: list[dict[str, str]]
    spans: list[tuple[int, int]]
    frame: str

    def prompt(self, question: int = 0) -> list[dict[str, str]]:
        """The chat that asks question number ``question`` first."""
        text = self.frame.format(document=self.document, question=self.questions[question].text)
        return [{"role": "user", "content": text}]

    @property
    def answer(self) -> str:
        """The right answer to the first question."""
        return self.questions[0].answer


def draw_key(rng: random.Random, split: str, style: str) -> str:
    """A key: "word", "two words", "name" or "id" (a word with a number)."""
    if style == "name":
        return rng.choice(words("names", split))
    word = rng.choice(words("keys", split))
    if style == "two":
        return f"{word} {rng.choice(words('keys', split))}"
    if style == "id":
        return f"{word}-{rng.randrange(10, 1000)}"
    return word


def draw_value(rng: random.Random, digits: int, split: str = "train") -> str:
    """A number of ``digits`` digits, or a word where ``digits`` is 0."""
    if digits == 0:
        return rng.choice(words("keys", split))
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def draw_facts(
    rng: random.Random,
    counts: Sequence[int],
    split: str,
    wording: str,
    *,
    same_wording: bool = True,
    styles: Sequence[str] = ("word", "word", "name", "two", "id"),
    digits: Sequence[int] = (3, 4, 5, 5, 6, 7, 8),
) -> list[Fact]:
    """Facts with ``counts[i]`` values each.

    Args:
        split: where key words come from.
        wording: where nouns and sentences come from.
        same_wording: one noun and one sentence for all facts, else a sentence drawn for each fact.
    """
    book = wordings(wording)
    noun, plural = rng.choice(book.nouns)
    if wording == "loose" and rng.random() < 0.5:  # "the copper code", "the copper": any word may be the kind of value
        word = rng.choice(words("keys", "train"))
        noun, plural = rng.choice(
            [(f"{word} {noun.split()[-1]}", f"{word} {plural.split()[-1]}")] * 2 + [(word, f"{word}s")]
        )
    style = rng.choice(styles)
    size = rng.choice(digits)
    mixed_style, mixed_size = rng.random() < 0.25, rng.random() < 0.4
    prep = book.preposition(rng)
    template = book.needle(rng, prep)
    used: set[str] = set()
    facts = []

    def fresh(make: Callable[[], str]) -> str:
        while True:
            text = make()
            parts = re.findall(r"\w+", text)  # "notes-461" takes 461 as well
            if used.isdisjoint(parts):
                used.update(parts)
                return text

    for count in counts:
        key_style = rng.choice(styles) if mixed_style else style
        key = fresh(lambda kind=key_style: draw_key(rng, split, kind))
        if not same_wording:
            prep = book.preposition(rng)
            template = book.needle(rng, prep)
        fact = Fact(key, noun, plural, [], prep=prep)
        for _ in range(count):
            length = rng.choice(digits) if mixed_size and size else size
            value = fresh(lambda n=length: draw_value(rng, n, split))
            fact.values.append(value)
            fact.needles.append(book.fill(rng, template, key=key, value=value, noun=noun, nouns=plural))
        facts.append(fact)
    return facts


def ask(rng: random.Random, facts: Sequence[Fact], wording: str) -> Question:
    """One question about all the values of one fact, or about several facts with one value each.

    The answer quotes each needle from its key to its value, which a model can do in any wording. Values of one key may
    come in any order.
    """
    book = wordings(wording)
    fact = facts[0]
    keys = [f.key for f in facts]
    if len(facts) > 1:
        kind, templates = "multi-query", book.query_questions
    elif len(fact.values) > 1:
        kind, templates = "multi-value", book.value_questions
    else:
        kind, templates = "single", book.questions
    joined = ", ".join(keys[:-1]) + " and " + keys[-1] if len(keys) > 1 else keys[0]
    number = {2: "two", 3: "three", 4: "four"}.get(max(len(keys), len(fact.values)), "")
    template = book.question(rng, templates, "{noun}" if kind == "single" else "{nouns}")
    prep = fact.prep if rng.random() < 0.5 else book.preposition(rng)
    text = book.fill(rng, template, prep, key=joined, value="", noun=fact.noun, nouns=fact.plural, count=number)
    answer = ", ".join(quote for f in facts for quote in f.quotes)
    return Question(text, answer, kind, keys)


def task_plan(
    task: str, rng: random.Random, split: str, wording: str, distractors: int | None = None, turns: int = 1
) -> tuple[list[Fact], list[Question]]:
    """Facts and ``turns`` questions of an evaluation task; all facts share one wording.

    single: one needle. multi-key: one asked among 8 distractors. multi-value: 3 values of one key, 3
    distractors. multi-query: 3 keys asked at once, 3 distractors. shared: a multi-key, a multi-value and a
    multi-query question about one document with 9 + 1 keys. kinds: a single, a multi-key and a multi-value question about one.
    """
    if task == SHARED:
        facts = draw_facts(rng, [3] + [1] * 9, split, wording)
        questions = [ask(rng, group, wording) for group in (facts[1:2], facts[:1], facts[2:5])]
        questions[0].kind = "multi-key"
        return facts, questions
    if task == KINDS:
        while True:
            lone, others = (draw_facts(rng, counts, split, wording) for counts in ([1], [3] + [1] * 8))
            if lone[0].noun != others[0].noun and lone[0].key not in {fact.key for fact in others}:
                break
        questions = [ask(rng, group, wording) for group in (lone, others[1:2], others[:1])]
        questions[1].kind = "multi-key"
        return lone + others, questions
    extra = (
        {"single": 0, "multi-key": 8, "multi-value": 3, "multi-query": 3}[task] if distractors is None else distractors
    )
    asked = 3 if task == "multi-query" else 1
    count = 3 if task == "multi-value" else 1
    facts = draw_facts(rng, [count] * (asked * turns) + [1] * extra, split, wording)
    questions = [ask(rng, facts[i * asked : (i + 1) * asked], wording) for i in range(turns)]
    return facts, questions


class Haystack:
    """Sentences of a text with their lengths in tokens, to fill documents from."""

    def __init__(self, text: str, count_tokens: Callable[[str], int]) -> None:
        self.sentences: list[str] = []
        for paragraph in text.split("\n"):
            parts = [
                part for part in paragraph.replace("! ", "!\n").replace("? ", "?\n").replace(". ", ".\n").split("\n")
            ]
            self.sentences += [part.strip() for part in parts if part.strip()]
        if not self.sentences:
            raise ValueError("the haystack text is empty")
        self.ends = [0]
        for sentence in self.sentences:
            self.ends.append(self.ends[-1] + count_tokens(" " + sentence))

    def take(self, rng: random.Random, tokens: int) -> list[str]:
        """Consecutive sentences of about ``tokens`` tokens from a random place (the end wraps round)."""
        start = rng.randrange(len(self.sentences))
        taken: list[str] = []
        while tokens > 0:
            stop = bisect_right(self.ends, self.ends[start] + tokens) - 1
            stop = max(stop, start)
            if stop == start:  # the next sentence is longer than what is left: cut it at a word
                sentence_words = self.sentences[start].split()
                share = tokens / max(1, self.ends[start + 1] - self.ends[start])
                if share < 1:
                    taken.append(" ".join(sentence_words[: max(1, int(len(sentence_words) * share))]) + ".")
                    break
                stop = start + 1
            taken += self.sentences[start:stop]
            tokens -= self.ends[stop] - self.ends[start]
            start = stop % len(self.sentences)
        return taken


def make_sample(
    task: str,
    length: int,
    seed: int,
    haystack: Haystack,
    count_tokens: Callable[[str], int],
    *,
    split: str = "held-out",
    wording: str = "train",
    distractors: int | None = None,
    question_first: bool = False,
    turns: int = 1,
) -> Sample:
    """A sample whose first user turn has about ``length`` tokens; needles stand at random depths.

    Args:
        task: one of ``TASKS``, or ``SHARED``, or ``KINDS``.
        length: tokens of the first prompt with its chat marks (within 2 %).
        split, wording: "train" or "held-out", for key words and for sentences.
        turns: questions in all; the first stands in ``messages``, the rest are for later turns.
    """
    rng = random.Random(f"{task}/{length}/{seed}/{split}/{wording}")
    facts, questions = task_plan(task, rng, split, wording, distractors, turns)
    needles = [needle for fact in facts for needle in fact.needles]
    frame = wordings(wording).frame(rng, question_first)
    fixed = frame.format(document="", question=questions[0].text) + " ".join(needles)
    want = length - count_tokens(fixed) - 6
    sentences = haystack.take(rng, max(want, 1))
    for _ in range(4):  # meet the length: sentences are counted apart, so the sum can be off by a little
        miss = want - count_tokens(" ".join(sentences))
        if abs(miss) <= max(4, length // 200):
            break
        if miss > 0:
            sentences += haystack.take(rng, miss)
        else:
            while miss < 0 and len(sentences) > 1:
                miss += count_tokens(" " + sentences.pop())
    # facts in random order, the values of one key in their order
    order = [i for i, fact in enumerate(facts) for _ in fact.needles]
    rng.shuffle(order)
    queues = [iter(fact.needles) for fact in facts]
    slots = sorted(rng.randrange(len(sentences) + 1) for _ in order)
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    position = taken = 0
    for slot, index in zip([*slots, len(sentences)], [*order, -1], strict=True):
        for text, mark in [(s, False) for s in sentences[taken:slot]] + (
            [(next(queues[index]), True)] if index >= 0 else []
        ):
            if mark:
                spans.append((position, position + len(text)))
            pieces.append(text)
            position += len(text) + 1
        taken = slot
    document = " ".join(pieces)
    sample = Sample(task, document, facts, questions, [], spans, frame)
    sample.messages = sample.prompt()
    return sample

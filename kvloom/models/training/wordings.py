"""The wordings of needles and questions, in a training and a held-out set with nothing in common.

Slots: {noun} and {nouns} (what kind of value), {key}, {value}, {count} (how many values, as a word), and
{prep}, {lead}, {ask} which are filled from small lists.
"""

from __future__ import annotations

import random
import re
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Wordings:
    """One split: nouns as (singular, plural) and templates."""

    nouns: tuple[tuple[str, str], ...]
    prepositions: tuple[str, ...]
    leads: tuple[str, ...]
    asks: tuple[str, ...]
    needles: tuple[str, ...]
    questions: tuple[str, ...]
    value_questions: tuple[str, ...]
    query_questions: tuple[str, ...]
    frames: tuple[str, ...]
    first_frames: tuple[str, ...]
    loose: float = 0.0  # chance of a sentence or question of random words around its slots

    def preposition(self, rng: random.Random) -> str:
        """What links kind and key; loose ones are two random words, "granted by"."""
        if rng.random() < self.loose:
            return f"{rng.choice(fillers())} {rng.choice(LINKS)}"
        return rng.choice(self.prepositions)

    def needle(self, rng: random.Random, prep: str) -> str:
        """A needle template; the key stands before the value."""
        if rng.random() < self.loose:
            slots = ["{key}", "{value}"]
            if rng.random() < 0.85:
                slots.insert(rng.randrange(3), "{noun}")
            return scatter(rng, slots, ".")
        template = rng.choice(self.needles).replace("{prep}", prep)
        return template.replace("{lead}", rng.choice(self.leads) if rng.random() < 0.5 else "")

    def fill(self, rng: random.Random, template: str, prep: str = "", **slots: str) -> str:
        """A sentence from a template; starts with a capital unless a key stands first."""
        asked = rng.choice(self.asks) if rng.random() < 0.5 else ""
        text = template.format(prep=prep, lead="", ask=asked, **slots)
        if template.startswith(("{key}", "{value}")):
            return text
        return text[0].upper() + text[1:]

    def question(self, rng: random.Random, templates: tuple[str, ...], noun: str) -> str:
        """A question template; `noun` is the slot that a loose one has, "{noun}" or "{nouns}"."""
        if rng.random() >= self.loose:
            return rng.choice(templates)
        slots = [noun, "{key}"]
        rng.shuffle(slots)
        return scatter(rng, slots, rng.choice("?.?"))

    def frame(self, rng: random.Random, question_first: bool) -> str:
        """The prompt around {document} and {question}."""
        frame = rng.choice(self.first_frames if question_first else self.frames)
        if rng.random() < self.loose / 2:
            first, last = sorted(("{document}", "{question}"), key=frame.index)
            gap = rng.choice((" ", "\n", "\n\n"))
            return f"{heading(rng)}{first}{gap}{heading(rng)}{last}"
        return frame


COMMON = (
    "the a an of to in on at by for from with about as is was are were be been has have had do does did can could "
    "will would should may might must this that these those it its he she they we you I his her their our your my "
    "who which what when where why how and or but if so not no all any some each every one two first last next "
    "new old here there now then again still only just also very much more most other same such than too up down "
    "out over under near find tell say said give gave take took make made see saw know knew call called write "
    "wrote keep kept hold held show get got please known used using name list text person thing place time day "
    "word line man people "
)
LINKS = ("to", "to", "with", "for", "by", "of", "in", "from", "on", "at", "under")


@cache
def fillers() -> tuple[str, ...]:
    """Words for loose sentences: common ones, and any others that no held-out wording has."""
    held = set(re.findall(r"\w+", " ".join(map(str, astuple(HELD_OUT)))))
    lines = Path(__file__).with_name("words_fillers.txt").read_text(encoding="utf-8").split()
    other = [word for word in lines if word not in held]
    return (*COMMON.split() * max(1, len(other) // len(COMMON.split())), *other)


def scatter(rng: random.Random, slots: list[str], end: str) -> str:
    """A template of the slots in this order with nought to three random words around each."""
    parts: list[str] = []
    for slot in [*slots, ""]:
        parts += rng.choices(fillers(), k=rng.choice((0, 1, 1, 2, 3) if slot else (0, 0, 0, 1, 2)))
        parts += [slot] if slot else []
    text = " ".join(parts)
    if rng.random() < 0.15:
        text = text.replace(" {value}", rng.choice((": {value}", " = {value}", ", {value}", " ({value})")))
    if rng.random() < 0.1:
        text = text.replace("{key}", rng.choice(("[{key}]", "({key})", "{key},", "{key}:", '"{key}"')))
    return text + end


def heading(rng: random.Random) -> str:
    """Nought to five random words before a document or a question: "Over wrote: "."""
    words = rng.choices(fillers(), k=rng.choice((0, 1, 1, 2, 3, 5)))
    text = " ".join(words) + rng.choice((": ", ", ", ".\n\n", ":\n")) if words else ""
    return text[:1].upper() + text[1:]


TRAIN = Wordings(
    nouns=(
        ("magic number", "magic numbers"), ("secret number", "secret numbers"), ("code", "codes"),
        ("access code", "access codes"), ("password", "passwords"), ("PIN", "PINs"),
        ("locker combination", "locker combinations"), ("secret code", "secret codes"),
        ("serial number", "serial numbers"), ("lucky number", "lucky numbers"), ("key", "keys"),
        ("registration number", "registration numbers"), ("ticket number", "ticket numbers"),
        ("door code", "door codes"), ("vault code", "vault codes"), ("badge number", "badge numbers"),
        ("passcode", "passcodes"), ("reference number", "reference numbers"), ("number", "numbers"),
        ("account number", "account numbers"), ("value", "values"), ("telephone number", "telephone numbers"),
        ("room number", "room numbers"), ("special code", "special codes"), ("record", "records"),
        ("entry", "entries"), ("answer", "answers"), ("label", "labels"),
    ),
    prepositions=("for", "for", "of", "belonging to", "assigned to", "given to", "used by", "linked to"),
    leads=(
        "remember this: ", "note that ", "it should be noted that ", "by the way, ", "important: ",
        "keep in mind that ", "as everyone here knows, ", "for the record, ", "please remember that ",
        "one more thing: ", "do not forget that ", "we were told that ", "notice: ", "it is known that ",
    ),
    asks=(
        "answer the question. ", "answer with the value only. ", "according to the text, ", "now tell me: ",
        "from the text above: ", "question: ", "a quick question: ", "next, ", "please answer: ",
        "as stated, ",
    ),
    needles=(
        "{lead}the {noun} {prep} {key} is {value}.", "{lead}the {noun} {prep} {key} is {value}.",
        "{lead}the {noun} {prep} {key} was {value}.",
        "{lead}the {noun} {prep} {key} has been set to {value}.",
        "{lead}one of the {nouns} {prep} {key} is {value}.", "{lead}a {noun} {prep} {key} is {value}.",
        "{lead}{key} has the {noun} {value}.", "{lead}{key} was given the {noun} {value}.",
        "{lead}for {key}, the {noun} is {value}.", "{lead}for {key} use the {noun} {value}.",
        "{key}'s {noun} is {value}.", "{lead}{key} uses {value} as its {noun}.", "{key}: {noun} {value}.",
        "{noun} {prep} {key}: {value}.", "{noun} ({key}): {value}.", "{key} = {value}.", "{key} -> {value}.",
        "{lead}the {noun} {prep} {key} should be {value}.",
        "{lead}in the case of {key} the {noun} reads {value}.",
        "{lead}to open {key}, enter the {noun} {value}.", "{lead}{key} goes with the {noun} {value}.",
        "{lead}the {noun} written next to {key} is {value}.", "{lead}{key} is listed with {noun} {value}.",
        "{lead}under {key} you will find the {noun} {value}.",
        "{lead}the {noun} {prep} {key} equals {value}.",
        "{lead}the {noun} that was chosen for {key} is {value}.",
        "{lead}whoever asks about {key} gets the {noun} {value}.",
        "{lead}the word {key} stands for the {noun} {value}.", "{lead}{key} received {value} as a {noun}.",
    ),
    questions=(
        "{ask}what is the {noun} {prep} {key}?", "{ask}what is the {noun} {prep} {key}?",
        "{ask}what is {key}'s {noun}?",
        "{ask}what was the {noun} {prep} {key}?", "{ask}tell me the {noun} {prep} {key}.",
        "{ask}which {noun} belongs to {key}?",
        "{ask}which {noun} goes with {key}?", "{ask}please give the {noun} {prep} {key}.",
        "{ask}give me the {noun} {prep} {key}.",
        "{ask}recall the {noun} mentioned for {key}.", "{ask}I need the {noun} {prep} {key}.",
        "{key}: {noun}?", "{noun} {prep} {key}?",
        "{ask}for {key}, what is the {noun}?", "{ask}which {noun} does {key} have?",
        "{ask}which {noun} was given to {key}?",
        "{ask}do you remember the {noun} {prep} {key}?", "{ask}what {noun} is stated for {key}?",
        "what about {key}?", "and {key}?",
        "{ask}repeat the {noun} {prep} {key}.", "{ask}the {noun} {prep} {key} is what?",
    ),
    value_questions=(
        "{ask}what are all the {nouns} {prep} {key}?", "{ask}list all the {nouns} {prep} {key}.",
        "{ask}what are the {nouns} {prep} {key}?",
        "{ask}what are the {count} {nouns} {prep} {key}?",
        "{ask}list the {count} {nouns} {prep} {key}.",
        "{ask}give every {noun} {prep} {key}.",
        "{ask}name all {nouns} {prep} {key}.",
        "{ask}tell me all the {nouns} mentioned for {key}.", "{ask}which {nouns} does {key} have?",
        "all {nouns} {prep} {key}?",
        "{ask}repeat the {nouns} {prep} {key}.", "{ask}I need every {noun} {prep} {key}.",
    ),
    query_questions=(
        "{ask}what are the {nouns} {prep} {key}?", "{ask}list the {nouns} {prep} {key}.",
        "{ask}tell me the {nouns} {prep} {key}.",
        "{ask}give me the {count} {nouns} {prep} {key}.",
        "{ask}what are the {count} {nouns} {prep} {key}?", "{nouns} {prep} {key}?",
        "{ask}please give the {nouns} {prep} {key} in this order.",
        "{ask}recall the {nouns} mentioned for {key}.",
        "{ask}which {nouns} belong to {key}?", "{ask}I need the {nouns} {prep} {key}.", "{key}: {nouns}?",
        "{ask}for {key}, what are the {nouns}?",
    ),
    frames=(
        "{document}\n\n{question}", "{document}\n\n{question}", "{document} {question}",
        "{document}\n{question}",
        "Here is a document.\n\n{document}\n\nQuestion: {question}",
        "Read this text.\n\n{document}\n\n{question}",
        "Some facts are hidden in the following text. Remember them.\n\n{document}\n\n{question}",
        "Text: {document}\n\nQuestion: {question}", "I will ask you about this.\n{document}\n\n{question}",
    ),
    first_frames=(
        "{question}\n\n{document}", "{question} Answer from this text.\n\n{document}",
        "Question: {question}\n\nText: {document}", "Find this in the text below: {question}\n\n{document}",
        "{question}\n\n{document}\n\n{question}", "I want to know: {question}\n{document}\n\nAnswer now.",
    ),
)  # fmt: skip

HELD_OUT = Wordings(
    nouns=(
        ("special number", "special numbers"), ("unlock code", "unlock codes"), ("entry code", "entry codes"),
        ("order number", "order numbers"), ("safe combination", "safe combinations"), ("case number",
        "case numbers"),
        ("membership number", "membership numbers"), ("token", "tokens"),
    ),
    prepositions=("for", "attached to", "associated with", "reserved for"),
    leads=("hidden fact: ", "let it be said that ", "a small remark: ", "you should know that ",
    "as a reminder, "),
    asks=("look it up and answer. ", "in the document, ", "one thing I want to know: ", "be brief. "),
    needles=(
        "{lead}the {noun} {prep} {key} turns out to be {value}.",
        "{lead}the correct {noun} {prep} {key} is {value}.",
        "{lead}the clerk wrote down {key} with the {noun} {value}.",
        "{lead}{key} carries the {noun} {value}.", "{lead}if you see {key}, the {noun} to type is {value}.",
        "[{key}] {noun}: {value}.", "{lead}our {noun} {prep} {key} remains {value}.",
        "{lead}{key} can be reached with the {noun} {value}.",
        "{lead}we registered {key} under the {noun} {value}.",
    ),
    questions=(
        "{ask}can you find the {noun} {prep} {key}?",
        "{ask}what does the text give as the {noun} {prep} {key}?",
        "{ask}under which {noun} is {key} known?", "{ask}say the {noun} {prep} {key}.",
        "{ask}how does the {noun} {prep} {key} read?",
        "{ask}look for {key} and report its {noun}.", "{ask}let me know which {noun} {key} carries.",
    ),
    value_questions=(
        "{ask}can you find all of the {nouns} {prep} {key}?", "{ask}write out each {noun} {prep} {key}.",
        "{ask}several {nouns} are {prep} {key}; which ones?",
        "{ask}report the {nouns} {prep} {key}.",
    ),
    query_questions=(
        "{ask}can you find the {nouns} {prep} {key}?", "{ask}write out the {nouns} {prep} {key}.",
        "{ask}say the {nouns} {prep} {key}.", "{ask}look for {key} and report their {nouns}.",
    ),
    frames=("Study the passage below.\n\n{document}\n\nTask: {question}", "{document}\n\nNow, {question}",
    "Passage: {document}\n\n{question}"),
    first_frames=("Task: {question}\n\nPassage: {document}", "{question} The passage follows.\n\n{document}"),
)  # fmt: skip

LOOSE = replace(TRAIN, loose=0.5)  # what training rows have

EASY = replace(  # one plain wording, with which training begins
    TRAIN,
    nouns=TRAIN.nouns[:1],
    prepositions=("for",),
    leads=("",),
    asks=("",),
    needles=TRAIN.needles[:1],
    questions=TRAIN.questions[:1],
    value_questions=TRAIN.value_questions[:1],
    query_questions=TRAIN.query_questions[:1],
    frames=TRAIN.frames[:1],
)

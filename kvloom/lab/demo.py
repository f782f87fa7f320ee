"""The demo: facts hidden in a book, the bundled model asked for them, once per recipe."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from kvloom.lab.measure import Question, Task
from kvloom.models.training.recall import Haystack, draw_key, draw_value

__all__ = ["RECIPES", "TEXT", "demo_task"]

TEXT = Path(__file__).parents[1] / "models" / "text" / "gutenberg.txt"
RECIPES = (
    "full",
    "streamingllm(window=508)",
    "h2o(budget=512)",
    "snapkv(budget=512)",
    "razorattention(window=508)",
    "mikv(budget=0.2)",
    "kivi(bits=2)",
    "snapkv(budget=1024) | kivi(bits=4)",
)
FACTS = 6  # four are asked for, two only distract


def demo_task(tokenizer: Any, tokens: int = 4000, seed: int = 0, continuation: int = 64) -> Task:
    """A document of about `tokens` tokens with six facts at known depths, and questions about four of them.

    Two questions stand in the prompt, behind the document, so that a method that watches the end of the prompt can
    see what matters. Two come as later turns, when the cache is already compressed.
    """
    rng = random.Random(seed)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    start = rng.randrange(600_000)
    hay = Haystack(TEXT.read_text(encoding="utf-8")[start : start + 60_000].partition("\n")[2], count)
    keys: list[str] = []
    while len(keys) < FACTS:
        key = draw_key(rng, "held-out", "word")
        keys += [key] if key not in keys else []
    values = [draw_value(rng, 4) for _ in keys]
    sentences, total, text_at = [], 0, 0
    while total < tokens - 25 * FACTS - 60:
        total += hay.ends[text_at + 1] - hay.ends[text_at]
        sentences.append(hay.sentences[text_at])
        text_at += 1
    order = rng.sample(range(FACTS), FACTS)
    at = {int(len(sentences) * (0.08 + 0.8 * i / (FACTS - 1))): index for i, index in enumerate(order)}
    pieces = []
    for i, sentence in enumerate(sentences):
        if i in at:
            pieces.append(f"The magic number for {keys[at[i]]} is {values[at[i]]}.")
        pieces.append(sentence)
    asks = [Question(f"What is the magic number for {k}?", v) for k, v in zip(keys, values)]
    rest = tokenizer.encode(" " + " ".join(hay.sentences[text_at : text_at + 40]), add_special_tokens=False)
    return Task(
        document=" ".join(pieces),
        first=tuple(asks[:2]),
        later=tuple(asks[2:4]),
        continuation=tokenizer.decode(rest[:continuation]),
        joint=f"What are the magic numbers for {keys[0]} and {keys[1]}?",
    )

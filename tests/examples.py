"""Examples of the lab's tasks, for tests."""

from __future__ import annotations

import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvloom.lab.measure import NANO
from kvloom.lab.tasks import TASKS, Example, Kit


@cache
def nano_kit() -> Kit:
    """The bundled model's tokenizer and the shipped text."""
    return Kit(AutoTokenizer.from_pretrained(NANO))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token; no marks, no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make(name: str, kit: Kit, length: int, index: int = 0, seed: int = 0) -> Example:
    """One example of a generated task."""
    task = TASKS[name]
    assert task.make is not None
    return task.make(kit, random.Random(f"{seed}/{index}"), length, index)


def prompt(kit: Kit, example: Example, turn: int = 0) -> str:
    """The text that the model reads before the answer to a turn that is asked first."""
    return "".join(example.parts(kit.tokenizer, turn))

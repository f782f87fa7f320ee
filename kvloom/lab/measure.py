"""One recipe on one text: bytes, times, answers, and how far the predictions move from the full cache's."""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvloom import KVCache
from kvloom.errors import ModelError
from kvloom.lab.chat import encode, first_turn, next_turn, stops_of
from kvloom.lab.clock import Clock
from kvloom.lab.outliers import SUFFIX, plant
from kvloom.lab.session import Session

__all__ = ["NANO", "Answer", "Measured", "Question", "Task", "compare", "load_model", "run_recipe"]

NANO = Path(__file__).parents[1] / "models" / "nano"


@dataclass(frozen=True)
class Question:
    """A question and, if known, its right answer. Several answers stand in order with ", " between them."""

    text: str
    answer: str | None = None


@dataclass
class Answer:
    """What a recipe answered; `right` is None where no answer is known."""

    question: str
    expected: str | None
    got: str
    right: bool | None
    turn: int


@dataclass(frozen=True)
class Task:
    """A document, questions of the first turn (asked with the document) and of later turns on the same cache.

    `continuation`: text that both caches read token by token, to compare their predictions.
    `joint`: one sentence that asks all of `first` at once; its answer is split at commas.
    """

    document: str
    first: tuple[Question, ...]
    later: tuple[Question, ...] = ()
    continuation: str = ""
    frame: str = "{document}\n\n{question}"
    joint: str = ""


@dataclass
class Measured:
    """One row of the table. Bytes are counted right after the prompt; `kl` in nats per token, times in wall time."""

    recipe: str
    tokens: int
    used: int
    nbytes: int
    smaller: float
    prefill_seconds: float
    decode_ms: float
    right: int
    asked: int
    kl: float
    agreement: float
    answers: list[Answer] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def load_model(name: str) -> tuple[PreTrainedModel, Any]:
    """Model (evaluation mode) and tokenizer of a local folder, a hub id, or "nano", the bundled model in fp32.

    Behind any of them "+outliers" plants channels that stand out in keys and values; the outputs stay the same.
    Raises ModelError with the reason if it cannot be loaded.
    """
    source = name.removesuffix(SUFFIX)
    path = str(NANO) if source == "nano" else source
    dtype: Any = torch.float32 if source == "nano" else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model={name!r} cannot be loaded ({first}). Give a folder with a transformers model, a hub id, or 'nano'."
        ) from error
    if torch.cuda.is_available():
        model = model.to("cuda")
    if name.endswith(SUFFIX):
        plant(model)
        model.config._name_or_path = name
    return model.eval(), tokenizer


def _answer(held: Session, logits: Tensor, limit: int) -> str:
    """Greedy decoding from the logits [V] of the last prompt token. The end token stays out of the cache."""
    stops, got = stops_of(held.model, held.tokenizer), []
    for _ in range(limit):
        token = int(logits.argmax(-1))
        if token in stops:
            break
        got.append(token)
        logits = held.step(held.cache, token)
    return str(held.tokenizer.decode(got, skip_special_tokens=True)).strip()


def _forced(held: Session, ids: Tensor) -> Tensor:
    """Log probabilities [m, V] after each of the ids [1, m], read one by one into a copy of the cache."""
    twin = copy.deepcopy(held.cache)
    return torch.stack([held.step(twin, token) for token in ids[0].tolist()]).float().log_softmax(-1).cpu()


def _holds(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as words of its own."""
    return re.search(rf"(?<!\w){re.escape(answer.strip(' .'))}(?!\w)", text) is not None


def _graded(questions: Sequence[Question], got: str, turn: int) -> list[Answer]:
    parts = [part.strip() for part in got.split(",")] if len(questions) > 1 else [got]
    answers = []
    for i, question in enumerate(questions):
        part = parts[i] if i < len(parts) else ""
        right = None if question.answer is None else _holds(part, question.answer)
        answers.append(Answer(question.text, question.answer, part, right, turn))
    return answers


@torch.no_grad()
def run_recipe(
    model: PreTrainedModel, tokenizer: Any, recipe: str, task: Task, reference: Tensor | None, limit: int = 40
) -> tuple[Measured, Tensor]:
    """One prefill with this recipe, then forced reading, answers and later turns on its cache.

    `reference`: log probabilities [m, V] of the full cache, None while the full cache itself is measured.
    Returns the row and this recipe's own log probabilities.
    """
    held = Session(model, tokenizer, recipe)
    question = task.joint or " ".join(q.text for q in task.first)
    prompt = encode(tokenizer, first_turn(tokenizer, task.frame.format(document=task.document, question=question)))
    clock = Clock()
    logits = held.read(held.cache, prompt)
    prefill = clock.seconds()
    report = held.cache.report()
    own = _forced(held, encode(tokenizer, task.continuation))
    base = own if reference is None else reference
    kl = float((base.exp() * (base - own)).sum(-1).mean())
    agreement = float((base.argmax(-1) == own.argmax(-1)).float().mean())
    got = _answer(held, logits, limit)
    answers = _graded(task.first, got, 1)
    for turn, later in enumerate(task.later, 2):
        logits = held.read(held.cache, encode(tokenizer, next_turn(tokenizer, later.text)))
        answers += _graded([later], _answer(held, logits, limit), turn)
    known = [a.right for a in answers if a.right is not None]
    row = Measured(
        recipe=recipe,
        tokens=prompt.shape[1],
        used=report.used,
        nbytes=report.nbytes,
        smaller=1.0,
        prefill_seconds=prefill,
        decode_ms=1000 * statistics.median(held.times) if held.times else 0.0,
        right=sum(known),
        asked=len(known),
        kl=max(0.0, kl),
        agreement=agreement,
        answers=answers,
    )
    return row, own


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    recipes: Sequence[str],
    task: Task,
    limit: int = 40,
    tell: Callable[[str], None] = lambda recipe: None,
) -> list[Measured]:
    """All recipes on one task; the full cache comes first, asked for or not. `tell` is called before each."""
    for recipe in recipes:
        KVCache(model, recipe)  # a wrong recipe fails before any work
    rows: list[Measured] = []
    reference: Tensor | None = None
    for recipe in ["full", *(r for r in recipes if r.strip() != "full")]:
        tell(recipe)
        row, own = run_recipe(model, tokenizer, recipe, task, reference, limit)
        reference = own if reference is None else reference
        rows.append(row)
        row.smaller = rows[0].used / max(1, row.used)
    return rows

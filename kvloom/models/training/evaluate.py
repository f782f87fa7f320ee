"""Measures a model's recall and its bits per byte, with the full cache.

``python -m kvloom.models.training.evaluate --model FOLDER --prompts 200 --lengths 1024 2048 4096`` prints a
table of exact matches with Wilson intervals of 95 %. Keys are words that training never used; the second
part of the table has wordings that training never used. A greedy answer is right when it names the values
asked for and no other value of the document; values of several keys must come in the order asked for.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvloom.models.training.data import Source
from kvloom.models.training.model import TrainLlama
from kvloom.models.training.recall import (
    SHARED,
    TASKS,
    Fact,
    Haystack,
    Question,
    Sample,
    make_sample,
    task_plan,
    wordings,
)
from kvloom.models.training.tokenizer import BOS, DOCUMENT_END, EOS

PACKAGE = Path(__file__).parents[1]
SHIPPED_TEXT = PACKAGE / "text" / "gutenberg.txt"


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of 95 % for ``right`` of ``count``."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat up to where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def answers_right(model: Any, tokenizer: Any, sample: Sample) -> list[bool]:
    """Per question of a sample (each asked first, right after the document): whether the greedy answer is right.

    The document runs once; its cache is cut back before each question.
    """
    prompts = [encode_chat(tokenizer, sample.prompt(i)) for i in range(len(sample.questions))]
    shared = len(prompts[0]) - 1
    if len(prompts) > 1:
        shared = next(i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    past = DynamicCache(config=model.config)
    model(torch.tensor([prompts[0][:shared]]), past_key_values=past, logits_to_keep=1)
    right = []
    for prompt, question in zip(prompts, sample.questions, strict=True):
        answer = tokenizer.encode(f" {question.answer}{EOS}", add_special_tokens=False)
        ids = torch.tensor([prompt[shared:] + answer[:-1]])
        logits = model(ids, past_key_values=past, logits_to_keep=len(answer)).logits[0]
        said = logits.argmax(-1).tolist()
        if said != answer:  # greedy decoding goes another way: where to?
            same = next(i for i, (x, y) in enumerate(zip(said, answer, strict=True)) if x != y)
            past.crop(same - len(answer) + 1)
            said = _greedy(model, past, answer[:same], said[same], tokenizer.eos_token_id, len(answer) + 8)
        right.append(holds(tokenizer.decode(said, skip_special_tokens=True), question, sample.facts))
        past.crop(shared - past.get_seq_length())
    return right


def _greedy(model: Any, past: Any, said: list[int], token: int, end: int, limit: int) -> list[int]:
    said = [*said, token]
    while token != end and len(said) < limit:
        token = int(model(torch.tensor([[token]]), past_key_values=past).logits[0, -1].argmax())
        said.append(token)
    return said


def holds(answer: str, question: Question, facts: Sequence[Fact]) -> bool:
    """Whether an answer names the values asked for, key by key, and no other planted one."""
    planted = {value for fact in facts for value in fact.values}
    asked = [fact for key in question.keys for fact in facts if fact.key == key]
    found = [word for word in re.findall(r"\w+", answer) if word in planted]
    wanted = [value for fact in asked for value in fact.values]
    return found == wanted if len(asked) > 1 else sorted(found) == sorted(wanted)


def recall_counts(
    model: Any,
    tokenizer: Any,
    haystack: Haystack,
    length: int,
    prompts: int,
    wording: str,
    tasks: Sequence[str],
    **options: Any,
) -> dict[str, int]:
    """Exact matches of ``prompts`` per task at ``length`` tokens; several-needle tasks share documents."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    right = dict.fromkeys(tasks, 0)
    for kind in dict.fromkeys(task if task == "single" else SHARED for task in tasks):
        for seed in range(prompts):
            sample = make_sample(kind, length, seed, haystack, count, wording=wording, **options)
            for question, good in zip(sample.questions, answers_right(model, tokenizer, sample), strict=True):
                if question.kind in right:
                    right[question.kind] += good
    return right


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, text: str, window: int, windows: int) -> tuple[float, int]:
    """Mean bits per UTF-8 byte over the first ``windows`` windows of ``window`` tokens, and the number of
    bytes.

    Each window starts with the begin token and is read from nothing; its first token is not counted.
    """
    ids = tokenizer.encode(text[: window * windows * 6], add_special_tokens=False)
    nats, size = 0.0, 0
    for start in range(0, min(len(ids) - window + 2, windows * (window - 1)), window - 1):
        piece = ids[start : start + window - 1]
        row = torch.tensor([[tokenizer.bos_token_id, *piece]])
        logits = model(row, use_cache=False).logits[0]
        nats += torch.nn.functional.cross_entropy(logits[1:-1].float(), row[0, 2:], reduction="sum").item()
        size += len(tokenizer.decode(piece[1:]).encode())
    return nats / math.log(2) / size, size


@torch.no_grad()
def quick_recall(model: TrainLlama, source: Source, length: int, count: int = 24) -> dict[str, float]:
    """Exact match per task with held-out keys ("-w": held-out wordings too) while training, ``count``
    prompts each.

    An answer counts when each of its tokens is the likeliest after the right ones before it.
    """
    result = {}
    for task in TASKS:
        for wording in ("train", "held-out"):
            right = 0
            for seed in range(count):
                rng = random.Random(f"quick/{task}/{seed}")
                facts, questions = task_plan(task, rng, "held-out", wording)
                before, after = (
                    wordings(wording).frame(rng, False).replace("{question}", questions[0].text).split("{document}")
                )
                needles = [" " + needle for fact in facts for needle in fact.needles]
                head, *middle, tail = source.encode([f"{BOS}<|user|>{before}", *needles, f"{after}{EOS}<|assistant|>"])
                asked = [fact for key in questions[0].keys for fact in facts if fact.key == key]
                answer, also = source.answer([quote for fact in asked for quote in fact.quotes])
                hay = source.text(max(8, length - sum(map(len, (head, *middle, tail)))))
                stops = [0, *(torch.from_numpy(source.closes[hay]).nonzero().flatten() + 1).tolist()]
                places = sorted(rng.choice(stops) for _ in middle)
                ids, taken = list(head), 0
                for needle, place in zip(middle, places, strict=True):
                    ids += [*hay[taken:place].tolist(), *needle]
                    taken = place
                ids += [*hay[taken:].tolist(), *tail]
                row = torch.tensor([ids + answer])
                hidden = model.hidden(row)[0, len(ids) - 1 : -1]
                said = (hidden @ model.embed.T).argmax(-1).tolist()
                free = also if len(asked) == 1 else {}
                right += all(x == y or x in free.get(i, ()) for i, (x, y) in enumerate(zip(said, answer, strict=True)))
            result[task + ("-w" if wording == "held-out" else "")] = round(right / count, 3)
    return result


def main() -> None:
    """Command line: prints Markdown tables."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PACKAGE / "nano"), help="folder for from_pretrained")
    parser.add_argument("--prompts", type=int, default=200, help="prompts a cell")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens of a prompt")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--wordings", nargs="+", default=["train", "held-out"], choices=["train", "held-out"])
    parser.add_argument("--question-first", action="store_true", help="ask before the document instead of after it")
    parser.add_argument("--text", type=Path, default=SHIPPED_TEXT, help="text to plant facts in")
    parser.add_argument("--windows", type=int, nargs="*", default=[4096, 8192], help="tokens, for bits per byte")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens per file for bits per byte")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    if args.tasks and args.prompts:
        haystack = Haystack(args.text.read_text(encoding="utf-8").replace(DOCUMENT_END, "\n"), count)
        print(f"Exact match, {args.prompts} prompts a cell, held-out keys (Wilson interval of 95 %)\n")
        print(
            "| wording | tokens | " + " | ".join(args.tasks) + " |\n|---|---|" + "---|" * len(args.tasks),
            flush=True,
        )
        for length in args.lengths:
            for wording in args.wordings:
                options = {"question_first": args.question_first}
                right = recall_counts(model, tokenizer, haystack, length, args.prompts, wording, args.tasks, **options)
                cells = []
                for task in args.tasks:
                    low, high = wilson(right[task], args.prompts)
                    cells.append(f"{right[task] / args.prompts:.1%} ({low:.1%} to {high:.1%})")
                print(f"| {wording} | {length} | " + " | ".join(cells) + " |", flush=True)
    root = os.environ.get("KVLOOM_DATA")
    files = [Path(root) / "text" / f"{name}_val.txt" for name in ("gutenberg", "wikipedia")] if root else []
    files = [path for path in files if path.exists()] or [args.text]
    if args.windows:
        print("\nBits per byte\n\n| text | " + " | ".join(f"windows of {w} tokens" for w in args.windows) + " |")
        print("|---|" + "---|" * len(args.windows))
        for path in files:
            text = path.read_text(encoding="utf-8").replace(f"\n{DOCUMENT_END}\n", EOS)
            values = [bits_per_byte(model, tokenizer, text, w, max(1, args.tokens // w))[0] for w in args.windows]
            print(f"| {path.stem} | " + " | ".join(f"{value:.3f}" for value in values) + " |", flush=True)


if __name__ == "__main__":
    main()

"""The wrapper for lm-evaluation-harness: with the full cache it must score exactly as the harness's own model does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvloom import KVCache
from kvloom.errors import LabError, RecipeError

pytest.importorskip("lm_eval", reason="the extra `harness` is not installed: pip install 'kvloom[harness]'")

from lm_eval.models.huggingface import HFLM

from kvloom.lab import harness

WORDS = ("cedar", "copper", "harbor", "lantern", "meadow", "orchid")
DOCS = [
    {
        "question": f"The magic number for {word} is {7919 * (i + 3)}. It was a bright day in April. " * 3
        + f"What is the magic number for {word}?",
        "choices": [str(7919 * (i + 3)), "12", "the harbor of a small town"],
        "gold": 0,
        "answer": f"{7919 * (i + 3)}",
    }
    for i, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """A multiple-choice, a generation and a perplexity task over one local file."""
    folder = tmp_path_factory.mktemp("harness")
    path = folder / "docs.jsonl"
    path.write_text("\n".join(json.dumps(doc) for doc in DOCS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        base = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "doc_to_text": "{{question}}\nAnswer:",
        }
        choice = {
            "task": "local_choice",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        generation = {
            "task": "local_generation",
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        }
        rolling = {
            "task": "local_rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        }
        yield [{**base, **own} for own in (choice, generation, rolling)]


class Request:
    """What the harness hands to a model."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.task_name = "local"


PAIRS = [Request(doc["question"], f" {choice}") for doc in DOCS[:3] for choice in doc["choices"]]


def test_full_gives_the_harness_own_results(nano, tasks):
    model, tokenizer = nano
    found = harness.run(model, tokenizer, ["full", "streamingllm(window=16)"], tasks, limit=4)
    own = harness.simple_evaluate(
        HFLM(model, tokenizer=tokenizer),
        tasks=tasks,
        limit=4,
        task_manager=harness.TaskManager(include_defaults=False),
        bootstrap_iters=1000,
    )["results"]
    figures = {(t, f): v for t, figures in own.items() for f, v in figures.items() if isinstance(v, float)}
    assert {t for t, _ in figures} == {"local_choice", "local_generation", "local_rolling"}
    for (task, figure), value in figures.items():
        assert found["full"][task][figure] == pytest.approx(value, rel=1e-4), (task, figure)
    few = found["streamingllm(window=16)"]
    assert few["local_rolling"]["bits_per_byte,none"] > 1.01 * found["full"]["local_rolling"]["bits_per_byte,none"]


def test_likelihoods_and_greedy_flags_are_the_harness_own(nano):
    model, tokenizer = nano
    own = HFLM(model, tokenizer=tokenizer).loglikelihood(PAIRS, disable_tqdm=True)
    ours = harness.KvloomLM(model, tokenizer=tokenizer).loglikelihood(PAIRS, disable_tqdm=True)
    for (a, greedy_a), (b, greedy_b) in zip(own, ours):
        assert a == pytest.approx(b, rel=1e-4)
        assert greedy_a == greedy_b


def test_a_shared_context_is_read_once(nano, monkeypatch):
    model, tokenizer = nano
    made: list[Any] = []

    class Counted(KVCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    wrapped = harness.KvloomLM(model, "snapkv(budget=64)", tokenizer=tokenizer)
    monkeypatch.setattr(harness, "KVCache", Counted)
    wrapped.loglikelihood(PAIRS, disable_tqdm=True)
    assert len(made) == 3


def test_the_continuation_sees_the_compressed_cache(nano):
    """Behind a context that StreamingLLM has dropped, the score is what that cache gives when read by hand."""
    model, tokenizer = nano
    recipe = "streamingllm(sinks=4, window=12)"
    wrapped = harness.KvloomLM(model, recipe, tokenizer=tokenizer)
    [(value, _)] = wrapped.loglikelihood(PAIRS[:1], disable_tqdm=True)
    context, continuation = wrapped._encode_pair(*PAIRS[0].args)
    cache = KVCache(model, recipe)
    with torch.no_grad():
        rows = [model(torch.tensor([context]), past_key_values=cache).logits[0, -1]]
        rows += [model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in continuation[:-1]]
    right = sum(float(row.log_softmax(-1)[token]) for row, token in zip(rows, continuation))
    assert value == pytest.approx(right, rel=1e-5)
    [(full, _)] = harness.KvloomLM(model, tokenizer=tokenizer).loglikelihood(PAIRS[:1], disable_tqdm=True)
    assert abs(full - value) > 0.1


def test_contexts_that_are_too_long_lose_their_start(nano):
    model, tokenizer = nano
    own = HFLM(model, tokenizer=tokenizer, max_length=32).loglikelihood(PAIRS[:3], disable_tqdm=True)
    ours = harness.KvloomLM(model, tokenizer=tokenizer, max_length=32).loglikelihood(PAIRS[:3], disable_tqdm=True)
    assert [a for a, _ in own] == pytest.approx([a for a, _ in ours], rel=1e-4)
    with pytest.raises(LabError, match="max_length=32"):
        harness.KvloomLM(model, tokenizer=tokenizer, max_length=32)._loglikelihood_tokens([(None, [1], [5] * 33)])


def test_answers_in_batches_are_those_one_by_one(nano):
    """Contexts of several lengths are padded on the left; a compressed cache must not mind."""
    model, tokenizer = nano
    until = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [Request(doc["question"][20 * i :], until) for i, doc in enumerate(DOCS)]
    for recipe in ("full", "kivi(bits=4)"):
        answers = [
            harness.KvloomLM(model, recipe, tokenizer=tokenizer, batch_size=size).generate_until(
                asked, disable_tqdm=True
            )
            for size in (1, 3)
        ]
        assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_a_wrong_recipe_is_refused_before_any_work(nano, tasks):
    model, tokenizer = nano
    with pytest.raises(RecipeError, match="snapkw"):
        harness.run(model, tokenizer, ["full", "snapkw"], tasks)


def test_an_unknown_task_is_a_lab_error(nano, monkeypatch):
    model, tokenizer = nano
    empty = harness.TaskManager(include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: empty)
    with pytest.raises(LabError, match="no_such_task"):
        harness.run(model, tokenizer, ["full"], ["no_such_task"])

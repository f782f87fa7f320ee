"""The recall generator and the bundled model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kvloom.models.training.recall as recall
from kvloom.models.training.evaluate import SHIPPED_TEXT, answers_right, holds, wilson
from kvloom.models.training.wordings import HELD_OUT, TRAIN

NANO = Path(recall.__file__).parents[1] / "nano"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(NANO, local_files_only=True)


@pytest.fixture(scope="module")
def count(tokenizer: Any) -> Any:
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def haystack(count: Any) -> recall.Haystack:
    return recall.Haystack(SHIPPED_TEXT.read_text(encoding="utf-8")[:120_000], count)


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(NANO, local_files_only=True, dtype=torch.float32).eval()


@pytest.mark.parametrize("task", [*recall.TASKS, recall.SHARED])
@pytest.mark.parametrize("wording", ["train", "held-out"])
@pytest.mark.parametrize("question_first", [False, True])
def test_needles_stand_in_the_document_at_their_spans(
    task: str, wording: str, question_first: bool, haystack: recall.Haystack, count: Any
) -> None:
    sample = recall.make_sample(task, 700, 3, haystack, count, wording=wording, question_first=question_first)
    planted = [sample.document[first:last] for first, last in sample.spans]
    assert sorted(planted) == sorted(needle for fact in sample.facts for needle in fact.needles)
    for fact in sample.facts:
        places = [sample.document.index(needle) for needle in fact.needles]
        assert places == sorted(places)  # the values of one key keep their order
        for needle, value in zip(fact.needles, fact.values, strict=True):
            assert fact.key in needle and value in needle
    text = sample.messages[0]["content"]
    assert sample.document in text and sample.questions[0].text in text
    assert (text.index(sample.questions[0].text) < text.index(sample.document)) == question_first
    for question in sample.questions:
        assert all(key in question.text for key in question.keys)


@pytest.mark.parametrize("length", [300, 1024, 4096])
@pytest.mark.parametrize("task", recall.TASKS)
def test_length_in_tokens(length: int, task: str, haystack: recall.Haystack, tokenizer: Any) -> None:
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    sample = recall.make_sample(task, length, 5, haystack, count)
    prompt = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
    assert abs(count(prompt) - length) <= 0.02 * length


def test_same_seed_same_sample(haystack: recall.Haystack, count: Any) -> None:
    first, again, other = (recall.make_sample("multi-key", 500, seed, haystack, count) for seed in (1, 1, 2))
    assert first == again
    assert first.document != other.document


def test_any_text_and_tokenizer() -> None:
    words = recall.Haystack("One two three. Four five! " * 50, lambda text: len(text.split()))
    sample = recall.make_sample("single", 200, 0, words, lambda text: len(text.split()))
    assert abs(len(sample.messages[0]["content"].split()) + 6 - 200) <= 10
    with pytest.raises(ValueError, match="empty"):
        recall.Haystack("  \n ", len)


def test_tasks_have_what_they_promise(haystack: recall.Haystack, count: Any) -> None:
    samples = {task: recall.make_sample(task, 600, 0, haystack, count) for task in recall.TASKS}
    assert len(samples["single"].facts) == 1
    assert len(samples["multi-key"].facts) == 9
    assert len(samples["multi-value"].facts[0].values) == 3
    fact = samples["multi-value"].facts[0]
    assert samples["multi-value"].answer == ", ".join(fact.quotes)
    assert [quote.split()[-1] for quote in fact.quotes] == fact.values
    assert len(samples["multi-query"].questions[0].keys) == 3
    turns = recall.make_sample("multi-key", 600, 0, haystack, count, turns=4, distractors=2)
    assert len(turns.questions) == 4 and len(turns.facts) == 6


def test_splits_share_nothing() -> None:
    for kind in ("keys", "names"):
        train, held_out = set(recall.words(kind, "train")), set(recall.words(kind, "held-out"))
        assert len(held_out) >= 100 and train.isdisjoint(held_out)
    for part in (
        "needles",
        "questions",
        "value_questions",
        "query_questions",
        "frames",
        "first_frames",
    ):
        assert set(getattr(TRAIN, part)).isdisjoint(getattr(HELD_OUT, part)), part
    assert {noun for noun, _ in TRAIN.nouns}.isdisjoint(noun for noun, _ in HELD_OUT.nouns)
    held_out = set(recall.words("keys", "held-out")) | set(recall.words("names", "held-out"))
    for seed in range(50):
        for fact in recall.draw_facts(recall.random.Random(seed), [1, 2], "held-out", "held-out"):
            assert set(re.sub(r"-\d+", "", fact.key).split()) <= held_out


def test_wilson() -> None:
    low, high = wilson(190, 200)
    assert 0.90 < low < 0.95 < high < 0.98
    assert wilson(200, 200)[1] == 1.0


def test_bundled_model_facts(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_attention_heads >= 2 * config.num_key_value_heads
    assert config.num_hidden_layers >= 6
    assert config.num_hidden_layers * config.num_key_value_heads >= 12
    assert config.head_dim == 64 and config.max_position_embeddings == 8192 and config.tie_word_embeddings
    assert config.rope_parameters["rope_type"] == "default"
    assert (NANO / "model.safetensors").stat().st_size <= 16_000_000


def test_bundled_tokenizer(tokenizer: Any) -> None:
    ids = tokenizer.encode("The code is 48213.", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids][-6:] == ["4", "8", "2", "1", "3", "."]
    chat = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "And?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>Hello?<|end|><|assistant|> 42<|end|><|user|>And?<|end|><|assistant|>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_bundled_model_recalls(model: Any, tokenizer: Any, haystack: recall.Haystack, count: Any) -> None:
    right = []
    for seed in range(4):
        for task in ("single", "multi-key"):
            sample = recall.make_sample(task, 1024, seed, haystack, count)
            right += answers_right(model, tokenizer, sample)
    assert sum(right) >= 6, right


def test_answers_are_judged_by_their_values(haystack: recall.Haystack) -> None:
    facts = [recall.Fact("cedar", "code", "codes", ["12", "7"]), recall.Fact("oak-55", "code", "codes", ["55"])]
    both = recall.Question("", "", "multi-query", ["cedar", "oak-55"])
    one = recall.Question("", "", "multi-value", ["cedar"])
    assert holds("cedar is 12, cedar is 7", one, facts) and holds("7 and 12", one, facts)
    assert not holds("cedar is 12", one, facts) and not holds("12, 7, 55", one, facts) and not holds("127", one, facts)
    assert holds("12, 7; 55", both, facts) and not holds("55, 12, 7", both, facts)


def test_judged_answer_is_what_greedy_decoding_gives(
    model: Any, tokenizer: Any, haystack: recall.Haystack, count: Any
) -> None:
    torch = pytest.importorskip("torch")
    for seed in range(3):
        sample = recall.make_sample("multi-query", 300, seed, haystack, count)
        prompt = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert [holds(text, sample.questions[0], sample.facts)] == answers_right(model, tokenizer, sample)

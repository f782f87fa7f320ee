"""Generated tasks of the lab: lengths, determinism, scores; LongEval, recall and text."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kvloom.errors import LabError
from kvloom.lab.metrics import METRICS, score
from kvloom.lab.tasks import TASKS, Example, Kit, Turn
from kvloom.lab.tasks.ruler import NIAH
from kvloom.lab.tasks.text import CONTINUED
from tests.examples import byte_tokenizer, make, nano_kit, prompt

RULER = [f"ruler/{name}" for name in (*NIAH, "vt", "cwe", "fwe")]
SCBENCH = [f"scbench/{name}" for name in ("kv", "prefix_suffix", "vt", "mf", "many_shot")]
RECALL = [f"recall/{name}" for name in ("single", "multi_key", "multi_value", "multi_query")]
NAMES = [*RULER, *SCBENCH, *RECALL, "needle", "needle/multi", "longeval/lines", "text/bits"]
DATA = Path(os.environ.get("KVLOOM_DATA", "/nonexistent"))
pytestmark = pytest.mark.usefixtures("no_data")


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_met_and_examples_come_from_the_seed(name: str, kit: Kit) -> None:
    first, second = TASKS[name].examples(kit, 4096, 2, seed=3)
    again = list(TASKS[name].examples(kit, 4096, 2, seed=3))
    assert [first, second] == again
    assert (first.context, first.turns) != (second.context, second.turns)
    for example in (first, second):
        assert 0.9 * 4096 < kit.size(example) <= 4096
        assert len(kit.tokenizer(prompt(kit, example), add_special_tokens=False)["input_ids"]) < 4096
    if name != "text/bits":
        assert next(TASKS[name].examples(kit, 4096, 1, seed=4)).turns != first.turns


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ruler/cwe"])
def test_lengths_are_met_with_a_tokenizer_of_bytes(name: str) -> None:
    kit = Kit(byte_tokenizer())
    example = make(name, kit, 8192)
    assert 0.9 * 8192 < kit.size(example) <= 8192
    assert prompt(kit, example).startswith(example.frame.partition("{context}")[0] + example.context)  # no marks


@pytest.mark.skipif(not (DATA / "models").is_dir(), reason="needs tokenizers in KVLOOM_DATA")
@pytest.mark.parametrize("model", ["stories260K", "babyllama-tok105"])
@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_met_with_other_tokenizers(name: str, model: str) -> None:
    kit = Kit(AutoTokenizer.from_pretrained(DATA / "models" / model))
    example = make(name, kit, 12000, index=5)
    assert 0.9 * 12000 < kit.size(example) <= 12000


@pytest.mark.parametrize("name", [name for name in NAMES if name != "text/bits"])
def test_the_right_answer_scores_1_and_none_0(name: str, kit: Kit) -> None:
    example = make(name, kit, 3000)
    for turn in example.turns:
        assert score(f"Well, {', '.join(turn.answers)}.", turn) == 1
        assert score("", turn) == score("I do not know.", turn) == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name: str, kit: Kit) -> None:
    with pytest.raises(LabError, match="length=30 is too short"):
        make(name, kit, 30)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([*RULER, *SCBENCH, *RECALL, "needle", "needle/multi", "longeval/lines"]),
    st.integers(0, 10**6),
    st.integers(1700, 5000),
)
def test_any_length_and_seed(name: str, seed: int, length: int) -> None:
    kit = nano_kit()
    example = make(name, kit, length, seed % 13, seed)
    assert 0.8 * length < kit.size(example) <= length
    for turn in example.turns:
        assert score(" ".join(turn.answers), turn) == 1
        if turn.metric in ("string_match_all", "within", "numbers_found", "last_number"):
            assert all(answer in example.context for answer in turn.answers)


class _Spaces:
    """A tokenizer of words, for sizes that are known."""

    bos_token = None
    chat_template = None

    def encode(self, text: str, **options: Any) -> list[str]:
        return text.split()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=40, max_size=120), st.integers(12, 150), st.integers(1, 300))
def test_fit_finds_the_largest(steps: list[int], length: int, guess: int) -> None:
    def build(units: int) -> Example:
        words = sum(steps[i % len(steps)] for i in range(units))
        return Example("", "x " * words, (Turn("", ("1",), 2),), "{context}{question}", chat=False)

    kit = Kit(_Spaces(), "text")
    sizes = [kit.size(build(units)) for units in range(1, length)]
    best = max((size for size in sizes if size <= length), default=None)
    if best is None:
        with pytest.raises(LabError, match="too short"):
            kit.fit(build, length, guess)
    else:
        assert kit.size(kit.fit(build, length, guess)) == best


def test_fit_refuses_units_that_add_nothing(kit: Kit) -> None:
    same = Example("", "x", (Turn("", ("1",), 2),), "{context}{question}", chat=False)
    with pytest.raises(LabError, match="must add tokens"):
        kit.fit(lambda units: same, 64, 1)


# LongEval


def test_longeval_lines(kit: Kit) -> None:
    example = make("longeval/lines", kit, 2048)
    numbers = dict(re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", example.context, re.MULTILINE))
    turn = example.turns[0]
    key = re.search(r"in line (\S+)\? I need the number", turn.question)[1]  # type: ignore[index]
    assert len(numbers) == example.about["lines"] == example.context.count("\n") + 1
    assert turn.answers == (numbers[key],)


@pytest.mark.skipif(not (DATA / "data" / "longeval").is_dir(), reason="needs LongEval in KVLOOM_DATA")
def test_longeval_as_published(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_DATA", str(DATA))
    for name in ("lines_200", "lines_500", "topics_5"):
        examples = list(TASKS[f"longeval/{name}"].examples(kit, 10**6, 5))
        file = DATA / "data" / "longeval" / f"{name}_{name.split('_')[0]}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(examples) == 5 < len(rows)
        for example, row in zip(examples, rows):
            text = example.frame.replace("{question}", example.turns[0].question).replace("{context}", example.context)
            assert text == row["prompt"]
            gold = row.get("correct_line") or row["topics"][0]
            assert score(gold, example.turns[0]) == 1
    generated = make("longeval/lines", kit, 2048)
    published = next(TASKS["longeval/lines_200"].examples(kit, 10**6, 1))
    start = generated.frame.partition("{context}")[0]
    assert published.context.startswith(start)
    assert re.sub(r"line \S+\?", "", published.turns[0].question) == re.sub(
        r"line \S+\?", "", generated.turns[0].question
    )


# Recall, and text


@pytest.mark.parametrize("name", RECALL)
def test_recall_asks_for_other_facts_in_each_turn(name: str, kit: Kit) -> None:
    example = make(name, kit, 2048)
    turns, asked = (2, 3) if name.endswith("query") else (2, 1) if name.endswith("value") else (3, 1)
    assert len(example.turns) == turns
    keys = [key for turn in example.turns for key in turn.extra["keys"]]
    assert len(keys) == len(set(keys)) == turns * asked
    for turn in example.turns:
        planted = turn.extra["values"]
        wanted = [value for key in turn.extra["keys"] for value in planted[key]]
        assert all(value in example.context for value in wanted)
        other = next(value for values in planted.values() for value in values if value not in wanted)
        assert score(" ".join(wanted), turn) == 1 and score(" ".join([*wanted, other]), turn) == 0
        assert score(" ".join(reversed(wanted)), turn) == (0 if name.endswith("query") else 1)
        assert kit.count(turn.answers[0]) < turn.limit


def test_recall_draws_again_where_a_value_is_part_of_a_key(kit: Kit) -> None:
    example = make("recall/multi_query", kit, 4935, 297 % 13, 297)  # its first draw had key notes-461 and value 461
    assert all(score(turn.answers[0], turn) == 1 for turn in example.turns)


def test_recall_limits_are_enough(kit: Kit) -> None:
    for name in RECALL:
        for seed in range(8):
            assert all(kit.count(turn.answers[0]) < turn.limit for turn in make(name, kit, 1024, seed=seed).turns)


def test_bits_continue_the_text(kit: Kit) -> None:
    pieces = [make("text/bits", kit, 1024, index) for index in range(4)]
    places = []
    for example in pieces:
        turn = example.turns[0]
        assert example.context + turn.answers[0] in kit.text and turn.question == "" and turn.metric not in METRICS
        assert CONTINUED - 16 < kit.count(turn.answers[0]) <= CONTINUED
        assert prompt(kit, example) == f"<|begin|>{example.context}"
        places.append(kit.text.index(example.context + turn.answers[0]))
    ends = [place + len(x.context + x.turns[0].answers[0]) for place, x in zip(places, pieces)]
    assert all(end <= place for end, place in zip(ends, places[1:]))  # no two overlap


def test_bits_need_a_long_text() -> None:
    kit = Kit(nano_kit().tokenizer, "It was a bright day. " * 50)
    with pytest.raises(LabError, match="needs a text of"):
        make("text/bits", kit, 1024)
    long = Kit(nano_kit().tokenizer, "".join(f"Day {i} was bright. " for i in range(2000)))
    assert len({make("text/bits", long, 512, index).context for index in range(20)}) == 20  # round and round


# Scores


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "right"),
    [
        ("string_match_all", " The numbers are 12 and\x0034.", ("12", "34", "56", "78"), 0.5),
        ("string_match_all", "ABCDE fghij", ("abcde", "FGHIJ"), 1),
        ("string_match_part", "it is in PARIS, france", ("Paris", "the city of Paris"), 1),
        ("string_match_part", "London", ("Paris",), 0),
        ("numbers_found", "48213 and 99.", ("48213", "99"), 1),
        ("numbers_found", "482139", ("48213",), 0),
        ("last_number", "line 12 holds <0345>.", ("345",), 1),
        ("last_number", "345, said line 12", ("345",), 0),
        ("last_number", "none", ("345",), 0),
    ],
)
def test_worked_scores(metric: str, prediction: str, answers: tuple[str, ...], right: float) -> None:
    assert score(prediction, Turn("", answers, 9, metric)) == right

"""Loaders of published data sets, on samples of the same form: prompts, answers, lengths, and files that are damaged."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import LabError
from kvloom.lab import session
from kvloom.lab.chat import first_turn
from kvloom.lab.measure import load_model
from kvloom.lab.metrics import METRICS, score
from kvloom.lab.tasks import TASKS, Example, Kit, Turn, find
from kvloom.lab.tasks.data import Record, document, lines, shortened
from kvloom.lab.tasks.longbench import BARE, E_TASKS, SPECS
from kvloom.lab.tasks.ruler_qa import hotpot, squad

HERE = Path(__file__).parent
LOADED = [name for name, task in TASKS.items() if task.load is not None and (HERE / task.path).exists()]
QA = ["ruler/qa_1", "ruler/qa_2"]


@pytest.fixture(autouse=True)
def _samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_DATA", str(HERE))


def load(name: str) -> list[Example]:
    task = find(name)
    assert task.load is not None
    return list(task.load(HERE / task.path))


def test_every_sample_is_read_by_a_task() -> None:
    """And every kind of data set has one."""
    read = {TASKS[name].path for name in [*LOADED, *QA]}
    there = {str(path.relative_to(HERE)) for path in (HERE / "data").rglob("*.json*")}
    assert there == read
    assert {name.partition("/")[0] for name in LOADED} >= {
        "longbench",
        "longbench-e",
        "scbench",
        "leval",
        "locomo",
        "qmsum",
    }


@pytest.mark.parametrize("name", LOADED)
def test_the_right_answer_scores_1_and_nothing_0(name: str) -> None:
    for example in load(name):
        for turn in example.turns:
            said = [", ".join(turn.answers)] if turn.metric == "string_match_all" else turn.answers
            assert max(score(answer, turn) for answer in said) == pytest.approx(1, abs=1e-6)
            assert score("", turn) == 0


@pytest.mark.parametrize("name", LOADED)
def test_prompts_hold_context_and_question_once(name: str, kit: Kit) -> None:
    for example in load(name):
        for i, turn in enumerate(example.turns):
            head, tail = example.parts(kit.tokenizer, i)
            assert head.endswith(example.context)
            assert turn.question.rstrip() in tail  # chat templates trim
            assert "{context}" not in head + tail
            assert "{question}" not in head + tail
            assert turn.metric in METRICS


@pytest.mark.parametrize("name", LOADED)
def test_long_texts_lose_their_middle_and_nothing_else(name: str, kit: Kit) -> None:
    """At most the length asked for, nearly all of it, with the question, the start and the end."""
    for example in load(name):
        context = " ".join([example.context] * 40)
        long = Example("x", context, example.turns, example.frame, example.chat, example.separate)
        rest = kit.size(Example("x", "", example.turns, example.frame, example.chat, example.separate))
        length = rest + 200
        short = shortened(kit, long, length)
        if kit.size(long) <= length:
            assert short is long
            continue
        assert length - 20 <= kit.size(short) <= length
        assert short.turns == example.turns
        assert short.context[:20] == context[:20]
        assert short.context[-20:] == context[-20:]
        assert "\ufffd" not in short.context  # half a character where the halves meet
        assert short.about["shortened"] == 1
        with pytest.raises(LabError, match="too short"):
            shortened(kit, long, rest)


def test_tasks_come_with_ids_and_as_many_as_there_are(kit: Kit) -> None:
    found = list(find("longbench/trec").examples(kit, 512, 5))
    assert [example.id for example in found] == ["longbench/trec/512/0", "longbench/trec/512/1"]
    assert all(kit.size(example) <= 512 for example in found)


def test_longbench_prompts_are_the_published_ones(kit: Kit) -> None:
    assert len(SPECS) == 21
    assert len(E_TASKS) == 13
    [example] = load("longbench/hotpotqa")
    prompt = "".join(example.parts(kit.tokenizer))
    order = (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    )
    content = (
        f"{order}\n\nThe following are given passages.\n{example.context}\n\n{order}\n\n"
        "Question: What wood was the mill built from?\nAnswer:"
    )
    assert prompt == first_turn(kit.tokenizer, content)
    [bare] = load("longbench/samsum")
    head, tail = bare.parts(kit.tokenizer)
    assert "<|user|>" not in head + tail
    assert (head + tail).endswith("loaves.\r\nSummary: ")
    for name, (metric, limit, prompt) in SPECS.items():
        assert prompt.count("{context}") == 1
        assert metric in METRICS
        assert limit in (32, 64, 128, 512)
        assert (name in BARE) == (name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
    assert "asconcisely" in SPECS["narrativeqa"][2]  # misspelt there, and so here


def test_longbench_e_tells_how_long_the_texts_are() -> None:
    assert [example.about["bucket"] for example in load("longbench-e/trec")] == ["0-4k", "4-8k", "8k+"]
    [turn] = load("longbench-e/trec")[0].turns
    assert turn.stop_at_line
    assert "Number of something" in turn.extra["classes"]


def test_scbench_sessions_have_a_metric_per_turn() -> None:
    [mixed] = load("scbench/repoqa_and_kv")
    assert [(turn.metric, turn.limit) for turn in mixed.turns] == [
        ("function_found", 1024),
        ("within", 80),
        ("function_found", 1024),
    ]
    assert mixed.turns[0].extra["functions"] == mixed.turns[2].extra["functions"]
    assert [name for name, _ in mixed.turns[0].extra["functions"]] == ["mean", "spread"]
    [needles] = load("scbench/summary_with_needles")
    assert [turn.metric for turn in needles.turns] == ["rouge_lsum", "first_integer", "rouge_lsum"]
    [choice] = load("scbench/choice_eng")
    assert [turn.extra["letter"] for turn in choice.turns] == ["B", "D"]
    assert choice.turns[0].question.endswith("\nB. the tower bell\nC. a drum\nD. nothing\n\nThe the correct answer is")
    assert score("B", choice.turns[0]) == 1


def test_scbench_asks_for_each_turns_own_statistic(kit: Kit) -> None:
    [example] = load("scbench/mf-published")
    assert example.context == "[17, 903, 4, 558, 21]"
    assert example.frame.startswith("What is the largest number of the list?\n\n{context}")
    assert example.turns[1].question.startswith("What is the second smallest number of the list?\n\nYou should")


def test_a_dialogue_fits_as_a_whole_and_separate_questions_one_by_one(kit: Kit) -> None:
    turns = tuple(Turn(f"What is the number for item {i}?", ("1",), 10) for i in range(5))
    whole, alone = Example("x", "some text " * 30, turns), Example("x", "some text " * 30, turns, separate=True)
    head = kit.count(whole.parts(kit.tokenizer)[0])
    tails = [kit.count(whole.parts(kit.tokenizer, i)[1]) + 10 for i in range(5)]
    assert kit.size(whole) == head + sum(tails)
    assert kit.size(alone) == head + max(tails)


def test_separate_questions_never_see_one_another() -> None:
    """In both modes each is asked of the context alone, so the order of the questions changes nothing."""
    model, tokenizer = load_model("nano")
    turns = tuple(Turn(f"What is the magic number for {key}?", ("1",), 6) for key in ("cedar", "harbor"))
    for mode in session.MODES:
        replies = []
        for asked in (turns, turns[::-1]):
            example = Example("x", "The magic number for cedar is 48213. " * 6, asked, separate=True)
            out, _ = session.run(model, tokenizer, session.KVCache(model).recipe, example, mode)
            replies.append([reply.prediction for reply in out.replies])
        assert replies[0] == replies[1][::-1]


@pytest.mark.parametrize("name", QA)
@pytest.mark.parametrize("length", [400, 512, 1024])
def test_ruler_questions_stand_among_other_documents(name: str, length: int, kit: Kit) -> None:
    """Gold paragraphs always, as many others as there is room for, in an order drawn from the seed."""
    reader: Callable[[Path], Any] = squad if name == "ruler/qa_1" else hotpot
    questions, texts = reader(HERE / TASKS[name].path)
    examples = list(find(name).examples(kit, length, 6))
    for example in examples:
        assert kit.size(example) <= length
        [turn] = example.turns
        question = next(q for q in questions if q.text == turn.question)
        assert all(texts[i] in example.context for i in question.gold)
        documents = example.context.split("Document ")[1:]
        assert len(documents) == example.about["documents"]
        assert [document.partition(":")[0] for document in documents] == [str(i + 1) for i in range(len(documents))]
        if len(documents) >= len(question.gold) + len(question.near):
            assert all(texts[i] in example.context for i in question.near)  # of the same article: taken first
        assert score(turn.answers[-1].upper(), turn) == 1
    assert [e.context for e in examples] == [e.context for e in find(name).examples(kit, length, 6)]
    assert len({e.context for e in examples}) > 1


def test_questions_that_cannot_be_answered_are_left_out() -> None:
    questions, _ = squad(HERE / TASKS["ruler/qa_1"].path)
    assert "Who drained the lake?" not in {question.text for question in questions}
    assert len(questions) == 10


def test_leval_leaves_out_what_only_a_judge_can_score() -> None:
    [example] = load("leval/financial_qa")
    assert example.frame.endswith("\nAnswer this question with 7 words.")
    [first, second] = load("leval/coursera")
    assert first.turns[0].prefix == "\nAnswer:"
    assert score("A and B", second.turns[0]) == 0
    assert score("AB", first.turns[0]) == 0.25


def test_locomo_tells_dates_and_pictures_in_order() -> None:
    [example] = load("locomo/temporal")
    assert example.separate
    assert [turn.answers for turn in example.turns] == [("3 March 2022",), ("2022",)]
    assert all("Use DATE of CONVERSATION" in turn.question for turn in example.turns)
    order = [
        "between two people: Ines and Rolf",
        "DATE: 2:10 pm on 4 March, 2022\nCONVERSATION:\nIves"[:-4],
        'Rolf said, "Lovely.',
    ]
    order += [" and shared a photo of a brown dog on a rug.", "DATE: 9:00 am", "DATE: 8:00 pm on 1 June"]
    places = [example.context.find(part) for part in order]
    assert places == sorted(places)
    assert places[0] >= 0
    assert "3 May" not in example.context  # a date without a session
    [tricky] = load("locomo/adversarial")
    assert set(tricky.turns[0].extra["options"]) == {"Hollin", "Not mentioned in the conversation"}
    [reasoned] = load("locomo/open_domain")
    assert reasoned.turns[0].answers == ("Yes",)


def test_a_data_set_that_is_not_there_tells_where_to_get_it(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVLOOM_DATA", str(tmp_path))
    for name in ("longbench/qasper", "ruler/qa_1"):
        with pytest.raises(LabError, match=r"does not exist\. Get it from"):
            list(find(name).examples(kit, 512, 1))
    monkeypatch.delenv("KVLOOM_DATA")
    with pytest.raises(LabError, match="KVLOOM_DATA is not set"):
        list(find("qmsum").examples(kit, 512, 1))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"input": ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"input": 1}', "field 'input' must be text, but holds 1"),
        (b'{"input": "", "answers": [null]}', "field 'answers' must be text"),
        (b'{"input": "\\ud800"}', "valid Unicode"),
        (b'{"input": "", "answers": ["x"], "length": "long", "context": ""}', "field 'length' must be a number"),
        (b'{"input": "", "answers": ["x"], "length": true, "context": ""}', "field 'length' must be a number"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(line: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "qasper.jsonl"
    good = (HERE / "data" / "longbench" / "qasper.jsonl").read_bytes()
    path.write_bytes(good + b"\n" + line + b"\n")
    load = find("longbench/qasper").load
    assert load is not None
    with pytest.raises(LabError, match=r"qasper\.jsonl, line 4: ") as caught:
        list(load(path))
    assert why in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_empty_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for path, why in ((tmp_path / "empty.jsonl", "is empty"), (tmp_path, "cannot be read")):
        with pytest.raises(LabError, match=why):
            list(lines(path))
    with pytest.raises(LabError, match="cannot be read"):
        document(tmp_path)


def test_fields_inside_are_named_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "locomo10.json"
    data = json.loads((HERE / "data" / "locomo" / "locomo10.json").read_text())
    data[0]["qa"][4]["answer"] = None
    path.write_text(json.dumps(data))
    load = find("locomo/single_hop").load
    assert load is not None
    with pytest.raises(LabError, match=r"locomo10\.json, data\[0\], qa\[4\]: field 'answer'"):
        list(load(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    found = [at]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        found += places(part, (*at, key))
    return found


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from([*LOADED, *QA]), seed=st.integers(0, 2**32), value=JSON, drop=st.booleans())
def test_no_content_breaks_a_loader(name: str, seed: int, value: Any, drop: bool, tmp_path_factory: Any) -> None:
    """A sample with one value replaced or removed at random is read, or refused with LabError: nothing else."""
    path = HERE / TASKS[name].path
    by_line = path.suffix == ".jsonl"
    data = [json.loads(line) for line in path.read_text().splitlines()] if by_line else json.loads(path.read_text())
    rng = random.Random(seed)
    *parents, last = rng.choice(places(data)[1:])
    inner = data
    for key in parents:
        inner = inner[key]
    if drop:
        del inner[last]
    else:
        inner[last] = value
    folder = tmp_path_factory.mktemp("broken")
    broken = folder / path.name
    text = "\n".join(json.dumps(row) for row in data) if by_line else json.dumps(data)
    broken.write_text(text)
    try:
        if name in QA:
            reader: Callable[[Path], Any] = squad if name == "ruler/qa_1" else hotpot
            reader(broken)
            return
        load = TASKS[name].load
        assert load is not None
        for example in load(broken):
            for i, turn in enumerate(example.turns):
                assert isinstance(turn, Turn)
                example.parts(PLAIN, i)
                assert 0 <= score("A text of 12 words.", turn) <= 1
    except LabError as error:
        assert str(broken) in str(error) or "frame=" in str(error)
    finally:
        shutil.rmtree(folder)


PLAIN = type("Plain", (), {"chat_template": None, "bos_token": None})()


@given(st.binary(max_size=60))
def test_no_bytes_break_the_reader(tmp_path_factory: Any, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    path = folder / "x.jsonl"
    path.write_bytes(raw)
    for read in (lambda: list(lines(path)), lambda: document(path)):
        try:
            found = read()
            assert isinstance(found, (list, Record))
        except LabError as error:
            assert str(path) in str(error)
    shutil.rmtree(folder)

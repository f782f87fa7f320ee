"""What RULER, the needle heat map and SCBench promise of their examples."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core.registry import parse
from kvloom.lab import session
from kvloom.lab.tasks import Kit, ruler
from kvloom.lab.tasks.haystack import NOISE, Prose, adjective_noun, placed, scattered
from kvloom.lab.tasks.needle import DEPTHS, depths
from kvloom.lab.tasks.ruler import NIAH
from kvloom.lab.tasks.scbench import EDGE, STATISTICS, TURNS
from kvloom.lab.tasks.shots import SHIFTS, dates, shuffled_objects
from tests.examples import make, nano_kit, prompt

DATA = Path(os.environ.get("KVLOOM_DATA", "/nonexistent"))
pytestmark = pytest.mark.usefixtures("no_data")


# RULER


def test_ruler_asks_for_one_needle_in_the_published_words(kit: Kit) -> None:
    example = make("ruler/niah_single_1", kit, 1024)
    turn = example.turns[0]
    found = re.findall(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", example.context)
    assert len(found) == 1 and turn.answers == (found[0][1],) and turn.limit == 128
    key = found[0][0]
    assert prompt(kit, example) == (
        "<|begin|><|user|>A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the number afterwards.\n{example.context}\nWhat is the special magic number for {key} mentioned in the "
        f"provided text?<|end|><|assistant|> The special magic number for {key} mentioned in the provided text is"
    )
    rest = [line for line in example.context.split("\n") if line != NOISE]
    assert rest == [f"One of the special magic numbers for {key} is: {found[0][1]}."]


def test_ruler_asks_for_several_needles_in_the_published_words(kit: Kit) -> None:
    example = make("ruler/niah_multiquery", kit, 1024)
    turn = example.turns[0]
    values = dict(re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", example.context))
    names = {value: key for key, value in values.items()}
    a, b, c, d = (names[answer] for answer in turn.answers)
    assert len(values) == 4 and turn.question == (
        f"What are all the special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text?"
    )
    assert turn.prefix == f" The special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text are"
    assert example.frame.startswith("Some special magic numbers are hidden within the following text.")


@pytest.mark.parametrize("name", NIAH)
def test_ruler_hides_what_its_table_says(name: str, kit: Kit) -> None:
    spec, example = NIAH[name], make(f"ruler/{name}", kit, 2048, seed=1)
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    kinds = {"words": r"[a-z]+-[a-z]+", "numbers": r"\d{7}", "uuids": uuid}
    shape = rf"One of the special magic {spec.value} for ({kinds[spec.key]}) is: ({kinds[spec.value]})\."
    found = re.findall(shape, example.context)
    asked = [pair for pair in found if pair[1] in example.turns[0].answers]
    assert len({value for _, value in found}) == len(found)
    if spec.haystack == "needle":
        lines = example.context.split("\n")
        assert len(found) == len(lines) > 10 and len({key for key, _ in found}) == len(lines)
        assert len(asked) == 1 and 0 <= int(example.about["depth"]) <= 100
    else:
        assert len(found) == spec.keys * spec.values and len({key for key, _ in found}) == spec.keys
        assert len(asked) == spec.asked * spec.values == len(example.turns[0].answers)
    if spec.haystack == "essay":
        assert example.about["haystack"] == "text"
        before = re.split(r"One of the special magic", example.context)[:-1]
        assert all(re.search(r"(^|[.!?][\"'”’)\]]*) $", text) or not text for text in before)


def test_rulers_needles_come_in_an_order_of_their_own(kit: Kit) -> None:
    orders = set()
    for seed in range(8):
        example = make("ruler/niah_multiquery", kit, 1024, seed=seed)
        places = [example.context.index(answer) for answer in example.turns[0].answers]
        orders.add(tuple(sorted(range(4), key=lambda i: places[i])))
    assert len(orders) > 4


@pytest.mark.skipif(not (DATA / "data").is_dir(), reason="needs RULER's examples in KVLOOM_DATA")
def test_rulers_published_examples_have_the_same_form(kit: Kit) -> None:
    lines = (DATA / "data/ruler_4096_niah_multikey_3/niah_multikey_3.jsonl").read_text().splitlines()
    made = make("ruler/niah_multikey_3", kit, 4096)
    turn = made.turns[0]
    ours = made.frame.replace("{question}", turn.question) + turn.prefix
    key = re.search(r"for (\S+) mentioned", turn.question)[1]  # type: ignore[index]
    for line in lines:
        published = json.loads(line)
        asked = re.search(r"for (\S+) mentioned", published["input"].splitlines()[-1])[1]  # type: ignore[index]
        context = "\n".join(published["input"].splitlines()[1:-1])
        assert ours.replace(key, asked).replace("{context}", context) == published["input"]
        assert f"for {asked} is: {published['outputs'][0]}." in context


def test_ruler_takes_essays_from_the_data_folder(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "paul_graham_essays"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("Lisp is fine. " * 9)
    (folder / "a.txt").write_text("Startups grow. " * 9)
    monkeypatch.setenv("KVLOOM_DATA", str(tmp_path))
    example = make("ruler/niah_single_2", kit, 1024)
    assert example.about["haystack"] == "essays"
    text = re.sub(r"One of the special magic.*?\. ", "", example.context)
    assert text.startswith("Startups grow. " * 9 + "Lisp is fine. ") and text.count("Startups grow.") > 18  # repeated


def test_ruler_chains_variables(kit: Kit) -> None:
    example = make("ruler/vt", kit, 2048)
    turn = example.turns[0]
    lines = [line for line in example.context.split("\n") if line != NOISE]
    a, b, c, d, e = turn.answers
    number = re.findall(r"\d{5}", turn.question)[0]
    assert lines == [f"VAR {a} = {number}", *(f"VAR {y} = VAR {x} " for x, y in ((a, b), (b, c), (c, d), (d, e)))]
    assert turn.question == f"Question: Find all variables that are assigned the value {number} in the text above."
    assert turn.prefix.endswith(f"in the text above, 5 variables are assigned the value {number}, they are: ")
    assert turn.limit == 30 and all(len(name) == 5 for name in turn.answers)
    shot, empty = example.frame.split("Memorize and track the chain(s)")[1:]
    assert 400 < kit.count(shot) < 510 and "VAR" not in empty
    first = re.findall(r"VAR ([A-Z]{3}) ", shot)
    assert shot.endswith(f"they are:  {' '.join(dict.fromkeys(first))}\n\n")


@pytest.mark.parametrize(("length", "often", "seldom"), [(4096, 30, 3), (4095, 6, 1)])
def test_ruler_repeats_common_words(kit: Kit, length: int, often: int, seldom: int) -> None:
    example = make("ruler/cwe", kit, length)
    entries = re.findall(r"(\d+)\. (\S+)", example.context)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    answers = example.turns[0].answers
    assert len(set(answers)) == 10 and all(counts[word] == often for word in answers)
    assert {count for word, count in counts.items() if word not in answers} == {seldom}
    shot = Counter(re.findall(r"\d+\. (\S+)", example.frame.split("{context}")[0]))
    assert sum(shot.values()) == {30: 100 + 90, 6: 30 + 10}[often] + 10 and len(shot) == {30: 40, 6: 20}[often]


def test_ruler_common_words_outlast_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ruler, "vocabulary", lambda text: [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)]
    )
    example = make("ruler/cwe", nano_kit(), 6000)
    counts = Counter(re.findall(r"\d+\. (\S+)", example.context))
    assert len(counts) > 90 and set(counts.values()) == {3, 30}


@pytest.mark.parametrize("length", [400, 1024, 8192])
def test_ruler_draws_coded_words_by_rank(kit: Kit, length: int) -> None:
    example = make("ruler/fwe", kit, length)
    counts = Counter(example.context.split())
    (dots, most), *ranked = counts.most_common(5)
    assert dots == "..." and [word for word, _ in ranked[:3]] == list(example.turns[0].answers)
    numbers = [most, *(count for _, count in ranked)]
    assert numbers == sorted(set(numbers), reverse=True)  # strictly the largest
    for rank, count in enumerate(numbers, 1):
        assert abs(count - most / rank**2) <= 1
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


# Needles


def test_depths() -> None:
    assert DEPTHS == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100] and depths(35)[-1] == 100
    dense = depths(35, "sigmoid")
    assert dense == sorted(dense) and dense[0] == 0 and dense[-1] == 100
    assert dense[2] - dense[1] < dense[18] - dense[17] > dense[-2] - dense[-3]


def test_needles_stand_once_at_rising_depths_within_a_sentence(kit: Kit) -> None:
    measured = []
    for index in range(len(DEPTHS)):
        example = make("needle", kit, 1024, index)
        value = example.turns[0].answers[0]
        at = example.context.index("The secret number for")
        assert example.context.count(value) == example.context.count("The secret number for") == 1
        before, after = example.context[:at], example.context[at:].split(f"{value}.", 1)[1]
        share = kit.count(before) / (kit.count(before) + kit.count(after))
        sentences = re.split(r"(?<=[.!?])[\"'”’)\]]*\s", before + after.lstrip())
        longest = max(kit.count(f" {sentence}") for sentence in sentences) / kit.count(before + after)
        assert -0.02 < DEPTHS[index] / 100 - share <= longest + 0.02
        assert example.about["depth"] == DEPTHS[index]
        measured.append(share)
    assert measured == sorted(measured) and measured[0] == 0 and measured[-1] == 1


@pytest.mark.parametrize(("index", "survives"), [(0, True), (3, False), (7, False), (10, True)])
def test_a_cache_that_drops_the_middle_loses_the_needles_there(index: int, survives: bool, kit: Kit, nano: Any) -> None:
    example = make("needle", kit, 900, index)
    for recipe, expected in (("full", 1), ("streamingllm(sinks=64, window=192)", survives)):
        out, _ = session.run(*nano, parse(recipe), example, "multi-request")
        assert out.replies[0].score == expected


@pytest.mark.parametrize("index", range(len(DEPTHS)))
def test_several_needles_stand_in_order(kit: Kit, index: int) -> None:
    example = make("needle/multi", kit, 1024, index)
    places = [example.context.index(f"is {value}.") for value in example.turns[0].answers]
    assert places == sorted(places) and len(set(places)) == 3
    if index == 0:
        share = [place / len(example.context) for place in places]
        assert all(abs(x - y) < 0.15 for x, y in zip(share, (0, 1 / 3, 2 / 3)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["one", "two.", "Three!", "(four.)", "five"]), min_size=1, max_size=60),
    st.integers(0, 99),
    st.integers(1, 200),
)
def test_a_text_is_cut_and_parted_at_its_sentences(words: list[str], start: int, count: int) -> None:
    ends = [i for i, word in enumerate(words, 1) if re.search(r"[.!?]\)?$", word)]
    start %= len(words)
    taken, stops = Prose("x", words, ends).cut(count, start)
    assert taken == [words[(start + i) % len(words)] for i in range(count)]
    assert stops == [i for i, word in enumerate(taken, 1) if re.search(r"[.!?]\)?$", word)]
    spots = placed(nano_kit().tokenizer, taken, stops, [0, 20, 50, 50, 90, 100])
    assert spots == sorted(spots) and spots[0] == 0 and spots[-1] == count
    assert all(spot in (0, count, *stops) for spot in spots)
    assert [x for x in scattered(taken, spots, list("ABCDEF")) if x not in "ABCDEF"] == taken


def test_keys_are_many() -> None:
    rng = random.Random(0)
    assert len({adjective_noun(rng) for _ in range(3000)}) > 2950


# SCBench


def test_key_value_pairs(kit: Kit) -> None:
    example = make("scbench/kv", kit, 4096)
    pairs = json.loads(example.context.removeprefix("JSON data:\n"))
    assert len(example.turns) == TURNS and len(pairs) > 10
    for turn in example.turns:
        assert pairs[turn.question.split('"')[1]] == turn.answers[0] and turn.limit == 150
    places = [list(pairs.values()).index(turn.answers[0]) for turn in example.turns]
    assert places != sorted(places) or max(places) > TURNS


def test_one_string_has_prefix_and_suffix(kit: Kit) -> None:
    for length in (1700, 4096):
        example = make("scbench/prefix_suffix", kit, length)
        strings = example.context.split("\n")[1:]
        assert all(65 <= len(x) <= 122 for x in strings)
        for turn in example.turns:
            start, end = turn.question.split('"')[1::2]
            assert len(start) == len(end) == EDGE
            assert [x for x in strings if x.startswith(start) and x.endswith(end)] == list(turn.answers)
            if length > 4000:
                assert sum(x.startswith(start) for x in strings) == sum(x.endswith(end) for x in strings) == 2


def test_each_turn_asks_for_another_chain(kit: Kit) -> None:
    example = make("scbench/vt", kit, 2048)
    for turn in example.turns:
        number = re.findall(r"\d{5}", turn.question)[0]
        a, b, c = turn.answers
        lines = [line.rstrip() for line in example.context.split("\n")]
        places = [lines.index(x) for x in (f"VAR {a} = {number}", f"VAR {b} = VAR {a}", f"VAR {c} = VAR {b}")]
        assert places == sorted(places)
    assert len({turn.question for turn in example.turns}) == TURNS


@pytest.mark.parametrize("index", range(4))
def test_statistics_of_numbers(kit: Kit, index: int) -> None:
    example = make("scbench/mf", kit, 1024, index)
    numbers = json.loads(example.context)
    each = sorted(set(numbers))
    gold = {
        "largest": max(numbers), "second largest": each[-2], "third largest": each[-3], "smallest": min(numbers),
        "second smallest": each[1], "third smallest": each[2], "median": sorted(numbers)[len(numbers) // 2],
    }  # fmt: skip
    assert set(gold) == set(STATISTICS) and len(numbers) % 2 == 1 and max(numbers) <= 999
    for turn in example.turns:
        name = re.search(r"What is the (.+?) number of the list", turn.question)[1]  # type: ignore[index]
        assert turn.answers == (str(gold[name]),) and turn.limit == 5


def test_shuffled_objects_end_where_the_swaps_say() -> None:
    for seed in range(50):
        text, letter = shuffled_objects(random.Random(seed))
        start, rest = text.split(": ", 2)[2].split(". ", 1)
        held = dict(part.split(" has ", 1) for part in start.split(", "))
        for one, other in re.findall(r"(\w+) and (\w+) trade", rest):
            held[one], held[other] = held[other], held[one]
        name = re.search(r"At the end, (\w+) has", rest)[1]  # type: ignore[index]
        options = dict(re.findall(r"(\([A-G]\)) (.+)", text))
        assert len(held) == len(set(options.values())) == 7 and options[letter] == held[name]


def test_dates_are_right() -> None:
    for seed in range(50):
        text, letter = dates(random.Random(seed))
        spelled = re.search(r"Today is (.+?\d{4})\.", text)
        if spelled:
            today = datetime.datetime.strptime(spelled[1], "%B %d, %Y").date()
        else:
            told = datetime.datetime.strptime(re.findall(r"\d\d/\d\d/\d{4}", text)[0], "%m/%d/%Y").date()
            shift = next(
                days for word, days in (("Yesterday", 1), ("Tomorrow", -1), ("In three days", -3)) if word in text
            )
            today = told + datetime.timedelta(days=shift)
        when = re.search(r"What is the date (.+) in MM", text)[1]  # type: ignore[index]
        right = today + datetime.timedelta(days=SHIFTS[when])
        options = dict(re.findall(r"(\([A-F]\)) (.+)", text))
        assert len(set(options.values())) == 6 and options[letter] == f"{right:%m/%d/%Y}"


def test_many_shot_shows_solved_exercises(kit: Kit) -> None:
    first, second = (make("scbench/many_shot", kit, 4096, index) for index in (0, 1))
    assert [first.about["kind"], second.about["kind"]] == ["shuffled_objects", "dates"]
    for example in (first, second):
        assert len(re.findall(r"^A: \([A-G]\)$", example.context, re.MULTILINE)) > 5
        assert len({turn.question for turn in example.turns}) == TURNS

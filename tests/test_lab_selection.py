"""The table of recipes that choose or merge tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvloom.errors import KvloomError
from kvloom.lab import selection
from kvloom.lab.measure import load_model
from kvloom.lab.records import Results, load
from kvloom.lab.tasks import Kit, find

RECIPES = ["snapkv(window=16, budget=0.5)", "streamingllm(budget=0.5)"]


def test_one_prompt_holds_three_kinds() -> None:
    examples = list(find("selection").examples(Kit(load_model("nano")[1]), 1024, 3))
    assert [x.about["first"] for x in examples] == [0, 1, 2]
    for x in examples:
        for at, turn in enumerate(x.turns):
            kind = (int(x.about["first"]) + at) % 3
            values = turn.extra["values"]
            (key,) = turn.extra["keys"]
            assert len(values) == 10 and len(values[key]) == (3 if kind == 2 else 1)
            assert all(value in x.context for value in values[key]) and key in turn.question
            assert (next(iter(values)) == key) == (kind == 0)  # the one that stands alone


def test_recipes_at_a_budget() -> None:
    found, refused = selection.recipes_at("nano", (0.2, 0.05))
    names = {recipe.partition("(")[0] for recipe in found}
    assert {"h2o", "snapkv", "streamingllm", "tova", "adakv", "kvmerger", "chelsea", "ems"} <= names
    assert not {"kivi", "full", "mikv"} & names and len(found) == len(set(found))
    every = "gui-kv epicache kvzip mpcache d2o cake compresskv uncomp prefixkv razorattention task-kv windowkv kvcrush keyformer scissorhands"
    assert set(every.split()) <= names and "look-m(text_first=False, budget=0.05)" in found
    free = {"duoattention", "attention-gate", "zipvl(bits=None, low_bits=None)"}
    assert free == {recipe for recipe in found if "budget" not in recipe} and set(found[-3:]) == free and not refused
    found, refused = selection.recipes_at("nano", (0.2,), ["snapkv(window=16)"])
    assert found == ["snapkv(window=16, budget=0.2)"] and not refused


def test_the_table_goes_on_where_it_was(tmp_path: Path) -> None:
    told: list[str] = []
    for count in (1, 1):
        with Results(tmp_path) as results:
            selection.go("nano", RECIPES, count, 512, 1, results, told.append)
    assert len(told) == 9  # three recipes, three runs each, once
    more = [*RECIPES, "zipvl(bits=None, low_bits=None, mass=0.8)"]
    with Results(tmp_path) as results:
        selection.go("nano", more, 1, 512, 1, results, told.append)
    assert len(told) == 12 and all("zipvl" in each for each in told[9:])  # only what is new
    records = load([tmp_path])
    full, snap, streaming, _ = selection.lines(records)
    assert full.recipe == "full" and full.kl == 0.0 and snap.kl is not None and snap.kl > 0
    assert full.mib is not None and streaming.mib is not None and 1.8 < full.mib / streaming.mib < 2.2
    assert all(
        x is not None for line in (full, snap, streaming) for x in (line.early, *line.late, line.second, line.kl)
    )
    page = selection.markdown(records, (0.5,), "a command", {"other(budget=0.5)": "for a reason"})
    assert "## 50 % of the tokens" in page and "`snapkv(window=16)`" in page and "## As many as they like" in page
    assert page.count("| `zipvl(bits=None, low_bits=None, mass=0.8)` |") == 1 and page.count("| `full` |") == 2
    assert "`streamingllm`" in page and "for a reason" in page and "a command" in page


def test_a_wrong_recipe_is_named() -> None:
    found, refused = selection.recipes_at("nano", (0.2,), ["nothing"])
    assert not found and "nothing" in refused["nothing(budget=0.2)"]
    with pytest.raises(KvloomError):
        selection.recipes_at("no-such-model", (0.2,))

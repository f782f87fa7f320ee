"""The tree of systems: every recipe has its place, every sub-class its part of kvloom, and the page is current."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from kvloom.core import registry
from kvloom.lab.records import Results
from scripts import lab_results, taxonomy
from tests.test_lab_records import record


def test_every_recipe_stands_in_the_tree_exactly_once() -> None:
    places = Counter(s.recipe for row in taxonomy.tree() for s in row.systems if s.recipe)
    missing = set(registry.recipes()) - set(places)
    assert not missing, f"give {sorted(missing)} a place in scripts/taxonomy.toml"
    assert set(places.values()) == {1} and set(places) == set(registry.recipes())


def test_every_row_maps_to_a_part_or_is_out_of_scope() -> None:
    for row in taxonomy.tree():
        assert row.level in taxonomy.LEVELS and row.systems, row
        assert row.contracts == (taxonomy.OUT,) or (row.contracts and set(row.contracts) <= set(taxonomy.CONTRACTS)), (
            row
        )
        assert (row.contracts == (taxonomy.OUT,)) == (row.level == "model"), row


def test_a_row_with_recipes_maps_to_parts_that_exist() -> None:
    for row in taxonomy.tree():
        if any(s.recipe for s in row.systems):
            assert row.contracts != (taxonomy.OUT,), f"{row.name} is out of scope, but has recipes"
            there = [name for name in row.contracts if (taxonomy.ROOT / taxonomy.CONTRACTS[name][1]).exists()]
            assert there, f"{row.name}: it has recipes, but none of {row.contracts} exists"


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ('contracts = ["magic"]\nsurvey = ["X"]', "contract 'magic'"),
        ('contracts = ["codec"]\nsurvey = ["X", "H2O"]', "'H2O' is placed twice"),
        ('contracts = ["codec"]\nsurvey = ["X"]\nalso = ["Nowhere"]', "Nowhere stand under `also`"),
        ('contracts = ["out of scope", "codec"]\nsurvey = ["X"]', "contract 'out of scope'"),
    ],
)
def test_mistakes_in_the_data_are_refused(
    extra: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "taxonomy.toml"
    row = f'\n[[subclass]]\nlevel = "token"\nclass = "c"\nname = "n"\n{extra}\n'
    data.write_text(taxonomy.DATA.read_text(encoding="utf-8") + row, encoding="utf-8")
    monkeypatch.setattr(taxonomy, "DATA", data)
    with pytest.raises(ValueError, match=reason):
        taxonomy.tree()


def test_results_of_a_run_are_shown_with_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From records on disk, through the script that writes the tables, to the page."""
    values = {
        "full": {"score": 1.0, "used": 800},
        "h2o(budget=64)": {"score": 0.5, "used": 200},
        "snapkv | kivi": {"score": 0.9, "used": 100},
    }
    with Results(tmp_path) as results:
        for recipe, more in values.items():
            for index in range(6):
                results.add(record(model="nano", recipe=recipe, index=index, **more))
    lab_results.write(tmp_path, "kvloom lab run small", tmp_path)
    found = json.loads((tmp_path / "lab.json").read_text())
    assert set(found) == {"full", "h2o"} and found["h2o"][0]["smaller"] == 4 and found["h2o"][0]["kl"] is None
    text = (tmp_path / "lab-results.md").read_text()
    assert "kvloom lab run small" in text and "\n## nano\n" in text and "h2o(budget=64)" in text
    monkeypatch.setattr(taxonomy, "LAB", tmp_path / "lab.json")
    shown = "[`h2o`](methods.md#h2o): [`h2o(budget=64)`](lab-results.md#nano) quality 50%, 4.0x smaller"
    assert shown in taxonomy.page()


def test_the_page_is_current_and_its_links_lead_to_cards() -> None:
    text = taxonomy.PAGE.read_text(encoding="utf-8")
    assert text == taxonomy.page(), "docs/taxonomy.md is not current: run python -m scripts.taxonomy"
    cards = (taxonomy.ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in registry.recipes():
        assert f"(methods.md#{name})" in text and f"\n## {name}\n" in cards

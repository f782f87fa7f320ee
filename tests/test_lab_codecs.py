"""The table of codecs: which recipes it runs, what it measures, that it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom import parse
from kvloom.core.registry import recipes
from kvloom.lab import codecs
from kvloom.lab.codecs import Line


def test_every_recipe_that_encodes_is_in_it_at_its_points() -> None:
    found = codecs.codecs()
    assert {"kivi(bits=2)", "kivi(bits=4)", "gear(bits=2)", "mikv(budget=0.2)"} <= set(found)
    assert not {text.partition("(")[0] for text in found} & {"full", "snapkv", "h2o", "streamingllm"}


@pytest.mark.parametrize("name", recipes())
def test_points_of_cards_can_be_read(name: str) -> None:
    for text in recipes()[name].recipes:
        parse(text)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "SETTINGS", {"length": 256, "texts": 1, "facts": 1})
    codecs._loaded.cache_clear()
    yield
    codecs._loaded.cache_clear()


def test_measures_and_goes_on_where_it_was(short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    wanted, path = ["kivi(bits=2, residual=32)", "kivi(bits=2, group=24, residual=48)"], tmp_path / "lines.jsonl"
    lines = codecs.go(["nano"], wanted, path, 1, told.append)
    full, kivi, wrong = lines
    assert told == ["nano: full", f"nano: {wanted[0]}", f"nano: {wanted[1]}"]
    assert (full.kl, full.top1, full.perplexity, full.bits, full.cache_bits) == (0, 1, 1, 0, 32)
    assert 0.001 < kivi.kl < 2 and 0.3 < kivi.top1 <= 1 and kivi.asked == 3 and kivi.ms > 0
    assert kivi.bits == 2 + 32 / 32  # scale and minimum, 16 bits each, for 32 numbers
    assert kivi.bits < kivi.cache_bits < 32
    assert "24" in wrong.error
    with path.open("a") as file:
        file.write('{"model": "na')  # killed while writing
    monkeypatch.setattr(
        codecs._Loaded, "measure", lambda self, recipe: Line(self.name, full.fingerprint, recipe, error="again")
    )
    again = codecs.go(["nano"], wanted, path, 1, told.append)
    assert again[:2] == [full, kivi] and again[2].error == "again"  # what failed is tried again
    assert codecs.Lines(path).found.keys() == {(x.fingerprint, x.recipe) for x in (full, kivi)}


def test_the_page() -> None:
    lines = [
        Line("nano", "a", "full", cache_bits=32, top1=1, right=3, asked=3, ms=2),
        Line("nano", "a", "x | y", 2.5, 3.0, 0.1, 0.9, 1.05, 2, 3, 2.5),
        Line("nano+outliers", "b", "full", cache_bits=32, top1=1, right=3, asked=3, ms=2),
        Line("nano+outliers", "b", "x | y", error="no"),
    ]
    page = codecs.markdown(lines, "kvloom lab codecs")
    assert "| `x \\| y` | 2.50 | 3.00 | 0.100 | 90 % | +5.0 % | 2/3 |  |  |  |  | 2.5 |" in page
    assert "- `x | y` on `nano+outliers`: no" in page and "kvloom lab codecs" in page
    assert all(len(row) == 12 for row in codecs.table(lines))


def test_a_missing_profile_is_made(short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted model has none; it is made where it will be looked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = codecs._loaded("nano+outliers")
    loaded.kit.text = loaded.kit.text[:4000]
    loaded.profile("kvquant(bits=2)", lambda text: None)
    assert len(list(tmp_path.rglob("kvquant.profile.safetensors"))) == 1
    assert not json.loads(json.dumps(loaded.measure("kvquant(bits=2)").error))

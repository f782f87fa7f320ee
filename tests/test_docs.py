"""The code in the documentation runs, and the generated page is current."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from kvloom.cli import main
from kvloom.core import registry
from scripts import methods_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
STORE = ROOT / "docs" / "store.md"
GUIDE = ROOT / "docs" / "write-a-recipe.md"


def run_blocks(page: Path) -> dict[str, Any]:
    """Runs the Python blocks of a page one after another, as one program; errors show its line numbers."""
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks, f"{page.name} has no Python in it"
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks:
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(page), "exec"), names)
    return names


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that a test registers are gone after it."""
    monkeypatch.setattr(registry.RECIPES, "factories", dict(registry.RECIPES.factories))


@pytest.mark.usefixtures("own_registry")
def test_the_guide_to_recipes_runs() -> None:
    names = run_blocks(GUIDE)
    assert "keynorm" in registry.recipes()
    heads = [group for layer in names["small"].managed() for row in layer.rows for group in row.layer.groups]
    assert heads and all(128 <= group.n < 128 + 64 for group in heads)
    coded = names["both"].report().by("plane", "field")
    assert coded["key", "codes"] and coded["value", "codes"]


@pytest.mark.usefixtures("own_registry")
def test_the_command_of_the_guide_measures_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    (command,) = re.findall(r"^```bash\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("my_method.py").write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    program, *arguments = shlex.split(command)
    assert program == "kvloom"
    main([*arguments, "--examples", "1", "--json"])
    (model,) = json.loads(capsys.readouterr().out)["models"]
    rows = {row["recipe"]: row for row in model["recipes"]}
    assert set(rows) == {"full", "my_method.py:keynorm(budget=256)"} and rows[arguments[-1]]["smaller"] > 2
    assert Path("lab/smoke/report.html").exists()


def test_the_recipe_of_the_guide_is_as_short_as_promised() -> None:
    block = GUIDE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 30


def test_the_quick_start_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = run_blocks(README)
    assert names["cache"].nbytes > 0


def test_the_page_of_the_store_runs() -> None:
    assert run_blocks(STORE)["reply"].report.tokens


def test_the_readme_names_every_recipe() -> None:
    text = README.read_text(encoding="utf-8")
    for name, card in registry.recipes().items():
        assert f"docs/methods.md#{name})" in text, f"README.md does not link {name}"
        assert f"arxiv.org/abs/{card.arxiv})" in text, f"README.md does not link the paper of {name}"


def test_the_page_of_methods_is_current() -> None:
    assert methods_table.PAGE.read_text(encoding="utf-8") == methods_table.page(), (
        "docs/methods.md is not what the cards say: run python -m scripts.methods_table"
    )
    assert README.read_text(encoding="utf-8") == methods_table.readme(), "run python -m scripts.methods_table"


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"

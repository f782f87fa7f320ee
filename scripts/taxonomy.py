"""Writes docs/taxonomy.md from scripts/taxonomy.toml and the recipes: `python -m scripts.taxonomy`. `--check` compares."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvloom  # noqa: F401  (registers the recipes)
from kvloom.core.registry import recipes
from scripts.made import write_or_check

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).with_suffix(".toml")
PAGE = ROOT / "docs" / "taxonomy.md"
LAB = ROOT / "docs" / "lab.json"
OUT = "out of scope"
Lab = dict[str, list[dict[str, Any]]]  # recipe -> what `scripts.lab_results` wrote of it

# contract -> what it does, and the file or folder that holds it once it exists
CONTRACTS: dict[str, tuple[str, str]] = {
    "scorer": ("ranks what is cached, from attention that it declares", "kvloom/policies/scorers.py"),
    "budget": ("how many tokens each layer and head may keep", "kvloom/policies/budgets.py"),
    "placement": ("keeps, drops, merges or stores in fewer bits, by rank", "kvloom/policies/placements.py"),
    "segment": ("tokens of one class, and attention over them", "kvloom/core/segment.py"),
    "codec": ("keys or values to bytes and back", "kvloom/core/codec.py"),
    "run": ("consecutive tokens under one codec, shared by copies of a cache", "kvloom/core/run.py"),
    "profile": ("what was measured or trained once for a model", "kvloom/core/profile.py"),
    "kernels": ("the arithmetic, by device", "kvloom/kernels"),
    "selector": ("which stored tokens one query reads", "kvloom/policies/selectors.py"),
    "store": ("other tiers than the device's memory, and other processes", "kvloom/store"),
    "finder": ("which stored texts a new text can reuse", "kvloom/store/finders.py"),
    "program": ("what is fed to the model: drafts, repairs, denoising", "kvloom/programs"),
    "scheduler": ("which request goes next", "kvloom/engine"),
}
HEAD = """\
# Taxonomy

Where published systems stand in the tree of
[A Survey on Large Language Model Acceleration based on KV Cache Management](https://arxiv.org/abs/2412.19442), and which part of
kvloom serves each sub-class. This page is made from `scripts/taxonomy.toml` and the recipes by `python -m scripts.taxonomy`.

A system with a link is a recipe of kvloom: the link leads to its card. *Italics*: placed here by what it does, not by the
survey; so are sub-classes in italics. *Also*: systems that stand elsewhere in the tree and do this as well. *Lab*: what was measured.
"""
LEVELS = {
    "none": ("No change", "What all else is compared with."),
    "token": ("Token level", "At inference, on what is cached; the model stays as it is."),
    "model": (
        "Model level",
        "Architecture or training: out of scope, and a model built that way brings its own cache.",
    ),
    "system": ("System level", "Memory, scheduling, hardware."),
    "beyond the survey": ("Beyond the survey", "Classes of systems that its tree has no place for."),
}


@dataclass(frozen=True)
class System:
    """A published system; `recipe`: its name in kvloom, if it is one."""

    name: str
    recipe: str | None
    named: bool  # by the survey


@dataclass(frozen=True)
class Subclass:
    """One row: `systems` stand here, `also` stand elsewhere."""

    level: str
    group: str
    name: str
    contracts: tuple[str, ...]
    systems: tuple[System, ...]
    also: tuple[System, ...]
    own: bool


def key(name: str) -> str:
    """A name as recipes spell theirs: small letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def tree() -> list[Subclass]:
    """All rows, in the order of the file. Raises ValueError for a contract that does not exist or a system placed twice."""
    known = {key(name): name for name in recipes()}
    rows: list[dict[str, Any]] = tomllib.loads(DATA.read_text(encoding="utf-8"))["subclass"]
    placed: dict[str, System] = {}

    def system(text: str, named: bool) -> System:
        name, _, recipe = (part.strip() for part in text.partition("="))
        found = System(name, known.get(key(recipe or name)), named)
        if key(name) in placed:
            raise ValueError(f"{DATA.name}: {name!r} is placed twice; name it once, and under `also` elsewhere.")
        placed[key(name)] = found
        return found

    made = []
    for row in rows:
        for contract in row["contracts"]:
            if contract not in CONTRACTS and row["contracts"] != [OUT]:
                raise ValueError(
                    f"{DATA.name}: contract {contract!r} of {row['name']!r} is none of {', '.join(CONTRACTS)}."
                )
        systems = [system(s, True) for s in row.get("survey", [])] + [system(s, False) for s in row.get("added", [])]
        made.append((row, tuple(systems)))
    lost = {name for row in rows for name in row.get("also", []) if key(name) not in placed}
    if lost:
        raise ValueError(f"{DATA.name}: {', '.join(sorted(lost))} stand under `also`, but nowhere else.")
    return [
        Subclass(
            row["level"], row["class"], row["name"], tuple(row["contracts"]), systems,
            tuple(placed[key(name)] for name in row.get("also", [])), row.get("own", False),
        )
        for row, systems in made
    ]  # fmt: skip


def _shown(system: System) -> str:
    name = system.name if system.named else f"*{system.name}*"
    return f"[**{name}**](methods.md#{system.recipe})" if system.recipe else name


def _measured(subclass: Subclass, lab: Lab) -> str:
    """The recipes of a row: a link to the card, and the lab's figures with a link to the tables."""
    found = []
    for name in [s.recipe for s in subclass.systems if s.recipe]:
        said = "; ".join(f"[`{x['cache']}`](lab-results.md#{x['model']}) {_figures(x)}" for x in lab.get(name, []))
        found.append(f"[`{name}`](methods.md#{name})" + (f": {said}" if said else ""))
    return "; ".join(found)


def _figures(measured: dict[str, Any]) -> str:
    shown = (("quality", "quality {:.0%}"), ("smaller", "{:.1f}x smaller"), ("kl", "KL {:.3f}"))
    return ", ".join(text.format(measured[key]) for key, text in shown if measured[key] is not None)


def _section(level: str, rows: list[Subclass], lab: Lab) -> str:
    title, about = LEVELS[level]
    lines = [
        f"## {title}",
        "",
        about,
        "",
        "| class | sub-class | kvloom | systems | lab |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"*{row.name}*" if row.own else row.name
        contracts = (
            "out of scope: model architecture or training" if row.contracts == (OUT,) else ", ".join(row.contracts)
        )
        systems = ", ".join(map(_shown, row.systems))
        if row.also:
            systems += f". Also: {', '.join(map(_shown, row.also))}"
        lines.append(f"| {row.group} | {name} | {contracts} | {systems} | {_measured(row, lab)} |")
    return "\n".join(lines) + "\n"


def _contracts() -> str:
    lines = ["## The parts of kvloom", "", "| part | does | where |", "| --- | --- | --- |"]
    for name, (does, where) in CONTRACTS.items():
        place = f"[`{where}`](../{where})" if (ROOT / where).exists() else "planned"
        lines.append(f"| {name} | {does} | {place} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    lab: Lab = json.loads(LAB.read_text(encoding="utf-8")) if LAB.exists() else {}
    rows = tree()
    systems = [s for row in rows for s in row.systems]
    own = sum(1 for s in systems if s.recipe)
    told = f"{len(systems)} systems in {len(rows)} sub-classes; {own} are recipes of kvloom.\n"
    parts = [_section(level, [row for row in rows if row.level == level], lab) for level in LEVELS]
    return "\n".join([HEAD, told, *parts, _contracts()])


if __name__ == "__main__":
    write_or_check(PAGE, page(), __doc__, f"{len(tree())} sub-classes")

"""Writes docs/composition.md, every codec beside every placement: `python -m scripts.composition`. `--check` compares."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

import kvloom  # noqa: F401  (registers the recipes)
from kvloom.core.recipe import Recipe
from kvloom.core.registry import parse, recipes
from kvloom.core.site import Site
from kvloom.errors import KvloomError
from kvloom.plan.model import model_of
from scripts.made import write_or_check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "composition.md"
HEAD = """\
# What composes with what

A placement decides which tokens stay, a codec how they are stored: `"h2o(budget=0.2) | kivi(bits=4)"`. This page is made from the
registry by `python -m scripts.composition`, on the shape of a Llama model with heads of 128 channels; a new recipe joins by itself.

`yes`: they compose. What stays is chosen token by token and head by head, as by the placement alone. `N`: they compose, and what was encoded
leaves in groups of N tokens, since these share a scale or another number. A letter: refused when the cache is made, for the reason below.
`tests/test_composition.py` runs every cell on a small model: where nothing is encoded, or by a codec that loses nothing, the result is
that of the placement alone; else no slot is lost or doubled over a prompt, 200 decoded tokens and a second turn, bytes are
those of the formula, and the predictions stay finite.
"""


def _options(name: str) -> set[str]:
    return {option.name for option in recipes()[name].options}


@cache
def _outline(name: str) -> Recipe:
    """A recipe as far as it is known without weights."""
    recipe = parse(name)
    try:
        return recipe.sketched(config())
    except KvloomError:
        return recipe


@cache
def config() -> Any:
    """The shape of a model that every codec's default options suit."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    return LlamaConfig(hidden_size=1024, intermediate_size=2048, vocab_size=1000, max_position_embeddings=8192, **shape)


@cache
def sites() -> tuple[Site, ...]:
    """Its layers."""
    return tuple(model_of(config(), "llama", "fp32").sites)


def codecs() -> list[str]:
    """Recipes that store what others keep, oldest first, and their form head by head where they have one."""
    found = []
    for name in _by_age():
        outline = _outline(name)
        if not outline.policy and not outline.kinds["main"].exact:
            found.append(name)
            if "spread" in _options(name):
                found.append(f"{name}(spread='head')")
    return found


def placements() -> list[str]:
    """Recipes that choose tokens, oldest first; those that also store some of them in their own way are among them."""
    return [name for name in _by_age() if _outline(name).policy]


def _by_age() -> list[str]:
    return sorted(recipes(), key=lambda name: (recipes()[name].year, recipes()[name].arxiv))


def refusal(placement: str, codec: str) -> str:
    """Why the two are refused, with the two names left out; "" if they compose."""
    try:
        bound(_outline(placement) | _outline(codec))
    except KvloomError as error:
        text = str(error).removeprefix(f"{_outline(placement).name} | {_outline(codec).name}: ")
        for name, stands in (
            (placement, "the placement"),
            (codec, "the codec"),
            (codec.partition("(")[0], "the codec"),
        ):
            text = text.replace(f"both {name} and", f"both {stands} and").replace(name, stands)
        return text
    return ""


def bound(recipe: Recipe) -> Recipe:
    """Checked against every layer, as a cache does it."""
    return recipe.bind(list(sites()))


def cell(placement: str, codec: str, reasons: list[str]) -> str:
    """One cell; a new reason is added to the list."""
    why = refusal(placement, codec)
    if why:
        if why not in reasons:
            reasons.append(why)
        return chr(ord("a") + reasons.index(why))
    unit = (_outline(placement) | _outline(codec)).kinds["main"].unit
    return "yes" if unit == 1 else str(unit)


def page() -> str:
    """The table, and the reasons under it."""
    reasons: list[str] = []
    columns = codecs()
    rows = [f"| | {' | '.join(f'`{name}`' for name in columns)} |", f"| --- |{' :---: |' * len(columns)}"]
    for placement in placements():
        rows.append(f"| `{placement}` | {' | '.join(cell(placement, codec, reasons) for codec in columns)} |")
    notes = [f"- **{chr(ord('a') + i)}**: {text}" for i, text in enumerate(reasons)]
    return "\n".join([HEAD, *rows, "", *notes, ""])


if __name__ == "__main__":
    write_or_check(PAGE, page(), __doc__ or "", f"{len(codecs())} codecs, {len(placements())} placements")

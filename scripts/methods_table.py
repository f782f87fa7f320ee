"""Writes docs/methods.md from the recipes' cards: `python -m scripts.methods_table`. `--check` compares."""

from __future__ import annotations

from pathlib import Path

import kvloom  # noqa: F401  (registers the recipes)
from kvloom.core.card import Card
from kvloom.core.registry import recipes
from scripts.made import write_or_check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
HEAD = """\
# Methods

One recipe per published system. This page is made from the cards in `kvloom/recipes` by
`python -m scripts.methods_table`; `kvloom recipes NAME` prints the same card. What a paper claims is its
authors' word; what was measured with this implementation stands under "Measured", if anything was.

T: tokens of the text; D_k, D_v: size of a key and of a value; itemsize: bytes of one of the model's numbers.
"""
FIELDS = {
    "idea": "Idea",
    "claims": "The paper claims",
    "differs": "Different here",
    "open": "Left open by the paper, chosen here",
    "measured": "Measured",
    "bytes": "Bytes",
}


def paper(card: Card) -> str:
    """A link to the paper, or its title where there is no arXiv number."""
    return f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def section(card: Card) -> str:
    """One recipe: its paper, what the card says, its options."""
    code = f" Code of the authors: [{card.code}](https://github.com/{card.code})." if card.code else ""
    lines = [f"## {card.name}", "", f"{paper(card)}, {card.year}.{code}", ""]
    # formulas hold * and _, which are marks in Markdown
    marks = str.maketrans({"*": "\\*", "_": "\\_"})
    shown = {label: getattr(card, name).translate(marks) for name, label in FIELDS.items()}
    lines += [f"- **{label}.** {text}" for label, text in shown.items() if text]
    if card.options:
        lines += ["", "| option | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{o.name}` | `{o.default!r}` | {cell(o.doc)} |" for o in card.options]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page, oldest method first, `full` before all."""
    cards = sorted(recipes().values(), key=lambda card: (card.name != "full", card.year, card.arxiv))
    table = ["| recipe | paper | year |", "| --- | --- | --- |"]
    table += [f"| [`{card.name}`](#{card.name}) | {paper(card)} | {card.year} |" for card in cards]
    return "\n".join([HEAD, "\n".join(table) + "\n", *(section(card) for card in cards)])


if __name__ == "__main__":
    write_or_check(PAGE, page(), __doc__, f"{len(recipes())} recipes")

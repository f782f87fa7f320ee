"""Writes docs/methods.md and the tables of README.md from the recipes: `python -m scripts.methods_table`. `--check` compares."""

from __future__ import annotations

import sys
from pathlib import Path

import kvloom  # noqa: F401  (registers the recipes)
from kvloom.core.card import Card
from kvloom.core.registry import parse, recipes
from scripts.made import write_or_check

ROOT = Path(__file__).resolve().parent.parent
PAGE, README = ROOT / "docs" / "methods.md", ROOT / "README.md"
START, END = "<!-- made by scripts.methods_table -->\n", "<!-- up to here -->\n"
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


def does(name: str) -> str:
    """What a recipe does, as its file begins."""
    first = (sys.modules[f"kvloom.recipes.{name.replace('-', '_')}"].__doc__ or "").split("\n", 1)[0]
    return cell(first.split(": ", 1)[-1].rstrip("."))


def readme() -> str:
    """README.md with its tables of recipes: which tokens stay, and how numbers are stored."""
    families: dict[str, list[Card]] = {"Which tokens stay": [], "How keys and values are stored": []}
    stay, stored = families.values()
    for card in sorted(recipes().values(), key=lambda card: (card.name != "full", card.year, card.arxiv)):
        (stay if all(kind.exact for kind in parse(card.name).kinds.values()) else stored).append(card)
    lines: list[str] = []
    for title, cards in families.items():
        lines += [f"| {title} | | |", "| --- | --- | --- |"]
        for card in cards:
            link = f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})"
            lines.append(f"| [`{card.name}`](docs/methods.md#{card.name}) | {does(card.name)} | {link} |")
        lines.append("")
    before, rest = README.read_text(encoding="utf-8").split(START)
    return before + START + "\n" + "\n".join(lines) + END + rest.split(END)[1]


if __name__ == "__main__":
    write_or_check(PAGE, page(), __doc__, f"{len(recipes())} recipes")
    write_or_check(README, readme(), __doc__, "tables of recipes")

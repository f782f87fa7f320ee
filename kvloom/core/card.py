"""A recipe's card: what the paper claims, what this implementation does differently, what was measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Card", "Option"]


@dataclass(frozen=True)
class Option:
    """One keyword of a recipe."""

    name: str
    default: Any
    doc: str


@dataclass(frozen=True)
class Card:
    """`name` is the recipe's name; `open` says what the paper leaves open and what was chosen here.

    `points`: options at which the paper measures, as in ("bits=2", "bits=4, group=64"); tables run these, or the defaults.
    """

    name: str
    title: str
    year: int
    arxiv: str
    code: str
    idea: str
    claims: str
    differs: str
    open: str
    measured: str
    bytes: str
    points: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()

    @property
    def recipes(self) -> tuple[str, ...]:
        """The paper's operating points as recipes."""
        return tuple(f"{self.name}({point})" if point else self.name for point in self.points or ("",))

    def text(self) -> str:
        """The card as plain text."""
        rows = [f"{self.name}: {self.title} ({self.year}{', arXiv ' + self.arxiv if self.arxiv else ''})", ""]
        labels = ("idea", "claims", "differs", "open", "measured", "bytes", "code")
        rows += [f"{label:>9}: {getattr(self, label)}" for label in labels if getattr(self, label)]
        rows += [f"   points: {', '.join(self.recipes)}"] if self.points else []
        rows += ["", "  options:"] if self.options else []
        rows += [f"    {o.name} = {o.default!r}: {o.doc}" for o in self.options]
        return "\n".join(rows)


def options_of(factory: Callable[..., Any]) -> tuple[Option, ...]:
    """The keywords of a recipe's factory, described by the 'Args:' lines of its docstring."""
    docs: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(factory) or "").partition("Args:")[2].splitlines():
        head, colon, rest = line.strip().partition(":")
        if colon and head.isidentifier() and line.startswith("    ") and not line.startswith("     "):
            name, docs[head] = head, rest.strip()
        elif name and line.strip():
            docs[name] += " " + line.strip()
        elif name:
            break
    parameters = inspect.signature(factory).parameters.values()
    return tuple(Option(p.name, p.default, docs.get(p.name, "")) for p in parameters)

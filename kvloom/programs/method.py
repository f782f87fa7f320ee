"""A method of reuse: which rows of a text are fed again, given which of its stretches come from chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom.core.card import Card
from kvloom.core.registry import Registry
from kvloom.programs.chunk import Chunk
from kvloom.programs.feeding import Choose

__all__ = ["METHODS", "Method", "Plan", "Span", "Text", "method", "methods", "parse_method"]


@dataclass(frozen=True)
class Span:
    """A stretch [start, stop) of a text whose keys and values come from `chunk`.

    `exact`: the chunk was computed at this very place behind these very tokens, so nothing about it is stale.
    """

    start: int
    stop: int
    chunk: Chunk
    exact: bool = False


@dataclass(frozen=True)
class Text:
    """A text and the spans of it that are reused, in order, none overlapping. What no span covers has to be computed."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...] = ()

    @property
    def stale(self) -> Tensor:
        """[T] bool: places whose keys and values were computed in another context."""
        return self._marked(False)

    @property
    def exact(self) -> Tensor:
        """[T] bool: places whose keys and values are what a prefill of this text would give."""
        return self._marked(True)

    def _marked(self, exact: bool) -> Tensor:
        marks = torch.zeros(len(self.tokens), dtype=torch.bool)
        for span in self.spans:
            if span.exact == exact:
                marks[span.start : span.stop] = True
        return marks

    def fed(self, which: Tensor) -> Tensor:
        """The places [m] where `which` [T] bool holds, and the last of the text, whose logits are wanted."""
        marks = which.clone()
        marks[-1] = True
        return marks.nonzero()[:, 0]


class Plan(NamedTuple):
    """The places [m] to feed, ascending, and what may narrow them on the way."""

    rows: Tensor
    choose: Choose | None = None


@dataclass(frozen=True)
class Method:
    """A named method. `plan(text)` says what is fed; `reuse`: which spans it wants in the cache ("all", or "exact" only)."""

    name: str
    plan: Callable[[Text], Plan]
    reuse: str = "all"

    def __str__(self) -> str:
        return self.name


METHODS: Registry[Method] = Registry("method", "cacheblend(ratio=0.15)")
method = METHODS.add


def methods() -> dict[str, Card]:
    """All registered methods: name -> card."""
    _load()
    return METHODS.cards()


def parse_method(text: str) -> Method:
    """Reads "name(option=value, ...)". Raises RecipeError with the reason."""
    _load()
    return METHODS.make(text, text)


def _load() -> None:
    from kvloom.programs import baselines, cacheblend, epic, kvshare  # noqa: F401  # they register themselves

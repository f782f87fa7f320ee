"""What a prompt may be: text, token ids, a document, or a list of such parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from kvloom.errors import StoreError

if TYPE_CHECKING:
    from kvloom.store.pipeline import Document

__all__ = ["Prompt", "Span", "read_prompt"]

Prompt: TypeAlias = "str | Tensor | Document | Sequence[int] | Sequence[str | Tensor | Document | Sequence[int]]"


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a prompt are those of a document."""

    start: int
    stop: int
    document: Document


def read_prompt(prompt: Prompt, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Token ids, and where documents stand. Parts are turned into tokens each for itself, so that a document always has
    the same ones; special tokens of the tokenizer come only before the first. Raises StoreError.
    """
    tokens: list[int] = []
    spans: list[Span] = []
    _read(prompt, tokenizer, tokens, spans)
    return tokens, spans


def _read(part: Any, tokenizer: Any, tokens: list[int], spans: list[Span]) -> None:
    if isinstance(part, str):
        if tokenizer is None:
            raise StoreError("the prompt is text, and no tokenizer is attached; give one to attach(), or token ids.")
        tokens += tokenizer.encode(part, add_special_tokens=not tokens)
    elif isinstance(part, Tensor):
        if part.dim() not in (1, 2) or (part.dim() == 2 and len(part) != 1) or part.is_floating_point():
            raise StoreError(f"prompt of shape {tuple(part.shape)}, {part.dtype}; give token ids [n] or [1, n].")
        tokens += part.flatten().tolist()
    elif hasattr(part, "tokens") and hasattr(part, "attached"):
        spans.append(Span(len(tokens), len(tokens) + len(part.tokens), part))
        tokens += part.tokens
    elif isinstance(part, Sequence) and all(isinstance(x, int) and not isinstance(x, bool) for x in part):
        tokens += part
    elif isinstance(part, Sequence):
        for each in part:
            _read(each, tokenizer, tokens, spans)
    else:
        raise StoreError(
            f"a {type(part).__name__} is no part of a prompt; give text, token ids, documents or lists of them."
        )

"""What is asked of the engine, and what it answers, token by token."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

__all__ = ["Finish", "Guide", "Output", "Request", "Sampling"]

Finish = Literal["stop", "length", "abort", "error"]
_count = itertools.count()


class Guide(Protocol):
    """Says which tokens may come next; one for each answer. For constrained output, such as JSON of a schema."""

    def mask(self, logits: Tensor) -> None:
        """Sets logits [vocabulary] of tokens that may not come to -inf, in place."""

    def accept(self, token: int) -> bool:
        """Takes the token that came. Returns whether the answer is complete."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy.

    Args:
        max_tokens: tokens of the answer at most; None: as many as the context holds.
        top_k: 0 for all. min_p: least probability, as a share of the best token's.
        seed: of this answer alone, whatever runs beside it; None: another one each time.
        presence, frequency: taken off the logits of tokens of the answer, once or as often as they came.
        repetition: divides positive and multiplies negative logits of tokens of prompt and answer.
        bias: added to the logits of these tokens.
        stop: ends behind one of these tokens, which is part of the answer. min_tokens: not before so many.
        logprobs: log-probabilities of the token that came and of so many best ones, of the model's own distribution;
            None: of none.
        guide: makes what constrains the answer, called once.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict)
    stop: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    guide: Callable[[], Guide] | None = None


@dataclass
class Request:
    """One answer to one prompt.

    Args:
        tokens: the prompt, at least one token.
        recipe: of its cache; "": the engine's.
        adapter: name of a LoRA adapter; "": the model alone.
        salt: prompts share what is cached only with prompts of the same salt.
        priority: less goes first.
        arrival: seconds, `time.monotonic`.
    """

    tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    id: str = field(default_factory=lambda: f"request-{next(_count)}")
    recipe: str = ""
    adapter: str = ""
    salt: str = ""
    priority: int = 0
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Output:
    """What one step gave one request: a token, or the end, or both.

    `cached`: tokens of the prompt that were found in the cache. `logprob`, `top`: only if asked for. `error`: why, in a
    sentence, if `finish` is "error". `squeezed`: memory was short, and the cache was compressed harder than asked for before this
    token or an earlier one.
    """

    id: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    cached: int = 0
    error: str = ""
    squeezed: bool = False

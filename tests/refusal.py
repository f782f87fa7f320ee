"""What a refusal must look like."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from kvloom.errors import KvloomError

# What a remedy sounds like.
REMEDY = re.compile(
    r"\b(use|pass|choose|give|must|need|needs|set|try|available|did you mean|between|at least|at most|one of|"
    r"raise|lower|keep|make|create|build|write|remove|detach|new|from .* to|example|instead)\b",
    re.IGNORECASE,
)


def check(message: str, *named: str) -> None:
    for word in named:
        assert word in message, f"the message does not name {word!r}: {message}"
    assert REMEDY.search(message), f"the message names no remedy: {message}"
    assert "Traceback" not in message and len(message) < 700


def refusal(act: Callable[[], Any], *named: str) -> str:
    """Do `act`, which must be refused; check and return the message."""
    with pytest.raises(ValueError) as caught:
        act()
    assert isinstance(caught.value, KvloomError), f"{type(caught.value).__name__}: {caught.value}"
    check(str(caught.value), *named)
    return str(caught.value)

"""How many slots each head may keep: in tokens, as a ratio of the prompt, or in bytes of a whole sequence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvloom.core.recipe import Recipe
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.errors import RecipeError

__all__ = ["Size", "Tokens", "fraction", "read_bytes"]

Size = int | float | str
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_bytes(text: str) -> int:
    """ "64MiB" -> 67108864. Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise RecipeError(f"budget={text!r} is no number of bytes. Write for example '64MiB', '500KB' or '1.5GiB'.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class Tokens:
    """`size` is slots per layer and KV head (int), a ratio of the prompt (float up to 1), or bytes ("64MiB").

    A ratio of 1.0 sets no limit. `held(n)` says how many slots of each class a head holds at a budget of n, for a budget in bytes. `least`
    slots must fit: sinks and window.
    """

    size: Size
    least: int = 1
    held: Callable[[int], dict[str, int]] = lambda n: {"main": n}
    limit: int | None = None

    def __post_init__(self) -> None:
        size = self.size
        if isinstance(size, str):
            read_bytes(size)
        elif isinstance(size, bool) or not isinstance(size, int | float):
            raise RecipeError(f"budget={size!r} must be a number of tokens, a ratio up to 1.0, or bytes like '64MiB'.")
        elif isinstance(size, float) and not 0 < size <= 1:
            raise RecipeError(f"budget={size!r} is no ratio: use 0 < ratio <= 1.0, or a whole number of tokens.")
        elif isinstance(size, int) and size < 1:
            raise RecipeError(f"budget={size!r} must be at least 1 token.")
        elif isinstance(size, int) and size < self.least:
            raise RecipeError(
                f"budget={size} is smaller than sinks + window = {self.least}. Use budget >= {self.least}."
            )

    def bind(self, recipe: Recipe, sites: list[Site]) -> Tokens:
        if not isinstance(self.size, str) or not sites:
            return self
        wanted = read_bytes(self.size)
        total = max(site.layers for site in sites) / len(sites)

        def needed(n: int) -> float:
            return total * sum(recipe.nbytes(site, self.held(n)) + recipe.state(site) for site in sites)

        if needed(self.least) > wanted:
            raise RecipeError(
                f"budget={self.size!r} is too small for this model: {self.least} slots per head (sinks + window) need "
                f"{int(needed(self.least)):,} bytes. Use a larger budget or a smaller window."
            )
        low, high = self.least, 2 * self.least
        while needed(high) <= wanted:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle) <= wanted else (low, middle)
        return replace(self, limit=low)

    def __call__(self, step: Step) -> int | None:
        if self.limit is not None:
            return self.limit
        if isinstance(self.size, float):
            return None if self.size == 1.0 else fraction(self.size, step.prompt)
        return int(self.size)


def fraction(ratio: float, of: int) -> int:
    """A ratio of so many tokens, at least one. Rounded down, as published code does, but 0.3 * 10 is 3."""
    return max(1, int(ratio * of + 1e-9))

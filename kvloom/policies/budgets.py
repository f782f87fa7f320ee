"""How many slots each head may keep: in tokens, as a ratio of the prompt, or in bytes of a whole sequence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from kvloom.core.recipe import Recipe
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.errors import RecipeError

__all__ = ["Burst", "Nothing", "Pyramid", "Shares", "Size", "Tokens", "Weighted", "fraction", "read_bytes"]

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
    slots must fit: sinks and window. `uneven`: heads or layers hold unequally many, n on average.
    """

    size: Size
    least: int = 1
    held: Callable[[int], dict[str, int]] = lambda n: {"main": n}
    limit: int | None = None
    uneven: bool = False

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
            return total * self._needed(recipe, sites, n)

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

    def _needed(self, recipe: Recipe, sites: list[Site], n: int) -> int:
        """Bytes of these layers at a budget of n."""
        return sum(self._layer(recipe, site, n) for site in sites)

    def _layer(self, recipe: Recipe, site: Site, n: int) -> int:
        if not self.uneven:
            return recipe.nbytes(site, self.held(n)) + recipe.state(site)
        kind = recipe.kinds["main"]  # where heads or layers differ, some wait just before a group of slots is encoded
        tails = [t for codec, t in ((kind.key, kind.key_tail), (kind.value, kind.value_tail)) if not codec.exact]
        before = [max(0, n - (n - tail.keep) % tail.every - 1) for tail in tails]
        most = max(recipe.nbytes(site, self.held(each)) for each in (n, *before))
        return most + recipe.state(site) + site.kv_heads * torch.int64.itemsize

    def __call__(self, step: Step) -> int | None:
        return self.slots(step.prompt)

    def slots(self, prompt: int) -> int | None:
        """For a prompt of so many tokens."""
        if self.limit is not None:
            return self.limit
        if isinstance(self.size, float):
            return None if self.size == 1.0 else fraction(self.size, prompt)
        return int(self.size)


@dataclass(frozen=True)
class Burst(Tokens):
    """`size` may be reached; what passes it leaves together with a share of `drop` of it (Scissorhands, arXiv 2305.17118)."""

    drop: float = 0.5

    def __call__(self, step: Step) -> int | None:
        size = super().__call__(step)
        return size if size is None or step.group.segments["main"].n <= size else size - int(size * self.drop)


@dataclass(frozen=True)
class Pyramid(Tokens):
    """Lower layers keep more, in equal steps, and `size` on average over the layers (PyramidKV, arXiv 2406.02069).

    Without the `window`, which all layers keep, the last layer gets one `beta`-th of the mean, the first one the rest of
    twice the mean; no layer gets more than there is. Prompts shorter than twice the mean are cut evenly.
    """

    uneven: bool = True
    window: int = 1
    beta: int = 20
    order: tuple[int, ...] = ()  # the layers that the recipe manages

    def bind(self, recipe: Recipe, sites: list[Site]) -> Tokens:
        return Tokens.bind(replace(self, order=tuple(site.layer for site in sites)), recipe, sites)

    def _needed(self, recipe: Recipe, sites: list[Site], n: int) -> int:
        """Behind a long prompt or a short one, whichever is more."""
        uneven = [self._share(n, site.layer, 1 << 40) for site in sites]
        return max(sum(map(partial(self._layer, recipe), sites, shares)) for shares in (uneven, [n] * len(sites)))

    def __call__(self, step: Step) -> int | None:
        size = super().__call__(step)
        return size if size is None else self._share(size, step.site.layer, step.prompt)

    def _share(self, size: int, layer: int, prompt: int) -> int:
        """Slots of one layer."""
        mean, layers = size - self.window, len(self.order)
        if layers < 2 or prompt < 2 * mean:
            return size
        first = min(2 * mean - mean // self.beta, prompt - self.window)
        # steps are whole slots, rounded down, so the layers keep up to half a slot per layer more than the mean
        step = (2 * first - 2 * mean) // (layers - 1)
        return first - self.order.index(layer) * step + self.window


class Nothing:
    """No slot stays where it is: each leaves for a class of its placement."""

    def bind(self, recipe: Recipe, sites: list[Site]) -> Nothing:
        return self

    def __call__(self, step: Step) -> int | None:
        return 0


@dataclass(frozen=True)
class Layered(Tokens):
    """Layers keep unequally many, as `split` says; `order`: those that the recipe manages."""

    uneven: bool = True
    weights: tuple[float, ...] = ()
    order: tuple[int, ...] = ()

    def bind(self, recipe: Recipe, sites: list[Site]) -> Tokens:
        return Tokens.bind(replace(self, order=tuple(site.layer for site in sites)), recipe, sites)

    def _needed(self, recipe: Recipe, sites: list[Site], n: int) -> int:
        return sum(map(partial(self._layer, recipe), sites, self.split(n)))

    def __call__(self, step: Step) -> int | None:
        size = super().__call__(step)
        return size if size is None else self.split(size)[self.order.index(step.site.layer)]

    def split(self, size: int) -> list[int]:
        """Slots of every layer, at a mean of `size`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Shares(Layered):
    """`base` slots for every layer, the rest by `weights`; no layer more than thrice the mean (CompressKV, arXiv 2508.02401).

    `weights`: one of every layer of the model. The layers that the recipe manages hold just `size` on average.
    """

    base: int = 32

    def split(self, size: int) -> list[int]:
        count, base, most = len(self.order), min(self.base, size), 3 * size
        weights = [self.weights[layer] if self.weights else 1.0 for layer in self.order]
        whole = sum(weights) or 1.0
        found = [min(most, base + int((size - base) * count * w / whole)) for w in weights]
        ranked = sorted(range(count), key=lambda i: -weights[i])
        # whole slots that rounding and the cap left over, best layers first
        while (left := size * count - sum(found)) > 0:
            for i in ranked:
                add = min(most - found[i], -(-left // count), size * count - sum(found))
                found[i] += add
        return found


@dataclass(frozen=True)
class Weighted(Layered):
    """Layers keep by their `weights`, one number for each layer that the recipe manages; without them all alike.

    None keeps less than a quarter of the mean; by what that adds, the layers exceed it together (EpiCache, arXiv 2509.17396).
    """

    def split(self, size: int) -> list[int]:
        total = sum(self.weights)
        if not total:
            return [size] * len(self.order)
        return [max(int(w / total * size * len(self.weights)), size // 4, 1) for w in self.weights]


def fraction(ratio: float, of: int) -> int:
    """A ratio of so many tokens, at least one. Rounded down, as published code does, but 0.3 * 10 is 3."""
    return max(1, int(ratio * of + 1e-9))

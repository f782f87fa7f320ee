"""Recipes by name, and the little language "snapkv(budget=1024) | kivi(bits=4)"."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvloom.core.card import Card, options_of
from kvloom.core.recipe import Recipe
from kvloom.errors import RecipeError, unknown

__all__ = ["card", "parse", "recipe", "recipes"]

Factory = Callable[..., Recipe]
_factories: dict[str, tuple[Factory, Card]] = {}


def recipe(card: Card) -> Callable[[Factory], Factory]:
    """Registers a function of keyword options as the recipe `card.name`; the name of what it returns is filled in."""

    def register(factory: Factory) -> Factory:
        if card.name in _factories:
            raise RecipeError(f"recipe {card.name!r} is registered twice.")
        options = options_of(factory)

        @functools.wraps(factory)
        def build(*args: Any, **kwargs: Any) -> Recipe:
            names = [option.name for option in options]
            if len(args) > len(names):
                raise RecipeError(
                    f"{card.name} takes at most {len(names)} options ({', '.join(names)}), got {len(args)}."
                )
            given = dict(zip(names, args, strict=False))
            for name in kwargs:
                if name not in names:
                    raise RecipeError(f"{card.name}: " + unknown("option", name, names))
                if name in given:
                    raise RecipeError(f"{card.name}: option {name!r} is given twice.")
            given |= kwargs
            shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
            return replace(factory(**given), name=f"{card.name}({shown})" if shown else card.name)

        _factories[card.name] = (build, replace(card, options=options))
        return build

    return register


def recipes() -> dict[str, Card]:
    """All registered recipes: name -> card."""
    return {name: card for name, (_, card) in sorted(_factories.items())}


def card(name: str) -> Card:
    """The card of one recipe; "-" and "_" are the same. Raises RecipeError for an unknown name."""
    return _find(name)[1]


def _find(name: str) -> tuple[Factory, Card]:
    found = {known.replace("-", "_"): entry for known, entry in _factories.items()}.get(name.replace("-", "_").lower())
    if found is None:
        raise RecipeError(unknown("recipe", name, _factories))
    return found


def parse(text: str) -> Recipe:
    """Reads "name(option=value, ...) | name(...)". Values are Python literals. Raises RecipeError with the reason."""
    if not text.strip():
        raise RecipeError("the recipe is empty. Example: 'snapkv(budget=1024) | kivi(bits=4)'.")
    found: Recipe | None = None
    for part in _split(text):
        one = _one(part, text)
        found = one if found is None else found | one
    assert found is not None
    return found


def _split(text: str) -> list[str]:
    """Cuts at the bars that are outside quotes and brackets."""
    parts, depth, quote, last = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "|" and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    return [*parts, text[last:]]


def _one(part: str, text: str) -> Recipe:
    name, bracket, inside = part.strip().partition("(")
    if not name.strip():
        raise RecipeError(
            f"a recipe is missing beside a '|' in {text!r}. Example: 'snapkv(budget=1024) | kivi(bits=4)'."
        )
    factory, known = _find(name.strip())
    try:
        call = ast.parse(f"f({inside}" if bracket else "f()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise SyntaxError
        names = [word.arg for word in call.keywords]
        if None in names or len(set(names)) < len(names):
            raise SyntaxError  # **options, or one given twice
        args = [ast.literal_eval(value) for value in call.args]
        kwargs = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise RecipeError(
            f"cannot read {part.strip()!r} in recipe {text!r}. Write {known.name}(option=value, ...) with numbers, "
            "True, False, None or quoted text as values."
        ) from error
    return factory(*args, **kwargs)

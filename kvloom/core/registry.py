"""Recipes by name, and the little language "snapkv(budget=1024) | kivi(bits=4)"."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, TypeVar

from kvloom.core.card import Card, options_of
from kvloom.core.recipe import Recipe
from kvloom.errors import RecipeError, unknown

__all__ = ["RECIPES", "Registry", "card", "parse", "recipe", "recipes"]

T = TypeVar("T")
Factory = Callable[..., T]


class Registry(Generic[T]):
    """Functions of keyword options by name, each with a card; what they return is a dataclass with a `name`."""

    def __init__(self, what: str, example: str) -> None:
        self.what, self.example = what, example
        self.factories: dict[str, tuple[Factory[T], Card]] = {}

    def add(self, card: Card) -> Callable[[Factory[T]], Factory[T]]:
        """Registers a function as `card.name`; the name of what it returns is filled in."""

        def register(factory: Factory[T]) -> Factory[T]:
            if card.name in self.factories:
                raise RecipeError(f"{self.what} {card.name!r} is registered twice.")
            options = options_of(factory)

            @functools.wraps(factory)
            def build(*args: Any, **kwargs: Any) -> T:
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
                made: Any = factory(**given)
                named: T = replace(made, name=f"{card.name}({shown})" if shown else card.name)
                return named

            self.factories[card.name] = (build, replace(card, options=options))
            return build

        return register

    def cards(self) -> dict[str, Card]:
        """All that are registered: name -> card."""
        return {name: card for name, (_, card) in sorted(self.factories.items())}

    def find(self, name: str) -> tuple[Factory[T], Card]:
        """One by its name; "-" and "_" are the same. Raises RecipeError for an unknown name."""
        known = {known.replace("-", "_"): entry for known, entry in self.factories.items()}
        found = known.get(name.replace("-", "_").lower())
        if found is None:
            raise RecipeError(unknown(self.what, name, self.factories))
        return found

    def make(self, part: str, text: str) -> T:
        """Reads one "name(option=value, ...)" of `text`. Values are Python literals. Raises RecipeError with the reason."""
        name, bracket, inside = part.strip().partition("(")
        if not name.strip():
            raise RecipeError(
                f"the {self.what} is empty, or missing beside a '|', in {text!r}. Example: {self.example!r}."
            )
        factory, known = self.find(name.strip())
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
                f"cannot read {part.strip()!r} in {self.what} {text!r}. Write {known.name}(option=value, ...) with numbers, "
                "True, False, None or quoted text as values."
            ) from error
        return factory(*args, **kwargs)


RECIPES: Registry[Recipe] = Registry("recipe", "snapkv(budget=1024) | kivi(bits=4)")
recipe, recipes = RECIPES.add, RECIPES.cards


def card(name: str) -> Card:
    """The card of one recipe; "-" and "_" are the same. Raises RecipeError for an unknown name."""
    return RECIPES.find(name)[1]


def parse(text: str) -> Recipe:
    """Reads "name(option=value, ...) | name(...)". Values are Python literals. Raises RecipeError with the reason."""
    if not text.strip():
        raise RecipeError("the recipe is empty. Example: 'snapkv(budget=1024) | kivi(bits=4)'.")
    found: Recipe | None = None
    for part in _split(text):
        one = RECIPES.make(part, text)
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

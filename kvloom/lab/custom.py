"""Recipes from a file of one's own: "my_method.py:name(budget=64) | kivi(bits=4)"."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvloom.core import registry
from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.errors import RecipeError, unknown

__all__ = ["parse"]

PART = re.compile(r"(?P<file>[^|\s][^|]*?\.py):(?P<name>[A-Za-z_]\w*)")


def parse(text: str) -> Recipe:
    """A recipe in which "FILE.py:NAME" stands for the function NAME of a Python file, which is run.

    NAME takes options and returns a Recipe; with `@recipe(CARD)` on it, its card is known too. Only for text that the user
    of a command line gave: the file is executed. Raises RecipeError if there is no such file or function.
    """
    return registry.parse(PART.sub(lambda found: _registered(Path(found["file"]), found["name"]), text))


def _registered(path: Path, name: str) -> str:
    if not path.is_file():
        raise RecipeError(f"recipe file {str(path)!r} does not exist. Give FILE.py:NAME with a path from here.")
    key = f"kvloom_recipe_{abs(hash(path.resolve()))}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    names = vars(sys.modules[key])
    if name not in names or not callable(names[name]):
        functions = [n for n, x in names.items() if callable(x) and getattr(x, "__module__", "") == key]
        raise RecipeError(f"{path}: " + unknown("recipe function", name, functions))
    return _name_of(names[name], name)


def _name_of(factory: Callable[..., Any], name: str) -> str:
    """The name under which a function is registered; a plain one is registered under its own."""
    for known, (build, _) in registry.RECIPES.factories.items():
        if factory in (build, getattr(build, "__wrapped__", None)):
            return known
    title = (factory.__doc__ or name).strip().splitlines()[0]
    registry.recipe(Card(name, title, 0, "", "", title, "", "", "", "", ""))(factory)
    return name

"""The cards of all methods of reuse: those that `Blend` takes by name, and those with a class of their own."""

from __future__ import annotations

from dataclasses import replace
from inspect import Parameter
from typing import Any

from kvloom.core.card import Card, options_of
from kvloom.core.registry import Registry
from kvloom.programs import ape, cache_craft, kvcomm, pie
from kvloom.programs.method import METHODS, methods

__all__ = ["CLASSES", "everything"]

CLASSES: dict[str, tuple[type, Card]] = {
    "ape": (ape.ParallelContexts, ape.CARD),
    "cache-craft": (cache_craft.ChunkCache, cache_craft.CARD),
    "kvcomm": (kvcomm.AgentTeam, kvcomm.CARD),
    "pie": (pie.CodeSession, pie.CARD),
}


def everything() -> Registry[Any]:
    """By name: what makes it, and its card with the options of that."""
    methods()
    found: Registry[Any] = Registry(METHODS.what, METHODS.example)
    found.factories |= METHODS.factories
    for name, (made, card) in CLASSES.items():
        options = tuple(option for option in options_of(made) if option.default is not Parameter.empty)
        found.factories[name] = made, replace(card, options=options)
    return found

"""kvloom: the key-value cache of a language model, managed by recipes that compose.

from kvloom import KVCache
cache = KVCache(model, "snapkv(budget=1024) | kivi(bits=4)")
model.generate(ids, past_key_values=cache)
"""

from kvloom.core.attach import detach
from kvloom.core.cache import KVCache
from kvloom.core.card import Card
from kvloom.core.ledger import Report
from kvloom.core.recipe import Recipe
from kvloom.core.registry import card, parse
from kvloom.errors import CacheError, KvloomError, ModelError, ProfileError, RecipeError
from kvloom.recipes import load as _load

_load()

from kvloom.core.registry import recipes  # noqa: E402  # the function; the import above bound the folder of that name

__version__ = "0.1.0"
__all__ = [
    "CacheError",
    "Card",
    "KVCache",
    "KvloomError",
    "ModelError",
    "ProfileError",
    "Recipe",
    "RecipeError",
    "Report",
    "card",
    "detach",
    "parse",
    "recipes",
]

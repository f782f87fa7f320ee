"""What can go wrong, as one tree. Every message names the argument, its value and the remedy.

KvloomError (a ValueError)
├── RecipeError    a recipe's name, option, value or composition
├── ModelError     a model, or one of its layers, that a recipe cannot serve
├── CacheError     a cache used in a way that it cannot follow
└── ProfileError   a calibration file that is damaged or belongs to another model
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["CacheError", "KvloomError", "ModelError", "ProfileError", "RecipeError", "unknown"]


class KvloomError(ValueError):
    """Base of every error that kvloom raises on purpose."""


class RecipeError(KvloomError):
    """A recipe's name, option, value or composition is wrong."""


class ModelError(KvloomError):
    """A model (or one of its layers) cannot be served this way."""


class CacheError(KvloomError):
    """A cache is used in a way that it cannot follow."""


class ProfileError(KvloomError):
    """A profile is damaged or belongs to another model."""


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """One sentence for a name that does not exist: the nearest match, then all that do."""
    options = sorted(valid)
    near = get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Available: {', '.join(options) or 'none'}."

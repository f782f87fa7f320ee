"""What can go wrong, as one tree. Every message names the argument, its value and the remedy.

KvloomError (a ValueError)
├── RecipeError    a recipe's name, option, value or composition
├── ModelError     a model, or one of its layers, that a recipe cannot serve
├── CacheError     a cache used in a way that it cannot follow
├── LabError       a task, suite, data set or result file of the lab
├── ProfileError   a calibration file that is damaged or belongs to another model
├── RequestError   a request that the engine cannot serve
│   └── Full           too many of them at once: try again later
└── StoreError     a store, its address or what is put into it
    ├── DamagedFrame   stored bytes that are not what was written
    └── TierError      a tier that is down, slow or full
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CacheError",
    "DamagedFrame",
    "Full",
    "KvloomError",
    "LabError",
    "ModelError",
    "ProfileError",
    "RecipeError",
    "RequestError",
    "StoreError",
    "TierError",
    "unknown",
]


class KvloomError(ValueError):
    """Base of every error that kvloom raises on purpose."""


class RecipeError(KvloomError):
    """A recipe's name, option, value or composition is wrong."""


class ModelError(KvloomError):
    """A model (or one of its layers) cannot be served this way."""


class CacheError(KvloomError):
    """A cache is used in a way that it cannot follow."""


class LabError(KvloomError):
    """A task, a suite, a data set or a file of results cannot be used."""


class ProfileError(KvloomError):
    """A profile is damaged or belongs to another model."""


class RequestError(KvloomError):
    """A request that the engine cannot serve."""


class Full(RequestError):
    """Too many requests wait; the same one can be served later."""


class StoreError(KvloomError):
    """A store's address, or what is put into it, cannot be used."""


class DamagedFrame(StoreError):
    """Stored bytes are not what was written, or nothing that this version writes."""


class TierError(StoreError):
    """A tier cannot serve now: it is down, slow or full."""


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """One sentence for a name that does not exist: the nearest match, then all that do."""
    options = sorted(valid)
    near = get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Available: {', '.join(options) or 'none'}."

"""Tiers by address, and the folder that is used where none is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvloom.errors import StoreError, unknown
from kvloom.store.evict import Quotas
from kvloom.store.files import FileTier
from kvloom.store.memory import MemoryTier
from kvloom.store.objects import STORES, ObjectTier
from kvloom.store.redis import RedisTier
from kvloom.store.tier import Address, Tier

__all__ = ["cache_folder", "open_tier"]


def cache_folder() -> Path:
    """The folder of the user's caches for kvloom, where this system keeps such things."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "kvloom" / "store"


def open_tier(url: str, quotas: Quotas | None = None) -> Tier:
    """The tier at memory://, file://, redis://, rediss://, s3://, gs:// or az://. Raises StoreError."""
    address = Address.parse(url)
    if address.scheme == "memory":
        return MemoryTier.open(address, quotas)
    if address.scheme == "file":
        return FileTier.open(address, quotas)
    if address.scheme in ("redis", "rediss"):
        return RedisTier.open(address)
    if address.scheme in STORES:
        return ObjectTier.open(address)
    raise StoreError(
        f"{address.shown}: {unknown('kind of tier', address.scheme, ['memory', 'file', 'redis', 'rediss', *STORES])}"
    )

"""One chunk stored in several ways: the key of each, and what is put and got under it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvloom.store import cachegen
from kvloom.store.coding import BEST, CODINGS
from kvloom.store.frame import Place
from kvloom.store.identity import ChunkKey

__all__ = ["key_of", "opened", "stored"]


def key_of(key: ChunkKey, coding: str) -> ChunkKey:
    """The key under which a chunk in this coding is found: its own one if the coding is exact. Raises StoreError."""
    return key if coding in (*CODINGS, BEST) else key.at(cachegen.parse(coding).text)


def stored(
    key: ChunkKey, tensors: Mapping[Place, Tensor], coding: str, notes: Mapping[str, Any]
) -> tuple[ChunkKey, Mapping[Place, Tensor], str, Mapping[str, Any]]:
    """Key, tensors, coding of the pages and notes that a chunk is put with. Raises StoreError."""
    if coding in (*CODINGS, BEST):
        return key, tensors, coding, notes
    codec = cachegen.parse(coding)
    tensors, facts = codec.encode(tensors)
    return key.at(codec.text), tensors, BEST, {**notes, **facts}


def opened(
    tensors: dict[Place, Tensor], coding: str, into: Mapping[Place, Tensor] | None = None
) -> dict[Place, Tensor]:
    """What was put in, less the coding's error. Raises DamagedFrame for what was never put."""
    if coding in (*CODINGS, BEST):
        return tensors
    out = cachegen.parse(coding).decode(tensors)
    for place, target in (into or {}).items():
        if place in out:
            out[place] = target.copy_(out[place])
    return out

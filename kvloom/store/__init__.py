"""Keys and values of texts, kept across requests and processes, that come back exact or not at all (docs/store.md)."""

from kvloom.store.frame import Frame, Place, pack
from kvloom.store.identity import ChunkKey, Identity, chunk_keys
from kvloom.store.pipeline import Agent, Document
from kvloom.store.session import Attached, Reply, Report, Session, attach
from kvloom.store.store import Store

__all__ = [
    "Agent", "Attached", "ChunkKey", "Document", "Frame", "Identity", "Place", "Reply", "Report", "Session", "Store",
    "attach", "chunk_keys", "pack",
]  # fmt: skip

"""Which chunks of a text this process has seen behind which: finds the one that shares most tokens with a text.

It only spares a look at tiers and finds beginnings of chunks. Nothing depends on it: what it names is read and verified like
everything else, and what it does not know is looked for by key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from kvloom.store.identity import ChunkKey

__all__ = ["Radix"]

BRANCHES = 64  # chunks remembered behind one other chunk
MOST = 1 << 16  # chunks that have others behind them


class Radix:
    """A tree: identity and context -> the chunks that followed. The least recently used leave when it is full."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._lock = Lock()
        self._tree: OrderedDict[tuple[str, str], OrderedDict[str, ChunkKey]] = OrderedDict()

    def add(self, key: ChunkKey) -> None:
        """Remembers a chunk that was stored or read."""
        with self._lock:
            branch = self._tree.setdefault((key.identity, key.context), OrderedDict())
            self._tree.move_to_end((key.identity, key.context))
            branch[key.digest] = key
            branch.move_to_end(key.digest)
            if len(branch) > BRANCHES:
                branch.popitem(last=False)
            if len(self._tree) > self.most:
                self._tree.popitem(last=False)

    def forget(self, key: ChunkKey) -> None:
        """A chunk that no tier has any more."""
        with self._lock:
            branch = self._tree.get((key.identity, key.context))
            if branch is not None:
                branch.pop(key.digest, None)

    def longest(self, identity: str, context: str, tokens: Sequence[int]) -> tuple[ChunkKey, int] | None:
        """The chunk behind `context` that begins with most of `tokens`, and how many; None if none shares the first."""
        with self._lock:
            keys = list(self._tree.get((identity, context), {}).values())
        best = max(((common(key.tokens, tokens), -i) for i, key in enumerate(keys)), default=(0, 0))
        return (keys[-best[1]], best[0]) if best[0] else None


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first entries agree."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n

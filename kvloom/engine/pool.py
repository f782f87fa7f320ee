"""Who holds which bytes of the memory that caches were given. What several hold is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

__all__ = ["Pool"]

Storage = tuple[int, int, str]  # address, bytes, kind


class Pool:
    """`limit` bytes. `used`: of all storages that holders have reported; `promised`: what else they may come to hold."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.promised = limit, 0, 0
        self._held: dict[Hashable, set[Storage]] = {}
        self._holders: Counter[Storage] = Counter()
        self._promises: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        """Bytes that nobody holds or was promised; below zero if more was taken than promised."""
        return self.limit - self.used - self.promised

    def hold(self, holder: Hashable, storages: Iterable[Storage], promise: int = 0) -> None:
        """What a holder has now, and how much more it may take until it reports again."""
        new, old = set(storages), self._held.get(holder, set())
        for storage in new - old:
            self._holders[storage] += 1
            if self._holders[storage] == 1:
                self.used += storage[1]
        for storage in old - new:
            self._holders[storage] -= 1
            if not self._holders[storage]:
                del self._holders[storage]
                self.used -= storage[1]
        self._held[holder] = new
        self.promise(holder, promise)

    def promise(self, holder: Hashable, nbytes: int) -> None:
        """How much more a holder may take from now on."""
        self.promised += nbytes - self._promises.get(holder, 0)
        self._promises[holder] = nbytes

    def promise_of(self, holder: Hashable) -> int:
        """What a holder may still take."""
        return self._promises.get(holder, 0)

    def drop(self, holder: Hashable) -> int:
        """A holder that has nothing any more. Returns the bytes that only it held or was promised."""
        before = self.free
        self.hold(holder, ())
        del self._held[holder], self._promises[holder]
        return self.free - before

    def alone(self, holder: Hashable) -> set[int]:
        """Addresses of the storages that only this holder has."""
        return {storage[0] for storage in self._held.get(holder, ()) if self._holders[storage] == 1}

    @property
    def holders(self) -> int:
        """How many hold something or were promised it."""
        return len(self._held)

    def kinds(self) -> dict[str, int]:
        """Bytes by kind of what is stored."""
        found: Counter[str] = Counter()
        for _, nbytes, kind in self._holders:
            found[kind or "state"] += nbytes
        return dict(found)

"""Chunks in this process's memory: memory://?max=4GiB&evict=lru"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Lock

from kvloom.store.evict import LRU, Policy, Quotas, Usage, policy_of, victims
from kvloom.store.frame import Buffer
from kvloom.store.tier import Address, Deadline, Facts, Tier, TierFull, TierStat, check_key

__all__ = ["MemoryTier"]


class MemoryTier(Tier):
    """A dictionary under a cap. What it gives are read-only views of bytes that never change."""

    quick = True

    def __init__(
        self,
        max: int = 1 << 30,
        policy: Policy | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.max, self.clock = "memory://", max, clock
        self.policy, self.quotas = policy or LRU(), quotas or Quotas()
        self._lock = Lock()
        self._data: dict[str, Buffer] = {}
        self._usage: dict[str, Usage] = {}
        self._leases: dict[str, dict[str, float]] = {}  # chunk -> lease -> until
        self._nbytes = 0

    @classmethod
    def open(cls, address: Address, quotas: Quotas | None = None) -> MemoryTier:
        address.only("max", "evict")
        policy = policy_of(address.options.get("evict", "lru"))
        return cls(address.max(1 << 30) or 0, policy, quotas)

    def get(self, key: str, start: int, stop: int, deadline: Deadline) -> Buffer | None:
        with self._lock:
            data = self._data.get(check_key(key))
            if data is None:
                return None
            self.policy.touch(self._usage[key], self.clock())
        return memoryview(data).toreadonly()[start:stop]

    def put(self, key: str, data: Buffer, facts: Facts, deadline: Deadline) -> bool:
        check_key(key)
        with self._lock:
            if key in self._data:
                return False
            now = self.clock()
            nbytes = len(data)
            fits = self._nbytes + nbytes <= self.max and self.quotas.get(facts.tenant) is None
            gone = (
                [] if fits else victims(self._now(now), nbytes, facts.tenant, self.max, self.policy, now, self.quotas)
            )
            if gone is None:
                raise TierFull(f"{self.name}: no room for {nbytes} bytes under max={self.max} and the tenant's quota.")
            for victim in gone:
                self._remove(victim)
            # read-only memory is taken at its word, as `get` gives it to others
            self._data[key] = data if isinstance(data, bytes) or memoryview(data).readonly else bytes(data)
            self._usage[key] = Usage(key, nbytes, facts, now)
            self._nbytes += nbytes
        return True

    def _now(self, now: float) -> list[Usage]:
        """All usages, with the leases that still hold."""
        for key, leases in list(self._leases.items()):
            left = {lease: until for lease, until in leases.items() if until > now}
            if left:
                self._leases[key] = left
            else:
                del self._leases[key]
            self._usage[key].pinned = max(left.values(), default=now)
        return list(self._usage.values())

    def _remove(self, key: str) -> bool:
        data = self._data.pop(key, None)
        if data is None:
            return False
        del self._usage[key]
        self._leases.pop(key, None)
        self._nbytes -= len(data)
        return True

    def size(self, key: str, deadline: Deadline) -> int | None:
        with self._lock:
            data = self._data.get(check_key(key))
        return None if data is None else len(data)

    def delete(self, key: str, deadline: Deadline) -> bool:
        with self._lock:
            return self._remove(check_key(key))

    def keys(self, deadline: Deadline) -> Iterator[str]:
        with self._lock:
            return iter(list(self._data))

    def stat(self, deadline: Deadline) -> TierStat:
        with self._lock:
            return TierStat(len(self._data), self._nbytes, self.max)

    def pin(self, key: str, lease: str, seconds: float, deadline: Deadline) -> bool:
        with self._lock:
            if check_key(key) not in self._data:
                return False
            self._leases.setdefault(key, {})[lease] = self.clock() + seconds
        return True

    def unpin(self, lease: str, deadline: Deadline) -> None:
        with self._lock:
            for leases in self._leases.values():
                leases.pop(lease, None)

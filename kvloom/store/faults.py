"""A tier that fails on purpose, by a seed: for tests of stores, here and in other people's projects."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from threading import Event, Lock

from kvloom.errors import StoreError, TierError, unknown
from kvloom.store.frame import Buffer
from kvloom.store.tier import Deadline, Facts, Tier, TierFull, TierStat

__all__ = ["FAULTS", "FaultyTier", "damage"]

FAULTS = {
    "drop": "a put that is lost, a get that finds nothing",
    "delay": "an answer after `delay` seconds",
    "tear": "only the first half, with zeros in the place of the rest",
    "flip": "one bit changed",
    "zero": "a page of 4096 bytes zeroed",
    "truncate": "the end missing",
    "append": "more bytes than there should be",
    "stale": "the front of the chunk that was put before this one",
    "wrong": "the chunk that was put before this one, whole",
    "version": "another version of the format",
    "full": "a put that finds no room",
    "cut": "a connection that breaks",
}


def damage(data: bytes, fault: str, rng: random.Random, other: bytes = b"") -> bytes:
    """The bytes after a fault; the same bytes where it does not apply."""
    out = bytearray(data)
    if not out:
        return data
    at = rng.randrange(len(out))
    if fault == "flip":
        out[at] ^= 1 << rng.randrange(8)
    elif fault == "zero":
        page = at // 4096 * 4096
        out[page : page + 4096] = bytes(len(out[page : page + 4096]))
    elif fault == "tear":
        out[len(out) // 2 :] = bytes(len(out) - len(out) // 2)
    elif fault == "truncate":
        del out[at:]
    elif fault == "append":
        out += rng.randbytes(1 + at % 64)
    elif fault == "stale" and other:
        half = min(len(out), len(other)) // 2
        out[:half] = other[:half]
    elif fault == "wrong" and other:
        return other
    elif fault == "version" and len(out) > 8:
        out[8] ^= 1 + rng.randrange(255)
    return bytes(out)


class FaultyTier(Tier):
    """Another tier with faults: each call suffers one of `faults`, drawn at random, with probability `rate`.

    `on`: whether what is read, what is written, or both suffer. `happened` counts the faults by name. Bytes that were
    damaged when written stay damaged.
    """

    def __init__(
        self,
        inner: Tier,
        faults: Sequence[str] = tuple(FAULTS),
        *,
        seed: int = 0,
        rate: float = 1.0,
        on: str = "get",
        delay: float = 0.05,
    ) -> None:
        for fault in faults:
            if fault not in FAULTS:
                raise StoreError(unknown("fault", fault, FAULTS))
        if on not in ("get", "put", "both"):
            raise StoreError(unknown("side", on, ["get", "put", "both"]))
        self.inner, self.faults, self.rate, self.on, self.delay = inner, list(faults), rate, on, delay
        self.name = f"faulty {inner.name}"
        self.happened: dict[str, int] = {}
        self._rng, self._lock, self._calm = random.Random(seed), Lock(), Event()
        self._last: tuple[str, bytes] = ("", b"")
        self._before = b""

    def calm(self) -> None:
        """Ends the faults, and the delays that are being waited for."""
        self.rate = 0.0
        self._calm.set()

    def _draw(self, side: str) -> str:
        with self._lock:
            if not self.faults or self.on not in (side, "both") or self._rng.random() >= self.rate:
                return ""
            return self._rng.choice(self.faults)

    def _count(self, fault: str) -> None:
        with self._lock:
            self.happened[fault] = self.happened.get(fault, 0) + 1

    def _suffer(self, fault: str, deadline: Deadline) -> None:
        if fault == "delay":
            self._count(fault)
            self._calm.wait(self.delay)
        elif fault == "cut":
            self._count(fault)
            raise TierError(f"{self.name}: connection cut")

    def _damaged(self, data: bytes, fault: str, other: bytes) -> bytes:
        with self._lock:
            out = damage(data, fault, self._rng, other)
        if out != data:
            self._count(fault)
        return out

    def get(self, key: str, start: int, stop: int, deadline: Deadline) -> Buffer | None:
        fault = self._draw("get")
        self._suffer(fault, deadline)
        data = self.inner.get(key, start, stop, deadline)
        if data is None:
            return None
        if fault == "drop":
            self._count(fault)
            return None
        other = self._before if self._last[0] == key else self._last[1]
        out = self._damaged(bytes(data), fault, other[start:stop])
        # a range is never answered with more than was asked for: no client would take it
        return out[: stop - start]

    def put(self, key: str, data: Buffer, facts: Facts, deadline: Deadline) -> bool:
        fault, whole = self._draw("put"), bytes(data)
        self._suffer(fault, deadline)
        if fault == "full":
            self._count(fault)
            raise TierFull(f"{self.name}: no room")
        other = self._last[1]
        if self._last[0] != key:
            self._before, self._last = other, (key, whole)
        if fault == "drop":
            self._count(fault)
            return True
        return self.inner.put(key, self._damaged(whole, fault, other), facts, deadline)

    def size(self, key: str, deadline: Deadline) -> int | None:
        return self.inner.size(key, deadline)

    def delete(self, key: str, deadline: Deadline) -> bool:
        return self.inner.delete(key, deadline)

    def keys(self, deadline: Deadline) -> Iterator[str]:
        return self.inner.keys(deadline)

    def stat(self, deadline: Deadline) -> TierStat:
        return self.inner.stat(deadline)

    def pin(self, key: str, lease: str, seconds: float, deadline: Deadline) -> bool:
        return self.inner.pin(key, lease, seconds, deadline)

    def unpin(self, lease: str, deadline: Deadline) -> None:
        self.inner.unpin(lease, deadline)

    def close(self) -> None:
        self.inner.close()

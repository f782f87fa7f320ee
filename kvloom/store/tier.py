"""A tier: a place that keeps bytes under a digest. What every kind of it promises, and the addresses they have."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from kvloom.errors import StoreError, TierError, unknown
from kvloom.store.frame import Buffer
from kvloom.store.stream import Sink

__all__ = ["Address", "Deadline", "Facts", "Tier", "TierFull", "TierStat", "TierTimeout", "check_key", "size_of"]

_DIGEST = re.compile("[0-9a-f]{64}")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class TierTimeout(TierError):
    """A call took longer than its deadline."""


class TierFull(TierError):
    """There is no room, and nothing that may go."""


class Deadline:
    """The moment by which a call has to be over."""

    __slots__ = ("at", "clock")

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.at = clock, clock() + seconds

    def left(self) -> float:
        return max(0.0, self.at - self.clock())

    def check(self, what: str) -> None:
        if self.left() <= 0:
            raise TierTimeout(f"{what}: out of time.")


@dataclass(frozen=True)
class Facts:
    """What eviction knows of a chunk: whose it is, the seconds that computing it took, its first place in the text."""

    tenant: str = ""
    seconds: float = 0.0
    start: int = 0


@dataclass(frozen=True)
class TierStat:
    """Chunks and bytes held, and the most bytes that may be (None: no cap)."""

    count: int
    nbytes: int
    max: int | None


class Tier:
    """Keeps bytes under keys of 64 hex digits. Every call ends by its deadline, or raises TierTimeout as soon as it can.

    A chunk is there as a whole or not at all, and never changes: `put` does not replace. Other failures raise TierError.
    """

    name: str = "tier"
    quick: bool = False  # never waits for anything: may be called from the thread that generates

    def get(self, key: str, start: int, stop: int, deadline: Deadline) -> Buffer | None:
        """Bytes [start, stop) of a chunk, or as many of them as it has; None without it. Counts as a use.

        Memory that can be written to belongs to the caller; what the tier keeps is given read-only.
        """
        raise NotImplementedError

    def read_into(self, key: str, start: int, sink: Sink, deadline: Deadline) -> int | None:
        """Fills a sink with the bytes from `start` on. Where the chunk ends, as far as is known; None without it."""
        stop = start + sink.nbytes
        data = self.get(key, start, stop + 1, deadline)  # one more, to see whether there is one
        if data is None:
            return None
        view, at = memoryview(data), 0
        while (room := sink.next()) is not None and at + len(room) <= len(view):
            with sink.permit:
                room[:] = view[at : at + len(room)]
                sink.done(len(room))
            at += len(room)
        return start + len(view)

    def put(self, key: str, data: Buffer, facts: Facts, deadline: Deadline) -> bool:
        """Stores a chunk; False if there is one already. TierFull if nothing may go for it. Read-only memory may be kept."""
        raise NotImplementedError

    def size(self, key: str, deadline: Deadline) -> int | None:
        """Bytes of a chunk; None without it."""
        raise NotImplementedError

    def delete(self, key: str, deadline: Deadline) -> bool:
        """Removes a chunk, pinned or not; False without it."""
        raise NotImplementedError

    def keys(self, deadline: Deadline) -> Iterator[str]:
        """The chunks held, in no order."""
        raise NotImplementedError

    def stat(self, deadline: Deadline) -> TierStat:
        raise NotImplementedError

    def pin(self, key: str, lease: str, seconds: float, deadline: Deadline) -> bool:
        """Keeps a chunk from eviction for some time; False without it or where eviction isn't ours."""
        return False

    def unpin(self, lease: str, deadline: Deadline) -> None:
        """Ends a lease."""

    def close(self) -> None:
        """Frees what the tier holds open. Chunks on disk and in other processes stay."""


def check_key(key: str) -> str:
    """Keys become names of files and objects: nothing but digests passes."""
    if not isinstance(key, str) or not _DIGEST.fullmatch(key):
        raise StoreError(f"key={key!r} is no digest of 64 hex digits.")
    return key


def size_of(text: str) -> int:
    """Bytes that "50GiB", "4e9" or "500 MB" mean. Raises StoreError."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    try:
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError
        size = int(float(match[1]) * _UNITS[match[2].upper()])
        if size < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise StoreError(f"max={text!r} is no size in bytes; write it as in 50GiB, 500MB or 4096.") from None
    return size


@dataclass(frozen=True)
class Address:
    """A tier's address: scheme://host/path?option=value. `shown`: the address without a password."""

    scheme: str
    host: str
    path: str
    options: dict[str, str]
    shown: str
    full: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises StoreError for what is no address."""
        parts = urlsplit(url)
        if not parts.scheme or "://" not in url:
            raise StoreError(f"{url!r} is no address of a tier; write it as in file:///folder?max=50GiB.")
        try:
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:
            raise StoreError(
                f"the options {parts.query!r} cannot be read; write them as in ?max=50GiB&timeout=2."
            ) from None
        host = parts.netloc.rpartition("@")[2]
        shown = f"{parts.scheme}://{host}{parts.path}"
        full = f"{parts.scheme}://{parts.netloc}{parts.path}"
        return cls(parts.scheme, host, unquote(parts.path), options, shown, full)

    def only(self, *names: str) -> None:
        """Raises StoreError for an option that the scheme does not have."""
        for name in self.options:
            if name not in names:
                raise StoreError(f"{self.shown}: {unknown('option', name, names)}")

    def max(self, default: int | None = None) -> int | None:
        return size_of(self.options["max"]) if "max" in self.options else default

    def timeout(self, default: float = 5.0) -> float:
        text = self.options.get("timeout", str(default))
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < 3600:
            raise StoreError(f"{self.shown}: timeout={text!r} is no number of seconds between 0 and 3600.")
        return value

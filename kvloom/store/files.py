"""Chunks as files of one folder, with their sizes and uses in SQLite: file:///folder?max=50GiB&evict=lru

Processes may share the folder. Files appear (rename) and go inside a transaction on the index, so the index and the folder
agree whenever nobody is inside one, and after a crash they differ at most by what the crashed writer had begun.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock, local

from kvloom.errors import StoreError, TierError
from kvloom.store.evict import LRU, Policy, Quotas, Usage, policy_of, victims
from kvloom.store.frame import Buffer, aligned
from kvloom.store.stream import PIECE, Sink
from kvloom.store.tier import Address, Deadline, Facts, Tier, TierFull, TierStat, TierTimeout, check_key

__all__ = ["FileTier"]

log = logging.getLogger("kvloom.store")
SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (key TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, last REAL NOT NULL, heat REAL NOT NULL,
    tenant TEXT NOT NULL, seconds REAL NOT NULL, start INTEGER NOT NULL, writer TEXT, expires REAL);
CREATE TABLE IF NOT EXISTS lease (key TEXT NOT NULL, id TEXT NOT NULL, until REAL NOT NULL, PRIMARY KEY (key, id));
"""
STRETCH = 8 << 20  # bytes written or read between two looks at the clock
GRACE = 60.0  # seconds that a writer may be late before its unfinished file is taken for left over
TOUCHES = 64  # uses that are remembered before they are written to the index


def _at_hand(file: int, room: memoryview, at: int) -> int:
    """Reads what needs no waiting; -1 if that is nothing, or the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return -1
    try:
        return os.preadv(file, [room], at, os.RWF_NOWAIT)
    except (BlockingIOError, OSError):
        return -1


class FileTier(Tier):
    """`max` holds over all files of the folder, unfinished ones included, whoever writes and however often it restarts."""

    def __init__(
        self,
        folder: Path | str,
        max: int | None = None,
        policy: Policy | None = None,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Creates the folder, or takes over what is in it. Raises StoreError if that cannot be."""
        self.folder, self.max, self.clock = Path(folder).absolute(), max, clock
        self.name = f"file://{self.folder}"
        self.policy, self.quotas = policy or LRU(), quotas or Quotas()
        self._local, self._lock = local(), Lock()
        self._open: list[sqlite3.Connection] = []
        self._touched: dict[str, float] = {}
        deadline = Deadline(30.0)
        try:
            for path in (self.folder, self.folder / "chunks", self.folder / "partial"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._adopt(deadline)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._forget_index()
                self._adopt(deadline)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"{self.name} cannot be used: {error}. Name a folder of your own that can be written."
            ) from error

    @classmethod
    def open(cls, address: Address, quotas: Quotas | None = None) -> FileTier:
        address.only("max", "evict")
        if address.host or not address.path.startswith("/"):
            raise StoreError(f"{address.shown}: give an absolute folder, as in file:///var/cache/kvloom?max=50GiB.")
        return cls(address.path, address.max(), policy_of(address.options.get("evict", "lru")), quotas)

    def _path(self, key: str) -> Path:
        return self.folder / "chunks" / check_key(key)[:2] / f"{key}.kvloom"

    def _index(self, deadline: Deadline) -> sqlite3.Connection:
        """This thread's connection."""
        index: sqlite3.Connection | None = getattr(self._local, "index", None)
        if index is None:
            path = self.folder / "index.sqlite"
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            index = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._local.index = index
            with self._lock:
                self._open.append(index)
            self._wait(index, deadline)
            index.execute("PRAGMA journal_mode=WAL")
            index.execute("PRAGMA synchronous=NORMAL")
            index.executescript(SCHEMA)
        self._wait(index, deadline)
        return index

    @staticmethod
    def _wait(index: sqlite3.Connection, deadline: Deadline) -> None:
        index.execute(f"PRAGMA busy_timeout={int(deadline.left() * 1000)}")

    def _forget_index(self) -> None:
        """Sets a damaged index aside; the folder tells what is in it."""
        self.close()
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.folder / f"index.sqlite{end}", self.folder / f"damaged.sqlite{end}")

    @contextlib.contextmanager
    def _change(self, deadline: Deadline) -> Iterator[sqlite3.Connection]:
        """A transaction that keeps other writers out. Turns what disks and SQLite raise into TierErrors."""
        with self._errors():
            index = self._index(deadline)
            index.execute("BEGIN IMMEDIATE")
            try:
                yield index
            except BaseException:
                index.execute("ROLLBACK")
                raise
            index.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            kind = TierTimeout if "locked" in str(error) else TierError
            kind = TierFull if "full" in str(error) else kind
            raise kind(f"{self.name}: {error}") from error
        except (OSError, sqlite3.Error) as error:
            # a full disk can still be read from: it does not count as a failure of the tier
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (TierFull if full else TierError)(f"{self.name}: {error}") from error

    def _adopt(self, deadline: Deadline) -> None:
        """Makes index and folder agree: files without a row get one, rows without a file and what crashes left go."""
        index = self._index(deadline)
        index.execute("BEGIN IMMEDIATE")
        self._sweep(index)
        rows = dict(index.execute("SELECT key, writer FROM chunk").fetchall())
        found = {}
        for path in (self.folder / "chunks").glob("??/*.kvloom"):
            found[path.stem] = path.stat()
        for key, stat in found.items():
            if key not in rows:
                row = (key, stat.st_size, stat.st_mtime, 1.0, "", 0.0, 0, None, None)
                index.execute("INSERT INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        lost = [(key,) for key, writer in rows.items() if writer is None and key not in found]
        index.executemany("DELETE FROM chunk WHERE key = ?", lost)
        writers = {writer for writer in rows.values() if writer}
        for path in (self.folder / "partial").iterdir():
            if path.name not in writers:
                path.unlink()
        index.execute("COMMIT")

    def _sweep(self, index: sqlite3.Connection) -> None:
        """Removes what writers left unfinished."""
        late = "SELECT key, writer FROM chunk WHERE writer IS NOT NULL AND expires < ?"
        for key, writer in index.execute(late, (self.clock(),)).fetchall():
            (self.folder / "partial" / writer).unlink(missing_ok=True)
            self._path(key).unlink(missing_ok=True)
            index.execute("DELETE FROM chunk WHERE key = ?", (key,))
            log.warning("%s: chunk %s was never finished by its writer; removed", self.name, key)

    def get(self, key: str, start: int, stop: int, deadline: Deadline) -> Buffer | None:
        with self._errors():
            try:
                file = open(self._path(key), "rb", buffering=0)  # noqa: SIM115
            except FileNotFoundError:
                return None
            with file:
                size = max(0, min(stop, os.fstat(file.fileno()).st_size) - start)
                data = view = aligned(size)
                at = 0
                file.seek(start)
                while at < size:
                    deadline.check(self.name)
                    n = file.readinto(view[at : at + STRETCH])
                    if not n:
                        break
                    at += n
        self._touch(key, deadline)
        return data if at == size else data[:at]

    def read_into(self, key: str, start: int, sink: Sink, deadline: Deadline) -> int | None:
        """What the system has in memory is copied once. What it has not is waited for without the sink's permit."""
        if not hasattr(os, "preadv"):
            return super().read_into(key, start, sink, deadline)
        with self._errors():
            try:
                file = os.open(self._path(key), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except FileNotFoundError:
                return None
            try:
                at, scratch, end = start, None, os.fstat(file).st_size
                last = start + sink.nbytes - 1
                if hasattr(os, "posix_fadvise") and _at_hand(file, memoryview(bytearray(1)), last) < 0:
                    # not in memory as a whole: all of it is asked for, and comes while the first pieces are verified
                    os.posix_fadvise(file, start, sink.nbytes, os.POSIX_FADV_WILLNEED)
                while (room := sink.next()) is not None:
                    deadline.check(self.name)
                    with sink.permit:
                        n = _at_hand(file, room, at)
                        if n > 0:
                            sink.done(n)
                    if n < 0:
                        scratch = scratch or aligned(PIECE)
                        n = os.preadv(file, [scratch[: len(room)]], at)
                        with sink.permit:
                            room[:n] = scratch[:n]
                            if n:
                                sink.done(n)
                    if not n:
                        break
                    at += n
            finally:
                os.close(file)
        self._touch(key, deadline)
        return end

    def _touch(self, key: str, deadline: Deadline) -> None:
        with self._lock:
            self._touched[key] = self.clock()
            full = len(self._touched) >= TOUCHES
        if full:
            with contextlib.suppress(TierError), self._change(deadline) as index:
                self._write_touches(index)

    def _write_touches(self, index: sqlite3.Connection) -> None:
        with self._lock:
            touched, self._touched = self._touched, {}
        for key, at in touched.items():
            for usage in self._usages(index, "WHERE key = ?", (key,)):
                self.policy.touch(usage, at)
                index.execute("UPDATE chunk SET last = ?, heat = ? WHERE key = ?", (usage.last, usage.heat, key))

    def _usages(self, index: sqlite3.Connection, where: str = "", values: tuple[str, ...] = ()) -> list[Usage]:
        now = self.clock()
        index.execute("DELETE FROM lease WHERE until <= ?", (now,))
        until = "MAX(COALESCE((SELECT MAX(until) FROM lease WHERE lease.key = chunk.key), 0), COALESCE(expires, 0))"
        rows = index.execute(
            f"SELECT key, nbytes, tenant, seconds, start, last, heat, {until} FROM chunk {where}", values
        )
        return [Usage(key, n, Facts(*facts), last, heat, pinned) for key, n, *facts, last, heat, pinned in rows]

    def put(self, key: str, data: Buffer, facts: Facts, deadline: Deadline) -> bool:
        path, writer, nbytes = self._path(key), uuid.uuid4().hex, len(data)
        if not self._reserve(key, writer, nbytes, facts, deadline):
            return False
        partial = self.folder / "partial" / writer
        try:
            with self._errors():
                descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                with open(descriptor, "wb", buffering=0) as file:
                    view, at = memoryview(data), 0
                    while at < nbytes:
                        deadline.check(self.name)
                        at += file.write(view[at : at + STRETCH])
                    os.fsync(file.fileno())
                path.parent.mkdir(mode=0o700, exist_ok=True)
            with self._change(deadline) as index:
                done = "UPDATE chunk SET writer = NULL, expires = NULL WHERE key = ? AND writer = ?"
                if index.execute(done, (key, writer)).rowcount != 1:
                    raise TierTimeout(f"{self.name}: the room for a chunk was given away, its writer was too slow.")
                os.replace(partial, path)
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except BaseException:
            partial.unlink(missing_ok=True)
            with contextlib.suppress(TierError), self._change(Deadline(1.0)) as index:
                index.execute("DELETE FROM chunk WHERE key = ? AND writer = ?", (key, writer))
            raise
        return True

    def _reserve(self, key: str, writer: str, nbytes: int, facts: Facts, deadline: Deadline) -> bool:
        """Makes room and takes it; False if the chunk is there or being written."""
        with self._change(deadline) as index:
            self._sweep(index)
            self._write_touches(index)
            known = index.execute("SELECT writer FROM chunk WHERE key = ?", (key,)).fetchone()
            if known is not None and (known[0] is not None or self._path(key).exists()):
                return False
            index.execute("DELETE FROM chunk WHERE key = ?", (key,))
            now = self.clock()
            gone: list[str] | None = []
            if self.max is not None or self.quotas.get(facts.tenant) is not None:
                usages = self._usages(index)
                gone = victims(usages, nbytes, facts.tenant, self.max, self.policy, now, self.quotas)
            if gone is None:
                raise TierFull(f"{self.name}: no room for {nbytes} bytes under max={self.max} and the tenant's quota.")
            for victim in gone:
                self._path(victim).unlink(missing_ok=True)
                index.execute("DELETE FROM chunk WHERE key = ?", (victim,))
            expires = now + deadline.left() + GRACE
            row = (key, nbytes, now, 1.0, facts.tenant, facts.seconds, facts.start, writer, expires)
            index.execute("INSERT INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        return True

    def size(self, key: str, deadline: Deadline) -> int | None:
        with self._errors():
            try:
                return self._path(key).stat().st_size
            except FileNotFoundError:
                return None

    def delete(self, key: str, deadline: Deadline) -> bool:
        path = self._path(key)
        with self._change(deadline) as index:
            there = path.exists()
            path.unlink(missing_ok=True)
            index.execute("DELETE FROM chunk WHERE key = ? AND writer IS NULL", (key,))
            index.execute("DELETE FROM lease WHERE key = ?", (key,))
        return there

    def keys(self, deadline: Deadline) -> Iterator[str]:
        with self._errors():
            rows = self._index(deadline).execute("SELECT key FROM chunk WHERE writer IS NULL").fetchall()
        return iter([key for (key,) in rows])

    def stat(self, deadline: Deadline) -> TierStat:
        with self._errors():
            count, nbytes = self._index(deadline).execute("SELECT COUNT(*), SUM(nbytes) FROM chunk").fetchone()
        return TierStat(count, nbytes or 0, self.max)

    def pin(self, key: str, lease: str, seconds: float, deadline: Deadline) -> bool:
        with self._change(deadline) as index:
            if not self._path(key).exists():
                return False
            index.execute("INSERT OR REPLACE INTO lease VALUES (?, ?, ?)", (key, lease, self.clock() + seconds))
        return True

    def unpin(self, lease: str, deadline: Deadline) -> None:
        with self._change(deadline) as index:
            index.execute("DELETE FROM lease WHERE id = ?", (lease,))

    def close(self) -> None:
        if self._touched and hasattr(self._local, "index"):
            with contextlib.suppress(TierError), self._change(Deadline(1.0)) as index:
                self._write_touches(index)
        with self._lock:
            for index in self._open:
                index.close()
            self._open.clear()
        self._local = local()

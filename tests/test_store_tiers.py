"""Tiers: what each kind promises; caps across restarts and processes; crashes; eviction; addresses."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvloom.errors import StoreError, TierError
from kvloom.store.evict import LFU, LRU, Cost, Quotas, Usage, victims
from kvloom.store.files import FileTier
from kvloom.store.identity import digest_of
from kvloom.store.memory import MemoryTier
from kvloom.store.objects import ObjectTier
from kvloom.store.redis import RedisTier
from kvloom.store.store import cache_folder, open_tier
from kvloom.store.tier import Address, Deadline, Facts, Tier, TierFull, size_of
from tests.servers import moto, real_redis  # noqa: F401

KINDS = ["memory", "file", "redis", "redis-server", "objects", "s3"]
NOW = Deadline(1e6)  # later than any test


def key(n: int) -> str:
    return digest_of("test", n)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def fake_redis() -> Iterator[str]:
    """A server in this process that speaks Redis's protocol over TCP."""
    fakeredis = pytest.importorskip("fakeredis")
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    server.shutdown()
    server.server_close()


Make = Callable[..., Tier]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Opens an empty tier of each kind, with a cap if one is given; again: the same tier."""
    kind = request.param
    if kind == "memory":
        return lambda max=1 << 20: MemoryTier(max)
    if kind == "file":
        return lambda max=1 << 20: FileTier(tmp_path, max)
    if kind in ("redis", "redis-server"):
        import redis

        url = request.getfixturevalue("fake_redis" if kind == "redis" else "real_redis")
        prefix = f"kvloom-{uuid.uuid4().hex}:"
        return lambda max=None: RedisTier(redis.Redis.from_url(url, socket_timeout=5, protocol=2), url, max, prefix)
    import obstore.store

    if kind == "objects":
        memory = obstore.store.MemoryStore()
        return lambda max=None: ObjectTier(memory, "objects", max)
    endpoint, folder = request.getfixturevalue("moto"), uuid.uuid4().hex
    return lambda max=None: open_tier(
        f"s3://test/{folder}?endpoint={endpoint}&region=us-east-1" + (f"&max={max}" if max else "")
    )


def test_a_tier_keeps_its_promises(make: Make) -> None:
    tier = make()
    assert tier.get(key(0), 0, 100, NOW) is None and tier.size(key(0), NOW) is None and not tier.delete(key(0), NOW)
    assert tier.put(key(0), b"0123456789", Facts(), NOW)
    assert not tier.put(key(0), b"other", Facts(), NOW)  # what is there stays
    assert tier.put(key(1), memoryview(bytearray(b"abc")), Facts("tenant", 1.5, 256), NOW)
    for start, stop, want in ((0, 100, b"0123456789"), (3, 5, b"34"), (8, 1000, b"89"), (0, 1 << 31, b"0123456789")):
        data = tier.get(key(0), start, stop, NOW)
        assert data is not None and bytes(data) == want
    assert tier.size(key(0), NOW) == 10 and set(tier.keys(NOW)) == {key(0), key(1)}
    held = tier.stat(NOW)
    assert (held.count, held.nbytes) == (2, 13)
    assert tier.delete(key(0), NOW) and tier.get(key(0), 0, 1, NOW) is None
    assert tier.put(key(0), b"new", Facts(), NOW) and tier.stat(NOW).nbytes == 6
    for bad in ("../../etc/passwd", "", "A" * 64, "a" * 63, "a" * 64 + "\n", "a" * 60 + "/../"):
        with pytest.raises(StoreError, match="no digest"):
            tier.put(bad, b"x", Facts(), NOW)
        with pytest.raises(StoreError, match="no digest"):
            tier.get(bad, 0, 1, NOW)
    tier.close()


def test_a_cap_is_a_cap(make: Make) -> None:
    tier = make(max=1000)
    for n in range(12):
        assert tier.put(key(n), bytes(100 + n), Facts(), NOW)
        held = tier.stat(NOW)
        assert held.max == 1000 and held.nbytes <= 1000
        assert held.nbytes == sum(tier.size(k, NOW) or 0 for k in tier.keys(NOW))
    assert tier.size(key(11), NOW) == 111
    if not tier.name.startswith("s3://"):  # which knows the age of objects to the second
        assert tier.size(key(0), NOW) is None
    with pytest.raises(TierFull, match="max=1000"):
        tier.put(key(99), bytes(1001), Facts(), NOW)
    assert tier.size(key(11), NOW) == 111
    tier.close()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_pins_leases_and_tenants(kind: str, tmp_path: Path) -> None:
    clock = Clock()
    quotas = Quotas({"small": 250}, others=None)
    tier: Tier = (
        MemoryTier(1000, LRU(), quotas, clock) if kind == "memory" else FileTier(tmp_path, 1000, LRU(), quotas, clock)
    )
    for n in range(10):
        clock.now += 2
        tier.put(key(n), bytes(100), Facts(), NOW)
    assert tier.pin(key(0), "a", 60, NOW) and tier.pin(key(0), "b", 30, NOW) and not tier.pin(key(77), "a", 60, NOW)
    tier.put(key(10), bytes(100), Facts(), NOW)
    assert tier.size(key(0), NOW) == 100 and tier.size(key(1), NOW) is None
    tier.unpin("a", NOW)
    tier.put(key(11), bytes(100), Facts(), NOW)
    assert tier.size(key(0), NOW) == 100  # lease b still holds
    clock.now += 31
    for n in range(12, 14):
        tier.put(key(n), bytes(100), Facts(), NOW)
    assert tier.size(key(0), NOW) is None  # it ran out by itself
    for k in list(tier.keys(NOW)):
        tier.pin(k, "all", 10, NOW)
    with pytest.raises(TierFull):
        tier.put(key(20), bytes(1000), Facts(), NOW)
    tier.unpin("all", NOW)
    # a tenant over its quota makes room itself
    for n in range(30, 33):
        clock.now += 2
        tier.put(key(n), bytes(100), Facts("small"), NOW)
    others = [n for n in range(14) if tier.size(key(n), NOW)]
    assert [n for n in range(30, 33) if tier.size(key(n), NOW)] == [31, 32] and len(others) >= 7
    with pytest.raises(TierFull):
        tier.put(key(40), bytes(251), Facts("small"), NOW)
    tier.close()


def usage(n: int, **more: Any) -> Usage:
    facts = Facts(more.pop("tenant", ""), more.pop("seconds", 1.0), more.pop("start", 0))
    return Usage(str(n), more.pop("nbytes", 100), facts, more.pop("last", 0.0), **more)


def first_out(policy: Any, *usages: Usage, now: float = 100.0) -> str:
    gone = victims(usages, 1, "", sum(u.nbytes for u in usages), policy, now, Quotas())
    assert gone
    return gone[0]


def test_policies() -> None:
    assert first_out(LRU(), usage(0, last=9.0), usage(1, last=5.0), usage(2, last=7.0)) == "1"
    # chunks of one text, read within a second: the last of the text leaves first
    assert first_out(LRU(), usage(0, last=5.1), usage(1, last=5.2, start=256), usage(2, last=5.3, start=512)) == "2"
    assert first_out(LFU(), usage(0, heat=3.0), usage(1, heat=2.0), usage(2, heat=9.0)) == "1"
    # uses fade: nine long ago are worth less than two now
    faded = LFU(half_life=10.0)
    assert first_out(faded, usage(0, heat=9.0, last=0.0), usage(1, heat=2.0, last=100.0)) == "0"
    assert first_out(Cost(), usage(0, seconds=1.0, nbytes=10), usage(1, seconds=5.0, nbytes=100)) == "1"
    assert first_out(Cost(), usage(0, seconds=1.0, heat=9.0), usage(1, seconds=5.0)) == "1"
    touched = usage(0, heat=2.0, last=0.0)
    faded.touch(touched, 10.0)
    assert (touched.heat, touched.last) == (2.0, 10.0)


def test_files_are_private_and_named_by_digests(tmp_path: Path) -> None:
    tier = FileTier(tmp_path / "a" / "b", 1000)
    tier.put(key(0), b"x", Facts("tenant"), NOW)
    for path in [tier.folder, *tier.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0 or path.name.endswith(("-wal", "-shm")), (path, oct(mode))
    (chunk,) = tier.folder.glob("chunks/??/*")
    assert chunk.name == f"{key(0)}.kvloom" and not list(tier.folder.glob("partial/*"))
    tier.close()


def test_a_folder_outlives_its_tier_and_its_index(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, 1000)
    for n in range(9):
        tier.put(key(n), bytes(100), Facts(), NOW)
    tier.close()
    tier = FileTier(tmp_path, 1000)
    assert tier.stat(NOW).nbytes == 900
    tier.close()
    # files gone, files added, index lost, index damaged: the folder tells
    tier._path(key(0)).unlink()
    for damaged in (False, True):
        for path in tmp_path.glob("index.sqlite*"):
            path.unlink()
        if damaged:
            (tmp_path / "index.sqlite").write_bytes(random.Random(0).randbytes(8192))
        (tmp_path / "partial" / "left").write_bytes(b"over")
        tier = FileTier(tmp_path, 800)
        assert tier.stat(NOW).nbytes == 800 and not list(tmp_path.glob("partial/*"))
        tier.put(key(50 + damaged), bytes(100), Facts(), NOW)
        assert tier.stat(NOW).nbytes <= 800
        tier.close()
        for n in range(2):
            if not tier._path(key(90 + n)).exists() and sum(1 for _ in tmp_path.glob("chunks/??/*")) < 8:
                path = tier._path(key(90 + n))
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(bytes(100))


def chunk(k: str) -> bytes:
    return bytes([int(k[:2], 16)]) * (5000 + 200 * int(k[:2], 16))


def write(folder: Path, seed: int, report: Any) -> None:
    """What a process does until it is killed: reads and writes at random, and reports what is wrong."""
    tier, rng = FileTier(folder, 200_000), random.Random(seed)
    report.send("ready")
    while True:
        k = key(rng.randrange(60))
        try:
            data = tier.get(k, 0, 1 << 20, Deadline(20))
            if data is None:
                tier.put(k, chunk(k), Facts(), Deadline(20))
            elif data != chunk(k):
                report.send("torn")
        except TierError as error:
            report.send(str(error))


def disk_bytes(folder: Path) -> int:
    total = 0
    for path in [*folder.glob("chunks/??/*"), *folder.glob("partial/*")]:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_two_processes_killed_at_work(tmp_path: Path) -> None:
    """kill -9 in the middle of writing, again and again: whole chunks only, the cap holds, the index agrees with the folder."""
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would take seconds to import torch
    for turn in range(5):
        pipes = [fork.Pipe(duplex=False) for _ in range(2)]
        writers = [
            fork.Process(target=write, args=(tmp_path, 2 * turn + n, pipe[1]), daemon=True)
            for n, pipe in enumerate(pipes)
        ]
        for writer in writers:
            writer.start()
        for pipe in pipes:
            assert pipe[0].poll(30) and pipe[0].recv() == "ready"
        end, most = time.monotonic() + 0.3 + 0.07 * turn, 0
        while time.monotonic() < end:
            most = max(most, disk_bytes(tmp_path))
            time.sleep(0.003)
        for writer, pipe in zip(writers, pipes):
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
            assert writer.exitcode == -signal.SIGKILL and not pipe[0].poll()
        assert 0 < most <= 200_000
        tier = FileTier(tmp_path, 200_000, clock=lambda: time.time() + 3600)  # what they left has run out
        tier._adopt(NOW)
        held = {k: tier.size(k, NOW) for k in tier.keys(NOW)}
        assert held and all(held.values()) and sum(n or 0 for n in held.values()) == disk_bytes(tmp_path)
        assert tier.stat(NOW).nbytes == disk_bytes(tmp_path) <= 200_000
        for k in held:
            data = tier.get(k, 0, 1 << 20, NOW)
            assert data == chunk(k)
        tier.close()


def test_a_locked_index_costs_its_deadline(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, 1000)
    lock = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    before = time.monotonic()
    with pytest.raises(TierError, match="locked"):
        tier.put(key(0), b"x", Facts(), Deadline(0.2))
    assert time.monotonic() - before < 5
    lock.execute("ROLLBACK")
    lock.close()
    assert tier.put(key(0), b"x", Facts(), NOW)
    tier.close()


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = FileTier(tmp_path, 1000)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TierError, match="No space"):
            tier.put(key(0), b"x", Facts(), NOW)
    assert tier.stat(NOW).count == 0 and not list(tmp_path.glob("partial/*"))
    assert tier.put(key(0), b"x", Facts(), NOW)
    tier.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/some/folder", "no address of a tier"),
        ("ftp://host/x", "unknown kind of tier 'ftp'"),
        ("memory://?maxx=4GiB", "Did you mean 'max'"),
        ("memory://?max=many", "max='many' is no size"),
        ("memory://?max=-1", "no size"),
        ("memory://?evict=lur", "Did you mean 'lru'"),
        ("file://relative/path", "absolute folder"),
        ("redis://host:port/0", "redis://host"),
        ("redis://user:secret@host/0?timeout=never", "timeout='never'"),
        ("s3:///prefix", "names no bucket"),
        ("gs://bucket/x?endpoint=http://h", "options of s3"),
        ("s3://bucket/x?max", "cannot be read|no size"),
    ],
)
def test_refused_addresses(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        open_tier(url)
    assert "secret" not in str(caught.value)


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(f"{(tmp_path / 'with space').as_uri()}?max=2KiB&evict=cost")
    assert isinstance(tier, FileTier) and tier.max == 2048 and isinstance(tier.policy, Cost)
    assert tier.folder == tmp_path / "with space"
    tier.close()
    assert Address.parse("redis://user:secret@host:1/0").shown == "redis://host:1/0"
    sizes = {"4GiB": 4 << 30, "500 MB": 500_000_000, "1e3": 1000, "1.5kib": 1536, "7": 7}
    assert {text: size_of(text) for text in sizes} == sizes
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kvloom" / "store"


def test_a_server_that_is_not_there() -> None:
    tier = open_tier("redis://127.0.0.1:9/0?timeout=0.5")
    with pytest.raises(TierError, match=r"redis://127\.0\.0\.1:9/0"):
        tier.get(key(0), 0, 1, NOW)
    tier.close()

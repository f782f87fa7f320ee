"""Every fault on every kind of tier with every coding, against real servers; servers and writers that die in the middle."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch

from kvloom.errors import TierError
from kvloom.store import ChunkKey, Identity, Place, Store, chunk_keys
from kvloom.store import frame as frames
from kvloom.store.frame import Frame
from kvloom.store.memory import MemoryTier
from kvloom.store.store import open_tier
from kvloom.store.tier import Deadline, Facts, TierFull
from kvloom.store.torture import CODINGS, FAULTS, Row, run, table
from tests.servers import Server, moto, real_redis, redis_server, s3_server  # noqa: F401

KEYS = chunk_keys(Identity("weights", "tokenizer", "float32", ((2, 16, 16),)), range(400), 8)
TIERS = ["memory", "file", "redis", "s3"]


def tensors_of(key: ChunkKey) -> dict[Place, torch.Tensor]:
    rng = torch.Generator().manual_seed(int(key.digest[:8], 16))
    return {Place(0, plane): torch.randn(2, 64, 32, generator=rng) for plane in ("key", "value")}


def exact(store: Store, key: ChunkKey) -> bool:
    """True for the chunk's own tensors; False for a miss. Anything else fails."""
    got = store.get(key)
    assert got is None or all(torch.equal(got[place], x) for place, x in tensors_of(key).items())
    return got is not None


def address(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    if kind == "memory":
        return "memory://?max=64MiB"
    if kind == "file":
        return f"file://{folder}?max=64MiB"
    if kind == "redis":
        return str(request.getfixturevalue("real_redis"))
    return f"s3://test/{uuid.uuid4().hex}?endpoint={request.getfixturevalue('moto')}&region=us-east-1"


@pytest.mark.parametrize("kind", TIERS)
def test_matrix(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rows = run([address(kind, tmp_path, request)], seed=1)
    assert not [row for row in rows if row.broken]
    assert {(row.fault.partition(",")[0], row.coding) for row in rows} == {(f, c) for f in FAULTS for c in CODINGS}
    assert sum(row.misses for row in rows) > len(rows) and sum(row.exact for row in rows) > 0
    assert table(rows).row_count == len(rows) / len(CODINGS)


def test_codings_come_back_exact() -> None:
    for name, make in CODINGS.items():
        tensors, coding = make(torch.Generator().manual_seed(0))
        with Store(MemoryTier()) as store:
            store.put(KEYS[0], tensors, coding=coding)
            got = store.get(KEYS[0], coding=coding)
        assert got is not None and got.keys() == tensors.keys()
        if name != "cachegen":
            assert all(torch.equal(got[place], x) and got[place].dtype == x.dtype for place, x in tensors.items())


def broken(rows: list[Row]) -> set[str]:
    return {row.fault for row in rows if row.broken}


def test_a_store_that_trusts_its_bytes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison of keys, and without checksums, the rules break, and the matrix says so."""
    faults = ["flipped bit", "wrong tenant", "torn", "slow"]
    assert not broken(run(["memory://"], faults, ["raw"]))
    with monkeypatch.context() as patch:
        patch.setattr(Frame, "matches", lambda *_: "")
        assert broken(run(["memory://"], faults, ["raw"])) == {"wrong tenant"}
    with monkeypatch.context() as patch:

        class Trusting:
            """Finds every checksum to be right."""

            def hexdigest(self) -> str:
                return "0" * 32

            def digest(self) -> bytes:
                return b"0" * 16

            def update(self, _: object) -> None:
                pass

        patch.setattr(frames.xxhash, "xxh3_128", lambda *_: Trusting())
        found = broken(run(["memory://"], faults, ["raw"]))
        assert {"flipped bit, reading", "torn, writing"} <= found and "slow, reading" not in found


def disturbed(store: Store, server: Server) -> None:
    """Puts and gets while the server is there, while it is dead, while it starts, and once it is back."""
    rng = random.Random(0)

    def use() -> bool:
        key, before = rng.choice(KEYS[:8]), time.monotonic()
        hit = exact(store, key)
        if not hit:
            store.put(key, tensors_of(key))
        assert time.monotonic() - before < 3 * store.deadline + 60  # far less, on a machine that does nothing else
        return hit

    def until_hits(n: int) -> None:
        end = time.monotonic() + 240
        while n:
            assert time.monotonic() < end
            n -= use()
            time.sleep(0.002)

    until_hits(5)
    server.kill()
    assert sum(use() for _ in range(12)) == 0
    starter = threading.Thread(target=server.start)
    starter.start()
    until_hits(5)
    starter.join()


def test_redis_killed_and_started_again() -> None:
    server = redis_server()
    server.start()
    try:
        with Store.open(f"redis://127.0.0.1:{server.port}/0?timeout=1", deadline=1.0, pause=0.1) as store:
            disturbed(store, server)
            counts = next(found for name, found in store.stat().items() if name)
        assert counts["errors"] and counts["skipped"] and not counts.get("damaged") and not counts.get("wrong")
    finally:
        server.kill()


def test_s3_killed_and_started_again() -> None:
    server = s3_server()
    server.start()
    try:
        url = f"s3://test/x?endpoint=http://127.0.0.1:{server.port}&region=us-east-1&timeout=1"
        with Store.open(url, deadline=1.0, pause=0.1) as store:
            disturbed(store, server)
            counts = store.stat()["s3://test/x"]
        assert (counts.get("errors") or counts.get("late")) and not counts.get("damaged") and not counts.get("wrong")
    finally:
        server.kill()


def test_redis_without_memory() -> None:
    """The server refuses what it has no room for; what it has is served on."""
    server = redis_server("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    server.start()
    try:
        with Store.open(f"redis://127.0.0.1:{server.port}/0", failures=1, pause=60.0) as store:
            put = [store.put(key, tensors_of(key)) for key in KEYS]
            assert any(put) and not all(put)
            counts = next(found for name, found in store.stat().items() if name)
            assert counts["full"] == put.count(False) and not counts.get("errors")
            assert sum(exact(store, key) for key in KEYS) == sum(put)
    finally:
        server.kill()


FULL = textwrap.dedent("""
    import subprocess, sys
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", sys.argv[1]], check=True)
    import torch
    from kvloom.store import Store
    from tests.test_store_torture import KEYS, exact, tensors_of
    with Store.open(f"file://{sys.argv[1]}", failures=1, pause=60.0) as store:
        put = [store.put(key, tensors_of(key)) for key in KEYS]
        counts = next(found for name, found in store.stat().items() if name)
        hits = [exact(store, key) for key in KEYS]
    assert any(put) and not all(put), put
    assert hits == put and counts["full"] == put.count(False) and not counts.get("errors"), counts
    print("held")
""")


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """On a real file system of 1 MiB, in a mount namespace of its own: puts fail, reads go on."""
    alone = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*alone, "mount", "-t", "tmpfs", "none", str(tmp_path)]
    try:
        if subprocess.run(probe, capture_output=True).returncode:
            pytest.skip("NOT RUN on a full disk: no mount namespace can be made here")
    except FileNotFoundError:
        pytest.skip("NOT RUN on a full disk: there is no unshare here")
    found = subprocess.run(
        [*alone, sys.executable, "-c", FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert found.stdout == "held\n", found.stderr


def test_a_full_tier_is_not_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(f"file://{tmp_path}")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TierFull, match="No space left"):
            tier.put(KEYS[0].digest, b"x", Facts(), Deadline(5))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(TierError, match="Input/output") as caught:
            tier.put(KEYS[0].digest, b"x", Facts(), Deadline(5))
    assert not isinstance(caught.value, TierFull) and tier.put(KEYS[0].digest, b"x", Facts(), Deadline(5))
    tier.close()

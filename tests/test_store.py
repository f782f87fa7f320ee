"""The store over its tiers: what comes back is what was put in, or nothing, whatever the tiers do; and in time."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvloom.errors import StoreError, TierError
from kvloom.store import ChunkKey, Identity, Place, Store, chunk_keys, pack
from kvloom.store.faults import FAULTS, FaultyTier
from kvloom.store.files import FileTier
from kvloom.store.guard import Background, Guard, TierDown
from kvloom.store.memory import MemoryTier
from kvloom.store.objects import ObjectTier
from kvloom.store.redis import RedisTier
from kvloom.store.tier import Deadline, Facts, Tier, TierTimeout
from tests.servers import moto  # noqa: F401
from tests.test_store_tiers import fake_redis  # noqa: F401

IDENTITY = Identity("weights", "tokenizer", "float32", ((2, 16, 16),) * 3)
KEYS = chunk_keys(IDENTITY, range(80), 8)
SOME = KEYS[:6]


def tensors_of(key: ChunkKey) -> dict[Place, torch.Tensor]:
    """Different numbers for every chunk, 9 KiB: more than a page of a disk."""
    rng = torch.Generator().manual_seed(int(key.digest[:8], 16))
    return {
        Place(layer, plane): torch.randn(2, 12, 16, generator=rng) for layer in range(3) for plane in ("key", "value")
    }


def exact(got: dict[Place, torch.Tensor] | None, key: ChunkKey, layers: list[int] | None = None) -> bool:
    """True for the chunk's own tensors; False for a miss. Anything else fails."""
    if got is None:
        return False
    want = {place: tensor for place, tensor in tensors_of(key).items() if layers is None or place.layer in layers}
    assert got.keys() == want.keys()
    for place, tensor in want.items():
        assert got[place].dtype == tensor.dtype and torch.equal(got[place], tensor)
    return True


def frame_of(key: ChunkKey) -> bytes:
    return bytes(pack(key, tensors_of(key)))


@pytest.fixture(params=["memory", "file", "redis", "objects", "s3"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tier]:
    made: Tier
    if request.param == "memory":
        made = MemoryTier()
    elif request.param == "file":
        made = FileTier(tmp_path)
    elif request.param == "redis":
        import redis

        url = request.getfixturevalue("fake_redis")
        made = RedisTier(redis.Redis.from_url(url, socket_timeout=5, protocol=2), url, None, f"{tmp_path}:")
    elif request.param == "objects":
        import obstore.store

        made = ObjectTier(obstore.store.MemoryStore(), "objects")
    else:
        from kvloom.store.store import open_tier

        made = open_tier(
            f"s3://test/{tmp_path.name}-{time.time_ns()}?endpoint={request.getfixturevalue('moto')}&region=us-east-1"
        )
    yield made
    made.close()


def test_put_get_delete(tier: Tier) -> None:
    with Store(tier) as store:
        assert store.get(KEYS[0]) is None and not store.contains(KEYS[0])
        assert store.put(KEYS[0], tensors_of(KEYS[0]), notes={"error": 0.25})
        assert store.contains(KEYS[0]) and exact(store.get(KEYS[0]), KEYS[0])
        assert exact(store.get(KEYS[0], [0, 2]), KEYS[0], [0, 2])
        buffers = {place: torch.zeros_like(tensor) for place, tensor in tensors_of(KEYS[0]).items()}
        got = store.get(KEYS[0], into=buffers)
        assert exact(got, KEYS[0]) and got is not None and all(got[place] is buffers[place] for place in buffers)
        # what is given out is the caller's: writing to it changes nothing in the store
        for tensor in got.values():
            tensor.zero_()
        for tensor in (store.get(KEYS[0]) or {}).values():
            tensor.zero_()
        assert exact(store.get(KEYS[0]), KEYS[0])
        with pytest.raises(StoreError, match="layers"):
            store.get(KEYS[0], [9])
        store.put(KEYS[1], tensors_of(KEYS[1]), coding="zstd")
        assert store.match(KEYS) == 2 and exact(store.get(KEYS[1]), KEYS[1])
        for change in ({"start": 8}, {"tokens": (0,) * 8}, {"identity": "0" * 64}):
            assert store.get(dataclasses.replace(KEYS[0], **change)) is None
        assert store.delete(KEYS[0]) and not store.delete(KEYS[0]) and store.get(KEYS[0]) is None
        assert store.stat()[tier.name]["puts"] == 2


@pytest.mark.parametrize("tier", ["memory", "file", "redis", "objects"], indirect=True)
@pytest.mark.parametrize("on", ["get", "put"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_matrix(tier: Tier, fault: str, on: str) -> None:
    """Every fault on every kind of tier, when reading and when writing: exact or a miss, in time, and counted."""
    faulty = FaultyTier(tier, [fault], seed=1, on=on, delay=0.03)
    with Store(faulty, deadline=5.0, pause=0.0) as store:
        hits = 0
        for key in SOME:
            before = time.monotonic()
            store.put(key, tensors_of(key))
            hits += exact(store.get(key), key) + exact(store.get(key, [1]), key, [1])
            assert time.monotonic() - before < 20
        counts = store.stat()[faulty.name]
        bad = sum(counts.get(name) or 0 for name in ("damaged", "wrong", "errors", "full"))
        if fault == "full" and on == "get":
            assert hits == 2 * len(SOME) and not faulty.happened
            return
        assert faulty.happened[fault] >= len(SOME) - 1
        if fault == "delay":
            assert hits == 2 * len(SOME) and bad == 0
        elif fault == "drop":
            assert hits == 0 and bad == 0 and counts["misses"] == 2 * len(SOME)
        elif (fault, on) == ("append", "put"):
            # the whole is refused and then gone; layers are read with their own checksums
            assert hits == 0 and bad == len(SOME)
        else:
            # damage beside the layers that are read, and an end that is not read, may go unnoticed: they are exact
            assert bad >= len(SOME) - 1 and hits <= len(SOME) + 2
        # and afterwards the tier serves again
        faulty.rate = 0.0
        for key in SOME:
            store.put(key, tensors_of(key))
            got = exact(store.get(key), key)
            if not got:
                store.put(key, tensors_of(key))
                assert exact(store.get(key), key)


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_faults(tmp_path: Path, seed: int) -> None:
    """All faults at once, on both tiers, from several threads."""
    storm = [
        FaultyTier(inner, [f for f in FAULTS], seed=seed + i, rate=0.4, on="both", delay=0.001)
        for i, inner in enumerate((MemoryTier(40_000), FileTier(tmp_path, 60_000)))
    ]
    with Store(*storm, write="back", pause=0.01) as store:
        failures: list[BaseException] = []
        hits = [0] * 3

        def work(n: int) -> None:
            rng = random.Random(seed * 10 + n)
            try:
                for _ in range(60):
                    key = rng.choice(KEYS)
                    layers = rng.choice([None, [0], [1, 2]])
                    if exact(store.get(key, layers), key, layers):
                        hits[n] += 1
                    else:
                        store.put(key, tensors_of(key))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not failures and sum(hits) > 0
        assert sum(sum(tier.happened.values()) for tier in storm) > 20


def test_another_models_chunk_under_the_key(tier: Tier, caplog: pytest.LogCaptureFixture) -> None:
    """As another writer, a mistake or an attacker would put it there: intact, but not what was asked for."""
    theirs = chunk_keys(dataclasses.replace(IDENTITY, weights="others"), range(80), 8)
    with Store(tier) as store:
        for n, wrong in enumerate((theirs[0], KEYS[1])):
            tier.put(KEYS[0].digest, frame_of(wrong), Facts(), Deadline(9))
            assert store.get(KEYS[0]) is None
            assert store.stat()[tier.name]["wrong"] == n + 1 and not store.contains(KEYS[0])
        assert "another identity" in caplog.text and "another context" in caplog.text
        # right digests, other tokens: what a collision would look like
        collision = dataclasses.replace(KEYS[0], tokens=(9,) * 8)
        collision.__dict__["digest"] = KEYS[0].digest
        tier.put(KEYS[0].digest, frame_of(collision), Facts(), Deadline(9))
        assert store.get(KEYS[0]) is None and "another tokens" in caplog.text


class Undeletable(MemoryTier):
    def delete(self, key: str, deadline: Deadline) -> bool:
        raise TierError("read only")


def test_quarantine_holds_where_nothing_can_be_removed() -> None:
    tier = Undeletable()
    tier.put(KEYS[0].digest, b"rubbish", Facts(), Deadline(9))
    with Store(tier, pause=0.0) as store:
        for _ in range(3):
            assert store.get(KEYS[0]) is None and not store.contains(KEYS[0])
        counts = store.stat()[tier.name]
        assert counts["damaged"] == 1 and counts["misses"] == 2


def test_promotion_and_healing(tmp_path: Path) -> None:
    """A damaged copy in memory is replaced by the good one on disk."""
    memory, files = MemoryTier(), FileTier(tmp_path)
    with Store(memory, files) as store:
        store.put(KEYS[0], tensors_of(KEYS[0]), seconds=2.5)
        memory._data[KEYS[0].digest] = bytes(memory._data[KEYS[0].digest])[:-1] + b"!"
        assert exact(store.get(KEYS[0]), KEYS[0])
        assert memory.get(KEYS[0].digest, 0, 1 << 20, Deadline(9)) == bytes(
            files.get(KEYS[0].digest, 0, 1 << 20, Deadline(9)) or b""
        )
        assert memory._usage[KEYS[0].digest].facts.seconds == 2.5
        assert store.stat()["memory://"]["damaged"] == 1 and store.stat()["memory://"]["promoted"] == 1
        memory.delete(KEYS[0].digest, Deadline(9))
        assert exact(store.get(KEYS[0], [1]), KEYS[0], [1]) and not memory._data  # parts are not promoted
        assert store.prefetch([KEYS[0]]) == 1 and store.flush() and len(memory._data) == 1


class Stuck(MemoryTier):
    """Hangs until it is let go."""

    quick = False

    def __init__(self) -> None:
        super().__init__()
        self.go, self.calls = threading.Event(), 0

    def get(self, key: str, start: int, stop: int, deadline: Deadline) -> bytes | None:  # type: ignore[override]
        self.calls += 1
        self.go.wait(30)
        return None

    def put(self, key: str, data: object, facts: Facts, deadline: Deadline) -> bool:
        self.get(key, 0, 0, deadline)
        return super().put(key, data, facts, deadline)


def test_a_tier_that_hangs_costs_its_deadline_and_then_nothing() -> None:
    stuck = Stuck()
    stuck.name = "stuck"
    store = Store(MemoryTier(), stuck, deadline=0.1, pause=60.0)
    for key in KEYS:
        before = time.monotonic()
        assert store.get(key) is None
        assert time.monotonic() - before < 3
    assert stuck.calls == 3 and store.stat()["stuck"]["late"] == 3
    assert store.put(KEYS[0], tensors_of(KEYS[0])) and exact(store.get(KEYS[0]), KEYS[0])
    stuck.go.set()
    store.close()


def test_a_guard_tries_again() -> None:
    now = [0.0]
    guard = Guard(MemoryTier(), failures=2, pause=5.0, clock=lambda: now[0])

    def fail(_: Deadline) -> None:
        raise OSError("broken")

    for _ in range(2):
        with pytest.raises(TierError, match="broken"):
            guard.call(fail, Deadline(1))
    with pytest.raises(TierDown):
        guard.call(lambda _: 1, Deadline(1))
    now[0] = 5.1
    with pytest.raises(TierError, match="broken"):
        guard.call(fail, Deadline(1))
    with pytest.raises(TierDown):
        guard.call(lambda _: 1, Deadline(1))
    now[0] = 10.3
    assert guard.call(lambda _: 1, Deadline(1)) == 1 and guard.call(lambda _: 2, Deadline(1)) == 2


def test_write_back_does_not_wait_and_is_bounded() -> None:
    stuck = Stuck()
    stuck.name = "stuck"
    store = Store(MemoryTier(), stuck, write="back", queue=2, deadline=30.0)
    before = time.monotonic()
    for key in KEYS:
        assert store.put(key, tensors_of(key))
    assert time.monotonic() - before < 10 and not store.flush(0.01)
    stuck.go.set()
    assert store.flush()
    written = len(KEYS) - (store.stat()["stuck"]["not queued"] or 0)
    assert 2 <= written <= 3 and len(stuck._data) == written == store.stat()["stuck"]["puts"]
    store.close()


def test_background_closes() -> None:
    background = Background("test", 4)
    done: list[int] = []
    assert background.offer(lambda: done.append(1)) and background.close(5) and done == [1]
    assert not background.offer(lambda: done.append(2))


def test_a_guard_reports_a_late_answer() -> None:
    stuck = Stuck()
    guard = Guard(stuck)
    with pytest.raises(TierTimeout):
        guard.call(lambda d: stuck.get("", 0, 0, d), Deadline(0.05))
    stuck.go.set()
    guard.close()


def test_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    with Store.open() as store:
        store.put(KEYS[0], tensors_of(KEYS[0]))
    with Store.open() as store:
        assert exact(store.get(KEYS[0]), KEYS[0])
        assert [name.split(":")[0] for name in store.stat()] == ["", "memory", "file"]
    with pytest.raises(StoreError, match="unknown way to write"):
        Store(MemoryTier(), write="bakc")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="needs a tier"):
        Store()


def test_pins_keep_a_text(tmp_path: Path) -> None:
    size = len(frame_of(KEYS[0])) + 200
    with Store(MemoryTier(3 * size), FileTier(tmp_path, 3 * size)) as store:
        for key in KEYS[:2]:
            store.put(key, tensors_of(key))
        lease = store.pin(KEYS[:2])
        for key in KEYS[2:6]:
            store.put(key, tensors_of(key))
        assert store.match(KEYS) == 2
        store.unpin(lease)


class Machine(RuleBasedStateMachine):
    """Puts, gets, deletes, damage and evictions in any order against a dictionary of what was put."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryTier(45_000)
        self.store = Store(self.memory)
        self.put: set[int] = set()

    @rule(n=st.integers(0, 9))
    def write(self, n: int) -> None:
        self.store.put(KEYS[n], tensors_of(KEYS[n]))
        self.put.add(n)

    @rule(n=st.integers(0, 9), layers=st.sampled_from([None, [0], [1, 2]]))
    def read(self, n: int, layers: list[int] | None) -> None:
        assert not exact(self.store.get(KEYS[n], layers), KEYS[n], layers) or n in self.put

    @rule(n=st.integers(0, 9))
    def delete(self, n: int) -> None:
        self.store.delete(KEYS[n])
        self.put.discard(n)
        assert self.store.get(KEYS[n]) is None

    @rule(n=st.integers(0, 9), at=st.integers(0, 10**6))
    def damage(self, n: int, at: int) -> None:
        data = bytearray(self.memory._data.get(KEYS[n].digest, b""))
        if data:
            data[at % len(data)] ^= 1
            self.memory._data[KEYS[n].digest] = bytes(data)

    @invariant()
    def capped(self) -> None:
        assert self.memory._nbytes == sum(map(len, self.memory._data.values())) <= 45_000


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)

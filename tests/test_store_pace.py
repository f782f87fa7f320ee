"""The choice of codings by bandwidth and time, and loading by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import StoreError, TierError
from kvloom.store import Identity, Place, Store, chunk_keys
from kvloom.store.memory import MemoryTier
from kvloom.store.pace import TEXT, choose, load
from kvloom.store.tier import Deadline
from kvloom.store.variants import key_of

SIZES = [{"raw": 1000, "fine": 300, "middle": 200, "coarse": 100}] * 4
NAMES = list(SIZES[0])
TIMES = [1.0] * 4


def test_infinite_bandwidth_takes_the_best_and_none_takes_text() -> None:
    assert choose(SIZES, 1.0, float("inf"), TIMES) == "raw"
    assert choose(SIZES, 1.0, 0.0, TIMES) == TEXT
    assert choose(SIZES, 1e9, 1e-9, TIMES) == TEXT  # in time either way: text loses nothing


def test_the_first_chunk_takes_the_middle() -> None:
    assert choose(SIZES, 1.0, None, TIMES) == "middle"
    assert choose([{}], 1.0, None, [1.0]) == TEXT


def test_the_best_coding_that_is_in_time() -> None:
    assert choose(SIZES, 1.0, 4000, TIMES) == "raw"
    assert choose(SIZES, 1.0, 3999, TIMES) == "fine"
    assert choose(SIZES, 1.0, 800, TIMES) == "middle"
    assert choose(SIZES, 1.0, 100, TIMES) == TEXT  # 4 s either way, and text is exact
    assert choose(SIZES, 1.0, 101, TIMES) == "coarse"  # late as well, but least so
    assert choose(SIZES, 1.0, 101) == "coarse"
    assert choose(SIZES, 10.0, 500, [0.1] * 4) == TEXT  # raw is in time, computing is quicker


def test_chunks_that_lack_codings() -> None:
    assert choose([SIZES[0], {"coarse": 100}], 1.0, 1100) == "raw"
    assert choose([SIZES[0], {}], 1.5, 1000, [1.0, 1.0]) == "fine"  # a second of it is the later chunk's computing
    with pytest.raises(StoreError, match="computed"):
        choose([{}], 1.0, 1000)
    with pytest.raises(StoreError, match="no chunk"):
        choose([], 1.0, 1000)


@given(
    st.lists(st.lists(st.integers(1, 10**6), min_size=3, max_size=3, unique=True), min_size=1, max_size=5),
    st.floats(0.001, 100),
    st.floats(1, 1e9),
    st.floats(1, 1e9),
)
def test_more_bandwidth_never_chooses_worse(sizes: list[list[int]], left: float, a: float, b: float) -> None:
    chunks = [dict(zip(NAMES, sorted(chunk, reverse=True))) for chunk in sizes]
    slow, fast = (choose(chunks, left, bandwidth) for bandwidth in sorted((a, b)))
    assert NAMES.index(fast) <= NAMES.index(slow)
    if sum(chunk[slow] for chunk in chunks) / min(a, b) > left:  # late: then it is the smallest
        assert slow == NAMES[2]


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(MemoryTier):
    """A tier behind a line of so many bytes per second, one figure for each read."""

    def line(self, clock: Clock, rates: list[float]) -> Slow:
        self.clock, self.rates, self.lost = clock, rates, set()
        return self

    def get(self, key: str, start: int, stop: int, deadline: Deadline) -> object:
        if key in self.lost:
            raise TierError("lost on the way")
        data = super().get(key, start, stop, deadline)
        if data is not None:
            self.clock.now += len(data) / self.rates[0]
            self.rates[:] = self.rates[1:] or self.rates
        return data


CODINGS = ["raw", "cachegen(level=1)", "cachegen(level=3)"]
KEYS = chunk_keys(Identity("w", "t", "float32", ((2, 16, 16),)), range(128), 32)
CHUNKS = [
    {Place(0, plane): torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(i)) for plane in ("key", "value")}
    for i in range(len(KEYS))
]


@pytest.fixture
def tier() -> Slow:
    return Slow(1 << 24).line(Clock(), [1e6])


@pytest.fixture
def store(tier: Slow) -> Store:
    store = Store(tier, failures=1000)  # a tier that loses one chunk is asked for the next
    for key, chunk in zip(KEYS, CHUNKS):
        for coding in CODINGS:
            assert store.put(key, chunk, coding=coding)
    tier.clock.now = 0.0
    return store


def recompute(key: object, before: list[object]) -> dict[Place, torch.Tensor]:
    return CHUNKS[len(before)]


def test_a_line_that_slows_down_gets_coarser_chunks(store: Store, tier: Slow) -> None:
    raw = store.size(KEYS[0]) or 0
    tier.rates[:] = [raw / 1.0, raw / 1.0, raw / 40]
    got = load(store, KEYS, CODINGS, 4.5, bandwidth=raw, clock=tier.clock)
    assert [one.choice for one in got] == ["raw", "raw", "raw", "cachegen(level=3)"]
    assert [one.key for one in got] == KEYS
    for one, chunk in zip(got[:3], CHUNKS):
        assert all(torch.equal(one.tensors[place], x) for place, x in chunk.items())
    gap = max(float((got[3].tensors[place] - x).abs().max()) for place, x in CHUNKS[3].items())
    assert 0 < gap < 1.0


def test_text_where_the_line_is_dead(store: Store, tier: Slow) -> None:
    tier.rates[:] = [1.0]
    got = load(store, KEYS, CODINGS, 1.0, recompute=recompute, text=[0.1] * 4, bandwidth=0.0, clock=tier.clock)
    assert [one.choice for one in got] == [TEXT] * 4 and not any(one.nbytes for one in got)
    assert all(torch.equal(one.tensors[p], x) for one, chunk in zip(got, CHUNKS) for p, x in chunk.items())


def test_a_chunk_that_is_lost_comes_in_another_coding_or_is_computed_or_ends_the_list(store: Store, tier: Slow) -> None:
    tier.lost = {key_of(KEYS[1], "raw").digest}
    assert [x.choice for x in load(store, KEYS, CODINGS, 9.0, bandwidth=1e9, clock=tier.clock)][:2] == [
        "raw",
        CODINGS[2],
    ]
    tier.lost = {key_of(KEYS[1], coding).digest for coding in CODINGS}
    assert len(load(store, KEYS, CODINGS, 9.0, bandwidth=1e9, clock=tier.clock)) == 1
    got = load(store, KEYS, CODINGS, 9.0, bandwidth=1e9, recompute=recompute, clock=tier.clock)
    assert [one.choice for one in got] == ["raw", TEXT, "raw", "raw"]


def test_refused() -> None:
    store = Store.open("memory://?max=1MiB")
    with pytest.raises(StoreError, match="text=1"):
        load(store, KEYS, CODINGS, 1.0, text=[1.0])
    with pytest.raises(StoreError, match="ttft=0"):
        load(store, KEYS, CODINGS, 0)
    with pytest.raises(StoreError, match="coding"):
        load(store, KEYS, ["lz4"], 1.0)
    assert load(store, KEYS, CODINGS, 1.0) == []

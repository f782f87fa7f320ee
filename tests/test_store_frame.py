"""Identities, chunk keys and frames: anything different has another key, and nothing damaged is ever read."""

from __future__ import annotations

import dataclasses
import random
import tracemalloc

import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import DamagedFrame, StoreError
from kvloom.store import Frame, Identity, Place, chunk_keys, pack
from kvloom.store.frame import BODY, DTYPES, PRELUDE, Header, Page, _checksum, msgspec
from kvloom.store.identity import digest_of
from scripts.fuzz import attempt, blind, coded_examples, example_key, examples, same

BASE = Identity("w", "t", "bfloat16", ((2, 4, 4),), (("base", 10000.0), ("share", 1.0)))
OTHERS = {
    "weights": "w2",
    "tokenizer": "t2",
    "dtype": "float16",
    "layout": ((4, 2, 4),),
    "rope": (("base", 10000), ("share", 1.0)),
    "adapter": "lora",
    "recipe": "kivi(bits=2)",
    "salt": "tenant",
    "shard": (0, 2),
    "format": 2,
}


def test_every_field_of_an_identity_counts() -> None:
    assert set(OTHERS) == {field.name for field in dataclasses.fields(Identity)}
    digests = {BASE.digest} | {dataclasses.replace(BASE, **{name: value}).digest for name, value in OTHERS.items()}
    assert len(digests) == 1 + len(OTHERS)


def test_digests_stay_as_they_are() -> None:
    """In every process and version: another digest means another FORMAT."""
    keys = chunk_keys(BASE, range(9), 3)
    assert BASE.digest == "62ae250bf730886f71a8f70ae15626b4d080cf56cbe6496c42943ba85aaf806a"
    assert keys[2].digest == "6b4e5cfc5106a01099ff2724d7af796c3ba4c99492270ac01cac92f006d6ac09"


parts = st.recursive(
    st.text() | st.integers() | st.booleans() | st.none() | st.binary(), lambda x: st.lists(x).map(tuple), max_leaves=4
)


@settings(max_examples=50, deadline=None)
@given(a=st.lists(parts, max_size=4), b=st.lists(parts, max_size=4))
def test_digest_of_tells_parts_apart(a: list[object], b: list[object]) -> None:
    assert (digest_of(*a) == digest_of(*b)) == (repr(a) == repr(b))


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_prefix_keys_agree_as_far_as_the_tokens_do(a: list[int], b: list[int], block: int) -> None:
    ours, theirs = chunk_keys(BASE, a, block), chunk_keys(BASE, b, block)
    assert len(ours) == len(a) // block
    for n, (x, y) in enumerate(zip(ours, theirs), 1):
        assert (x.digest == y.digest) == (a[: n * block] == b[: n * block])
    assert len({key.digest for key in ours}) == len(ours)


def test_context_start_and_block_count() -> None:
    key = chunk_keys(BASE, range(4), 4)[0]
    for other in (
        dataclasses.replace(key, start=4),
        dataclasses.replace(key, context=key.digest),
        dataclasses.replace(key, tokens=(0, 1, 2)),
    ):
        assert other.digest != key.digest


@pytest.mark.parametrize(
    "change",
    [{"weights": ""}, {"layout": ()}, {"layout": ((2, 4),)}, {"shard": (2, 2)}, {"dtype": torch.float16}],
)
def test_refused_identities(change: dict[str, object]) -> None:
    with pytest.raises(StoreError, match=next(iter(change))):
        dataclasses.replace(BASE, **change)


def test_refused_tokens() -> None:
    with pytest.raises(StoreError, match="64 bits"):
        chunk_keys(BASE, [1 << 70], 1)
    with pytest.raises(StoreError, match="block=0"):
        chunk_keys(BASE, [1], 0)
    with pytest.raises(StoreError, match="no digest"):
        digest_of(object())


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(shapes, st.sampled_from(sorted(DTYPES)), st.booleans()), max_size=5),
    coding=st.sampled_from(["raw", "zstd", "rans"]),
    seed=st.integers(0, 1000),
)
def test_round_trip(entries: list[tuple[tuple[int, ...], str, bool]], coding: str, seed: int) -> None:
    """All dtypes bit by bit, NaNs included; shapes with nothing in them; tensors that do not lie in order."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (shape, name, turn) in enumerate(entries):
        dtype = DTYPES[name]
        high = 2 if dtype == torch.bool else 256
        raw = torch.randint(0, high, (*shape, dtype.itemsize), generator=rng, dtype=torch.uint8)
        tensor = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
        tensors[Place(layer)] = tensor.transpose(0, -1) if turn and shape else tensor
    frame = Frame.open(pack(example_key(), tensors, coding=coding))
    assert not frame.matches(example_key())
    for layers in (None, list(range(0, len(entries), 2))):
        for copy in (True, False):
            got = frame.read(layers, copy=copy)
            assert set(got) == {place for place in tensors if layers is None or place.layer in layers}
            for place, tensor in got.items():
                want = tensors[place].contiguous()
                assert tensor.dtype == want.dtype and tensor.shape == want.shape
                assert (
                    tensor.reshape(-1).view(torch.uint8).equal(want.reshape(-1).view(torch.uint8)) or not want.numel()
                )


def test_views_copies_and_buffers() -> None:
    tensors = {Place(layer): torch.randn(2, 3) for layer in range(3)}
    data = pack(example_key(), tensors)
    view, copy = Frame.open(data).read(copy=False), Frame.open(data).read()
    frozen = Frame.open(bytes(data)).read(copy=False)
    data[:] = bytes(len(data))
    assert all(not tensor.any() for tensor in view.values())
    assert same(copy, tensors) and same(frozen, tensors)

    data = pack(example_key(), tensors)
    buffer = torch.zeros(2, 3)
    got = Frame.open(data).read(into={Place(1): buffer})
    assert got[Place(1)] is buffer and same(got, tensors)
    with pytest.raises(StoreError, match="into"):
        Frame.open(data).read(into={Place(1): torch.zeros(3, 2)})
    with pytest.raises(StoreError, match=r"layers=\[7\]"):
        Frame.open(data).read([7])
    # the last page is damaged: the buffer of an earlier one is not touched
    data[-64] ^= 1
    buffer.zero_()
    with pytest.raises(DamagedFrame, match="layer=2"):
        Frame.open(data).read(into={Place(1): buffer})
    assert not buffer.any()
    assert same(Frame.open(data).read([0, 1]), {place: tensors[place] for place in (Place(0), Place(1))})


def test_partial_reads_fetch_only_what_is_asked_for() -> None:
    tensors = {Place(layer): torch.randn(64, 64) for layer in range(8)}
    data = pack(example_key(), tensors)
    asked = []

    def fetch(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return bytes(data[start:stop])

    frame = Frame(data[:100], fetch)  # not even the whole header
    got = frame.read([2, 3, 6])
    assert same(got, {Place(layer): tensors[Place(layer)] for layer in (2, 3, 6)})
    assert [stop - start for start, stop in asked[1:]] == [2 * 64 * 64 * 4, 64 * 64 * 4]


def test_matches_names_the_difference() -> None:
    key = example_key()
    frame = Frame.open(pack(key, {}))
    for change in ({"identity": "0" * 64}, {"context": "0" * 64}, {"start": 1}, {"tokens": (0,) * 8}):
        assert frame.matches(dataclasses.replace(key, **change)) == f"another {next(iter(change))}"


def test_refused_when_packed() -> None:
    with pytest.raises(StoreError, match="complex64"):
        pack(example_key(), {Place(0): torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(StoreError, match="limit=1000"):
        pack(example_key(), {Place(0): torch.zeros(1000)}, limit=1000)
    with pytest.raises(StoreError, match="format"):
        pack(example_key(), {Place(0, "p" * 65): torch.zeros(1)})
    with pytest.raises(StoreError, match="format"):
        pack(example_key(), {Place(0): torch.zeros((1,) * 9)})


def forge(page: Page, body: bytes) -> bytes:
    """A frame of one page with right checksums, whatever the page says."""
    key = example_key()
    check = xxhash.xxh3_128(body).hexdigest()
    header = Header(key.identity, "", key.digest, 0, key.tokens, (msgspec.structs.replace(page, checksum=check),), {})
    text = msgspec.json.encode(header)
    text = text.ljust(-(-(BODY + len(text)) // 64) * 64 - BODY)
    prelude = PRELUDE.pack(b"KVLOOM\r\n", 1, 0, len(text), BODY + len(text) + len(body))
    return prelude + _checksum(prelude, text) + text + body


def test_nothing_is_allocated_beyond_what_is_declared() -> None:
    """A page that would unpack to 64 MiB, declared as 64 bytes; a shape beyond the limit; sizes that do not agree."""
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    body = bomb.ljust(-(-len(bomb) // 64) * 64, b"\0")
    page = Page(0, "key", "x", "uint8", (64,), 0, 64, len(bomb), "zstd", "")
    plain = Page(0, "key", "x", "uint8", (64,), 0, 64, 64, "raw", "")
    cases = [
        (page, body),
        (msgspec.structs.replace(page, shape=(64 << 20,), nbytes=64 << 20), body),
        (msgspec.structs.replace(plain, shape=(1 << 40, 0), nbytes=0, stored=0), b""),
        (msgspec.structs.replace(plain, offset=64), bytes(128)),
        (msgspec.structs.replace(plain, shape=(65,)), bytes(64)),
        (msgspec.structs.replace(plain, dtype="int4"), bytes(64)),
        (msgspec.structs.replace(plain, stored=32), bytes(64)),
        (plain, bytes(128)),
    ]
    assert Frame.open(forge(plain, bytes(64))).read()[Place(0)].equal(torch.zeros(64, dtype=torch.uint8))
    tracemalloc.start()
    for page, body in cases:
        with pytest.raises(DamagedFrame):
            Frame.open(forge(page, body), limit=1 << 20).read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_every_byte_and_every_cut() -> None:
    """Exhaustive on a small frame: any byte changed, any length but the right one."""
    data = bytes(pack(example_key(2), {Place(0): torch.arange(4.0), Place(0, "value"): torch.arange(3)}))
    for at in range(len(data)):
        mutant = bytearray(data)
        mutant[at] ^= 1 << (at % 8)
        with pytest.raises(DamagedFrame):
            Frame.open(mutant).read()
        with pytest.raises(DamagedFrame):
            Frame.open(data[:at]).read()
    with pytest.raises(DamagedFrame):
        Frame.open(data + b"\0").read()


def test_swapped_pages() -> None:
    a, b = torch.zeros(16), torch.ones(16)
    data = bytes(pack(example_key(), {Place(0): a, Place(1): b}))
    with pytest.raises(DamagedFrame, match="checksum of Place"):
        Frame.open(data[:-128] + data[-64:] + data[-128:-64]).read()


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(seed: int) -> None:
    frames, rng = coded_examples(), random.Random(seed)
    outcomes = [attempt(frames, rng) for _ in range(1500)]
    assert outcomes.count("refused") > 1000


def test_fuzz_does_damage() -> None:
    """The damage of the fuzz test reaches all parts of a frame."""
    (data, _), (other, _), *_ = examples()
    rng, touched = random.Random(0), set()
    for _ in range(500):
        mutant = blind(data, other, rng)
        touched |= {at * 16 // len(data) for at, (x, y) in enumerate(zip(data, mutant)) if x != y}
    assert touched == set(range(16))

"""Codings of pages, and CacheGen: what the entropy coder is given comes back, CacheGen's errors keep to their bounds."""

from __future__ import annotations

import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import DamagedFrame, StoreError
from kvloom.kernels import entropy, native
from kvloom.store import Frame, Identity, Place, Store, cachegen, chunk_keys, pack
from kvloom.store.cachegen import BINS, CARD, FORMS, KEYS, RELEASED, THIRDS, CacheGen, parse
from kvloom.store.coding import Coded, Plain, expand, squeeze
from scripts.fuzz import blind, coded_examples

compiled = pytest.mark.skipif(native.ISA is None, reason="no compiled kernels")


def entropy_of(x: np.ndarray) -> float:
    """Bits per symbol if each column were coded by its own counts."""
    total = 0.0
    for column in x.T:
        p = np.bincount(column) / len(column)
        total -= float((p[p > 0] * np.log2(p[p > 0])).sum())
    return total / x.shape[1]


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Any alphabet and counts: one symbol, one row, one column, noise, hardly ever another symbol, columns of any width."""
    rows, cols = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    kind = draw(st.sampled_from(["one", "noise", "rare", "widths", "few"]))
    if kind == "one":
        return np.full((rows, cols), draw(st.integers(0, 255)), np.uint8)
    if kind == "rare":
        return (rng.random((rows, cols)) < 0.01).astype(np.uint8) * 255
    if kind == "widths":
        return np.abs(rng.normal(size=(rows, cols)) * rng.uniform(0.01, 60, cols)).clip(0, 255).astype(np.uint8)
    if kind == "few":
        return rng.choice(np.array(draw(st.lists(st.integers(0, 255), min_size=1, max_size=5)), np.uint8), (rows, cols))
    return rng.integers(0, 256, (rows, cols), dtype=np.uint8)


@settings(max_examples=40, deadline=None)
@given(matrices(), st.integers(1, 4))
def test_what_is_coded_comes_back_and_both_coders_write_the_same_bytes(x: np.ndarray, step: int) -> None:
    spread = np.repeat(x[..., None], step, 2)[:, :, 0]  # bytes that lie `step` apart, as byte planes do
    code, out = entropy._encode(x), np.zeros((*x.shape, step), np.uint8)
    entropy._decode(code, out[:, :, 0])
    assert np.array_equal(out[:, :, 0], x) and not out[:, :, 1:].any()
    if native.ISA is not None:
        assert entropy.encode([spread]) == [code]
        again = np.zeros((*x.shape, step), np.uint8)
        entropy.decode([code], [again[:, :, 0]])
        assert np.array_equal(again, out)


@compiled
@pytest.mark.parametrize("shape", [(70_000, 1), (3, 70_000), (1000, 100), (513, 128)])
def test_several_streams_and_huge_counts(shape: tuple[int, int]) -> None:
    x = np.abs(np.random.default_rng(0).normal(size=shape) * 3).astype(np.uint8)
    (code,) = entropy.encode([x])
    out = np.empty_like(x)
    entropy.decode([code], [out])
    assert np.array_equal(out, x)
    if max(shape) < 70_000:  # the reference takes its time
        assert entropy._encode(x) == code


def test_a_constant_takes_next_to_nothing() -> None:
    (code,) = entropy.encode([np.zeros((4000, 256), np.uint8)])
    assert len(code) < 1000


@compiled
def test_bits_are_close_to_the_entropy_and_below_the_logarithm() -> None:
    """CacheGen's second check: at most log2 of the levels, and close to what the symbols hold. Tables are counted."""
    rng = np.random.default_rng(1)
    x = np.abs(np.rint(rng.normal(size=(1024, 512)) * rng.uniform(0.3, 4, 512))).astype(np.uint8)
    (code,) = entropy.encode([x])
    bits = 8 * len(code) / x.size
    assert bits < 1.02 * entropy_of(x) < math.log2(int(x.max()) + 1)


def test_damaged_codes_are_refused_by_both_coders_alike() -> None:
    """Flips, cuts, zeroes: ValueError or numbers of the right shape, and both say the same."""
    rng = random.Random(0)
    x = np.abs(np.random.default_rng(2).normal(size=(40, 16)) * 3).astype(np.uint8)
    (code,) = entropy.encode([x])
    refused = 0
    for _ in range(300):
        mutant, results = blind(code, code[::-1], rng), []
        for decode in (entropy.decode, lambda codes, outs: entropy._decode(codes[0], outs[0])):
            out = np.zeros_like(x)
            try:
                decode([mutant], [out])
                results.append(out.tolist())
            except ValueError:
                results.append(None)
        assert results[0] == results[1]
        refused += results[0] is None
    assert refused > 250


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int16, torch.int64])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=4), dtypes, st.sampled_from(["zstd", "rans", "best"]), st.integers(0, 99))
def test_every_tensor_comes_back_from_every_coding(
    shape: list[int], dtype: torch.dtype, coding: str, seed: int
) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)
    data = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
    ((name, small),) = squeeze([Plain(memoryview(data), tuple(x.shape), x.itemsize)], coding)
    assert len(small) <= len(data) and (name != "raw") == (len(small) < len(data))
    assert name in ("raw", coding) or coding == "best"
    (back,) = expand([Coded(name, memoryview(small), len(data), x.itemsize)])
    assert bytes(back) == data


def test_memory_of_a_decoder_is_bounded_by_what_is_declared() -> None:
    ((_, small),) = squeeze([Plain(memoryview(bytes(1 << 20)), (1 << 10, 1 << 10), 1)], "rans")
    for nbytes in (1 << 10, 1 << 19, (1 << 20) + 1):
        tracemalloc.start()
        with pytest.raises(ValueError):
            expand([Coded("rans", memoryview(small), nbytes, 1)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (1 << 20) + (1 << 19)


def test_an_unknown_coding_is_refused() -> None:
    with pytest.raises(StoreError, match="zstd"):
        pack(KEY, {Place(0): torch.zeros(4)}, coding="zsdt")


# ---- CacheGen

LAYERS = 6
KEY = chunk_keys(Identity("w", "t", "float32", ((2, 16, 16),) * LAYERS), range(64), 64)[0]


def planes(dtype: torch.dtype = torch.float32, n: int = 64, seed: int = 0) -> dict[Place, torch.Tensor]:
    """Keys that drift from token to token round a centre of each channel, and values of independent tokens."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for layer in range(LAYERS):
        drift = torch.randn(2, n, 16, generator=rng).cumsum(1) / 8
        out[Place(layer, "key")] = (drift + 3 * torch.randn(2, 1, 16, generator=rng)).to(dtype)
        out[Place(layer, "value")] = torch.randn(2, n, 16, generator=rng).to(dtype)
    return out


def step_of(x: torch.Tensor, place: Place, codec: CacheGen) -> float:
    """The step that the codec should use, from its definition."""
    rows = x.transpose(0, 1).flatten(1).float()
    if codec.form == "paper":
        at = torch.tensor([i for i in range(len(rows)) if i % codec.group])
        unit = (rows[at] - rows[at // codec.group * codec.group]).square().mean().sqrt()
        return float(unit) * BINS[codec.level] * THIRDS[place.layer * 3 // LAYERS]
    unit = (rows - rows.mean(0)).square().mean().sqrt()
    return float(unit) * BINS[codec.level] * (KEYS if place.plane == "key" else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", BINS)
def test_the_error_keeps_to_its_bound(level: int, form: str, dtype: torch.dtype) -> None:
    """Half a step; released: CacheGen's fourth check, m / (2 C) of each token. Plus the rounding of the model's own dtype."""
    codec, given = CacheGen(level, form), planes(dtype)
    stored, notes = codec.encode(given)
    got = codec.decode(stored)
    assert got.keys() == given.keys()
    worst = 0.0
    for place, x in given.items():
        assert got[place].dtype == dtype and got[place].shape == x.shape
        gap = (got[place].float() - x.float()).abs()
        worst = max(worst, float(gap.max()))
        slack = 4 * torch.finfo(dtype).eps * float(x.float().abs().max())
        if form == "released":
            depth = place.layer / LAYERS
            bins = RELEASED[level][place.plane == "value"]
            cut = (depth >= 10 / 32) + (depth >= 20 / 32) if place.plane == "key" else depth >= 2 / 32
            most = bins[int(cut)] // 2 - 1
            bound = x.transpose(0, 1).flatten(1).float().abs().amax(1) / (2 * most)
            assert bool((gap.transpose(0, 1).flatten(1).amax(1) <= bound + slack).all())
        else:
            anchors = torch.zeros(x.shape[1], dtype=torch.bool)
            anchors[:: codec.group] = form == "paper"  # these have 8 bits of their own
            half = step_of(x, place, codec) / 2
            assert float(gap[:, ~anchors].max()) <= half * (1 + 2 * torch.finfo(dtype).eps) + slack
            peak = x.transpose(0, 1).flatten(1).float().abs().amax(1)[:: codec.group]
            assert form != "paper" or bool((gap[:, anchors].amax((0, 2)) <= peak / 254 + slack).all())
    assert notes["max_error"] == pytest.approx(worst) and 0 < notes["mean_error"] < worst


@pytest.mark.parametrize("form", FORMS)
def test_coarser_levels_take_fewer_bytes_and_err_more(form: str) -> None:
    sizes, errors = [], []
    for level in BINS:
        stored, notes = CacheGen(level, form).encode(planes(n=256))
        sizes.append(len(pack(KEY, stored, coding="rans")))
        errors.append(notes["relative_error"])
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors) and len(set(errors)) == len(errors)


def test_differences_to_anchors_take_fewer_bits_where_tokens_are_alike() -> None:
    """CacheGen's third check, on keys that drift, at the same step: the error's bound is the same with and without anchors."""
    keys = {place: x for place, x in planes(n=256).items() if place.plane == "key"}
    with_anchors, _ = CacheGen(2).encode(keys)
    assert all("anchors" in {place.field for place in with_anchors if place.layer == layer} for layer in range(LAYERS))
    alone, _ = CacheGen(2, group=1 << 20).encode(keys)  # one anchor: nothing is near enough to be predicted by it
    assert len(pack(KEY, with_anchors, coding="rans")) < 0.9 * len(pack(KEY, alone, coding="rans"))


def test_values_of_independent_tokens_get_no_anchors() -> None:
    stored, _ = CacheGen(3).encode(planes(n=256))
    assert not [place for place in stored if place.plane == "value" and place.field == "anchors"]


def test_level_0_is_exact_and_so_is_what_has_no_steps() -> None:
    given = planes()
    given[Place(0, "key")] = torch.full((2, 64, 16), 3.5)  # constant
    given[Place(1, "key")][0, 0, 0] = float("inf")
    given[Place(2, "key")] = torch.zeros(2, 64, 16)
    given[Place(3, "key")] = given[Place(3, "key")][:, :1]  # one token
    given[Place(4, "key")] = torch.zeros(2, 0, 16)
    given[Place(5, "key", "codes")] = torch.arange(64, dtype=torch.uint8)
    for form in FORMS:
        for level in (0, 3):
            codec = CacheGen(level, form)
            got = codec.decode(Frame.open(pack(KEY, codec.encode(given)[0], coding="rans")).read())
            assert got.keys() == given.keys()
            for place, x in given.items():
                odd = place.plane == "key" and (place.layer != 5 or place.field == "codes")
                if level == 0 or (odd and not (form == "released" and place.layer in (0, 2))):
                    assert torch.equal(got[place], x), (form, level, place)
    assert CacheGen(0).encode(given)[1]["max_error"] == 0.0


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.sampled_from(FORMS), st.integers(0, 4), st.integers(2, 12),
    st.floats(-30, 30), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_any_shape_and_size_comes_back_finite(
    h: int, n: int, dim: int, form: str, level: int, group: int, exponent: float, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(n)
    x = (torch.randn(h, n, dim, generator=rng) * 2.0**exponent).clamp(-60000, 60000).to(dtype)
    codec = CacheGen(level, form, group)
    got = codec.decode(codec.encode({Place(0): x})[0])[Place(0)]
    assert got.shape == x.shape and got.dtype == dtype and bool(got.isfinite().all())


def test_a_lossy_chunk_is_a_variant_that_nobody_gets_by_accident() -> None:
    given = planes()
    with Store.open("memory://?max=8MiB") as store:
        assert store.put(KEY, given, coding="cachegen(level=3)")
        assert store.get(KEY) is None and store.get(KEY, coding="cachegen(level=2)") is None
        got = store.get(KEY, coding=" cachegen( level = 3 ) ")
        assert got is not None and got.keys() == given.keys()
        room = {Place(1, "value"): torch.empty(2, 64, 16)}
        again = store.get(KEY, [1], into=room, coding="cachegen(level=3)")
        assert again is not None and {place.layer for place in again} == {1}
        assert torch.equal(room[Place(1, "value")], got[Place(1, "value")])
        hit = store.find(KEY.at(parse("cachegen(level=3)").text))
        assert hit is not None and hit.notes["coding"] == "cachegen(level=3, form='fitted', group=10)"
        assert hit.notes["max_error"] > 0
        assert store.put(KEY, given, coding="rans") and store.put(KEY, given, coding="cachegen(level=0)")
        for exact in (store.get(KEY), store.get(KEY, coding="cachegen(level=0)")):
            assert exact is not None and all(torch.equal(exact[place], x) for place, x in given.items())


@pytest.mark.parametrize(
    ("text", "word"),
    [("cachegen(level=9)", "level=9"), ("cachegen(levl=1)", "level"), ("cachegen(form='papr')", "paper"), ("cachgen()", "cachegen"),
     ("cachegen(1)", "cachegen"), ("cachegen(level=", "level"), ("cachegen(group=0)", "group=0"), ("cachegen(level=True)", "True")],
)  # fmt: skip
def test_codings_that_cannot_be(text: str, word: str) -> None:
    with Store.open("memory://?max=1MiB") as store, pytest.raises(StoreError, match=word):
        store.put(KEY, planes(), coding=text)


def test_forged_fields_are_refused() -> None:
    """Frames are checked for accidents, not signed: what a valid one holds may still be nothing that an encoder made."""
    rng, refused = random.Random(0), 0
    for form in FORMS:
        codec = CacheGen(2, form)
        stored, _ = codec.encode({place: x for place, x in planes().items() if place.layer == 1})
        for _ in range(60):
            forged = dict(stored)
            place = rng.choice(list(forged))
            x = forged[place]
            choices = [
                x[:1],
                x.flatten(),
                x.float(),
                x.to(torch.int16),
                x[..., :2],
                torch.zeros(0),
                x.new_zeros(3, 5, 7),
                None,
            ]
            change = rng.choice(choices)
            if change is None:
                del forged[place]
            else:
                forged[place] = change
            try:
                codec.decode(forged)
            except DamagedFrame:
                refused += 1
    assert refused > 60


def test_the_fuzzer_has_frames_of_every_coding() -> None:
    found = {page.coding for data, _ in coded_examples() for page in Frame.open(data).header.pages}
    assert found == {"raw", "zstd", "rans"}


def test_the_card_is_whole() -> None:
    text = CARD.text()
    assert "2310.07240" in text and all(
        getattr(CARD, name) for name in ("claims", "differs", "open", "measured", "bytes")
    )
    assert [option.name for option in CARD.options] == ["level", "form", "group"] and cachegen.CacheGen() == parse(
        "cachegen"
    )
    assert all(option.default == getattr(CacheGen(), option.name) for option in CARD.options)


def test_the_page_about_codings_runs() -> None:
    from tests.test_docs import ROOT, run_blocks

    assert "choose" in run_blocks(ROOT / "docs" / "store-codecs.md")

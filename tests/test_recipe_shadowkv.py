"""The key store of ShadowKV (arXiv 2410.21465)."""

from __future__ import annotations

import pytest
import torch

from kvloom import KVCache, RecipeError, parse
from kvloom.core.sample import samples
from tests.families import prompt, subject
from tests.reference import layers_of, run_cache

SIZES = [100] + [1] * 20


def test_1_rank_of_all_channels_is_the_model() -> None:
    model, ids = subject("llama"), prompt(120)
    want = run_cache(model, KVCache(model), ids, SIZES)
    assert torch.equal(run_cache(model, KVCache(model, "shadowkv"), ids, SIZES), want)


def test_2_error_is_the_tail_of_the_singular_values() -> None:
    model, ids = subject("llama"), prompt(100)
    cache = KVCache(model, "shadowkv(rank=12)")
    run_cache(model, cache, ids, [100])
    (first, *_) = samples(model, [ids], weights=False, pre_rope=True, tell=lambda text: None)
    wide = first.keys.transpose(0, 1).flatten(1)[:64]
    run = layers_of(cache)[0].groups[0].segments["main"].key.runs[0]
    found = run.codec.decode(run.block, run.const).transpose(0, 1).flatten(1)
    tail = torch.linalg.svdvals(wide.double())[12:].square().sum()
    assert float((found - wide).square().sum()) == pytest.approx(float(tail), rel=1e-3)


def test_3_and_5_every_token_once_decoded_ones_exact_and_bytes() -> None:
    """The last four chunks and the rest of a fifth stay exact; a later turn has directions of its own."""
    model, ids = subject("llama"), prompt(240)
    cache = KVCache(model, "shadowkv(rank=8)")
    run_cache(model, cache, ids, SIZES)
    segment = layers_of(cache)[0].groups[0].segments["main"]
    assert [run.n for run in segment.key.runs] == [64, 56] and segment.key.frozen == 64
    found = cache.report().by("plane", "field")
    assert found["key", "x"] == 3 * 64 * 8 * 4 and found["key", "basis"] == 3 * 8 * 32 * 4
    run_cache(model, cache, ids, [60] + [1] * 20)
    segment = layers_of(cache)[0].groups[0].segments["main"]
    assert [run.n for run in segment.key.runs] == [64, 80, 56]
    assert segment.n == 200 and torch.equal(segment.index[0], torch.arange(200, dtype=torch.int32))


def test_options() -> None:
    for wrong in ("rank=0", "chunk=0", "local=-1"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"shadowkv({wrong})")

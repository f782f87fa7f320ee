"""The allotment of key-driven GQA (arXiv 2408.08454)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import KVCache, RecipeError, parse
from kvloom.segments.pooled import allocate
from tests.families import build, prompt
from tests.reference import layers_of, run_cache

SIZES = [40] + [1] * 20


@settings(max_examples=200, deadline=None)
@given(norms=st.lists(st.floats(0.0, 1e4), min_size=1, max_size=8), each=st.integers(1, 6))
def test_2_and_4_all_readers_are_given_out_in_order(norms: list[float], each: int) -> None:
    count = each * len(norms)
    found = allocate(torch.tensor(norms), count)
    assert sum(found) == count and min(found) >= 0
    x = torch.tensor(norms).double()
    if float(x.max() - x.min()) > 1e-5 * float(x.max()):  # before the sum is mended, a larger norm never gets fewer
        shares = ((x - x.min()) / (x - x.min()).sum() * count).round()
        order = x.argsort()
        assert bool((shares[order].diff() >= 0).all())
        if float(shares.sum()) == count:
            assert found == shares.long().tolist()


def test_1_equal_norms_share_evenly() -> None:
    assert allocate(torch.full((4,), 3.0), 12) == [3, 3, 3, 3] and allocate(torch.zeros(2), 8) == [4, 4]
    assert allocate(torch.tensor([1.0, 2.0, 3.0]), 6) == [0, 2, 4]


def test_3_even_shares_of_single_heads_are_the_model() -> None:
    model, ids = build("llama", num_key_value_heads=4), prompt(60)
    got = run_cache(model, KVCache(model, "key-driven-gqa(heads=1, share='even')"), ids, SIZES)
    torch.testing.assert_close(got, run_cache(model, KVCache(model), ids, SIZES), atol=3e-4, rtol=1e-4)


def test_reads_what_the_rule_says_and_bytes() -> None:
    model, ids = build("llama", num_key_value_heads=4), prompt(60)
    cache, full = KVCache(model, "key-driven-gqa(heads=2)"), KVCache(model)
    for each in (cache, full):
        run_cache(model, each, ids, SIZES)
    segment, whole = (layers_of(each)[0].groups[0].segments["main"] for each in (cache, full))
    pooled = whole.key.dense(0, 60).unflatten(0, (2, 2)).mean(1)
    runs = allocate(pooled[:, :40].flatten(1).norm(dim=1), 4)
    reads = torch.repeat_interleave(torch.arange(2), torch.tensor(runs))
    assert torch.equal(segment.key.const["reads"], reads) and torch.equal(segment.value.const["reads"], reads)
    torch.testing.assert_close(segment.key.dense(0, 60), pooled[reads])
    assert cache.report().by("plane", "field")["key", "x"] == 3 * 60 * 2 * 16 * 4


def test_options() -> None:
    for wrong in ("heads=0", "share='some'"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"key-driven-gqa({wrong})")
    with pytest.raises(RecipeError, match="heads=3 does not divide the 4 KV heads"):
        KVCache(build("llama", num_key_value_heads=4), "key-driven-gqa(heads=3)")

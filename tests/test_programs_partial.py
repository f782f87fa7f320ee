"""Partial prefill: fed rows against a full prefill of the same text, on every family that chunks can hold."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import KVCache
from kvloom.core.attention import Logits
from kvloom.errors import CacheError, ModelError
from kvloom.programs import Chunk, compute, context_of, feed, load, place, save, take
from kvloom.programs.rows import attend
from tests.families import FAMILIES, prompt, subject

TOLERANCE = 3e-4  # of logits, fp32
T = 180  # tokens of the text: a chunk of 70, one of 60, and a rest
NO_WINDOW = {
    "mistral-sliding": {"sliding_window": None},
    "gemma2": {"layer_types": ("full_attention",) * 2},
    "gemma3": {"layer_types": ("full_attention",) * 3},
    "gpt-oss": {"layer_types": ("full_attention",) * 2},
}
VARIES = ("llama-dynamic", "llama-longrope")
REFUSED = ("falcon-mqa", "falcon-gqa")  # they make a mask of their own
SERVED = [family for family in FAMILIES if family not in REFUSED]


def model_of(family: str):  # type: ignore[no-untyped-def]
    extra = {k: list(v) if isinstance(v, tuple) else v for k, v in NO_WINDOW.get(family, {}).items()}
    if not extra:
        return subject(family)
    key = (family,)
    if key not in _models:
        from tests.families import build

        _models[key] = build(family, **extra)
    return _models[key]


_models: dict[tuple[str], object] = {}


def text() -> list[int]:
    return prompt(T)[0].tolist()


def prefill(model, ids: list[int], cache: KVCache | None = None) -> Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids]), past_key_values=cache or KVCache(model)).logits[0]
    return logits


def patched(model, ids: list[int]) -> KVCache:  # type: ignore[no-untyped-def]
    """A cache with two chunks computed apart, at their places in the text."""
    cache = KVCache(model)
    place(cache, [compute(model, ids[:70]), compute(model, ids[70:130])], [0, 70])
    return cache


def close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("family", [f for f in SERVED if f not in VARIES])
def test_all_rows_fed_are_a_full_prefill(family: str) -> None:
    model, ids = model_of(family), text()
    cache = patched(model, ids)
    close(feed(model, cache, ids, range(T), logits="all").logits, prefill(model, ids))
    assert cache.get_seq_length() == T and all(layer.rows[0].layer.length == T for layer in cache.managed())


@pytest.mark.parametrize("family", SERVED)
def test_rows_that_stay_are_right_when_others_leave(family: str) -> None:
    """Everything stored is exact, so rows that are narrowed in the middle of the model end up as in a full prefill."""
    model, ids = model_of(family), text()
    cache = KVCache(model)
    want = prefill(model, ids, cache)
    rows = torch.arange(20, T, 3)
    stays = torch.cat([torch.arange(1, len(rows) - 1, 4), torch.tensor([len(rows) - 1])])
    last = len(list(cache.managed())) - 1
    got = feed(model, cache, torch.tensor(ids)[rows], rows, lambda s: stays if s.layer == last - 1 else None, "all")
    assert got.logits is not None
    close(got.logits, want[rows[stays]])
    assert torch.equal(got.index, rows[stays])
    assert got.rows[last - 1] == len(rows) and got.rows[last] == len(stays) == got.went[last - 1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_exact_prefix_chunk_is_a_prefix_hit(family: str) -> None:
    model, ids = model_of(family), text()
    cache = KVCache(model)
    place(cache, compute(model, ids[:90]), 0)
    got = feed(model, cache, ids[90:], range(90, T))
    assert got.logits is not None
    close(got.logits, prefill(model, ids)[-1:])


def test_the_cache_goes_on_as_any_other() -> None:
    model, ids = subject("llama"), text()
    cache, plain = patched(model, ids), KVCache(model)
    feed(model, cache, ids, range(T))
    prefill(model, ids, plain)
    assert cache.nbytes == plain.nbytes
    more = [
        model.generate(torch.tensor([[*ids, 7]]), past_key_values=c, max_new_tokens=12, do_sample=False)
        for c in (cache, plain)
    ]
    assert torch.equal(*more)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "gpt_neox"])
def test_no_row_sees_a_later_key(family: str) -> None:
    """What is stored behind a fed row does not reach it, between the fed rows neither."""
    model, ids = model_of(family), text()
    cache = KVCache(model)
    prefill(model, ids, cache)
    rows = torch.arange(10, 100, 7)
    twin = deepcopy(cache)
    for layer in twin.managed():
        segment = layer.rows[0].layer.groups[0].segments["main"]
        segment.own()
        for plane in (segment.key, segment.value):
            x = plane.runs[0].fields["x"].view
            later = torch.ones(T, dtype=torch.bool)
            later[: int(rows[0]) + 1] = False
            later[rows] = False
            x[:, later] += 50.0
    one = feed(model, cache, torch.tensor(ids)[rows[:1]], rows[:1], logits="all").logits
    other = feed(model, twin, torch.tensor(ids)[rows[:1]], rows[:1], logits="all").logits
    assert one is not None and other is not None
    close(one, other)
    last = torch.tensor([T - 1])
    assert not torch.allclose(
        feed(model, cache, [ids[-1]], last).logits, feed(model, twin, [ids[-1]], last).logits, atol=TOLERANCE
    )


def test_places_without_rows_are_filled_in_the_order_of_the_text() -> None:
    model, ids = subject("llama"), text()
    cache = KVCache(model)
    place(cache, compute(model, ids[30:60]), 30)
    place(cache, compute(model, ids[100:120]), 100)
    rows = [i for i in range(T) if not 40 <= i < 55]  # 15 rows of the first chunk are kept
    feed(model, cache, [ids[i] for i in rows], rows)
    for layer in cache.managed():
        segment = layer.rows[0].layer.groups[0].segments["main"]
        assert torch.equal(segment.index[0].long(), torch.arange(T))
    close(feed(model, cache, ids, range(T), logits="all").logits, prefill(model, ids))


def test_what_a_fork_shares_stays_as_it_is() -> None:
    model, ids = subject("llama"), text()
    cache = patched(model, ids)
    chunk = take(cache, ids[:130], 0, "")
    twin = deepcopy(cache)
    feed(model, twin, ids, range(T))
    again = take(cache, ids[:130], 0, "")
    assert cache.get_seq_length() == 130
    for before, after in zip(chunk.rows, again.rows, strict=True):
        assert torch.equal(before.k, after.k) and torch.equal(before.v, after.v)


def test_a_chunk_is_not_written_to() -> None:
    model, ids = subject("llama"), text()
    chunk = compute(model, ids[:130])
    kept = [(rows.k.clone(), rows.v.clone()) for rows in chunk.rows]
    cache = KVCache(model)
    place(cache, chunk, 0)
    feed(model, cache, ids, range(T))
    assert all(torch.equal(k, rows.k) and torch.equal(v, rows.v) for (k, v), rows in zip(kept, chunk.rows, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "llama-yarn", "llama-llama3", "cohere"])
def test_a_move_is_one_rotation(family: str) -> None:
    """Keys of the first layer depend on token and place alone: moved, they are those that the model computes there."""
    model, ids = model_of(family), text()
    cache = KVCache(model)
    place(cache, compute(model, ids[70:130]), 70)
    plain = KVCache(model)
    prefill(model, ids, plain)
    got, want = (take(c, ids[70:130], 70, "").rows[0] for c in (cache, plain))
    assert float((got.k - want.k).abs().max()) <= 1e-5 * float(want.k.abs().max())
    chunk, back = compute(model, ids[:50]), KVCache(model)
    away = KVCache(model)
    place(away, chunk, 300)
    place(back, take(away, ids[:50], 300, ""), 0)
    for was, now in zip(chunk.rows, take(back, ids[:50], 0, "").rows, strict=True):
        assert float((was.k - now.k).abs().max()) <= 2e-6 * float(was.k.abs().max())
        assert torch.equal(was.v, now.v)


@pytest.mark.parametrize("family", VARIES)
def test_frequencies_that_vary_are_refused(family: str) -> None:
    model, ids = subject(family), text()
    with pytest.raises(ModelError, match="change with the length"):
        place(KVCache(model), compute(model, ids[:20]), 30)


@pytest.mark.parametrize("family", NO_WINDOW)
def test_sliding_windows_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match="cache of their own"):
        compute(subject(family), text()[:20])


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_mask_by_themselves_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match="masks more"):
        feed(subject(family), KVCache(subject(family)), [5, 6, 7], range(3))


def test_misuse() -> None:
    model, ids = subject("llama"), text()
    cache = patched(model, ids)
    with pytest.raises(CacheError, match="is in the cache already"):
        place(cache, compute(model, ids[:20]), 60)
    with pytest.raises(CacheError, match="overlap"):
        place(KVCache(model), [compute(model, ids[:20])] * 2, [0, 10])
    with pytest.raises(CacheError, match="ascending"):
        feed(model, cache, ids[:2], [5, 5])
    with pytest.raises(CacheError, match="last row"):
        feed(model, deepcopy(cache), ids[120:], range(120, T), lambda s: torch.arange(3))
    with pytest.raises(CacheError, match=r"step\.stored"):
        feed(model, deepcopy(cache), ids[120:], range(120, T), lambda s: torch.tensor([0, T - 121]))
    with pytest.raises(CacheError, match="ascending"):
        feed(model, deepcopy(cache), ids[120:], range(120, T), lambda s: torch.tensor([2, 1]))
    with pytest.raises(CacheError, match="exact cache"):
        place(KVCache(model, "kivi(bits=4, group=8)"), compute(model, ids[:20]), 0)
    with pytest.raises(CacheError, match="as many rows"):
        Chunk((1, 2), 0, compute(model, ids[:3]).rows)


def test_store(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("msgspec")
    from kvloom.store import Identity, Store

    model, ids = subject("llama"), text()
    identity = Identity("weights", "tokenizer", "float32", ((2, 16, 16),) * 3)
    chunk = compute(model, ids[10:40], prefix=ids[:10])
    assert chunk.base == 10 and chunk.context == context_of(ids[:10])
    chunk = Chunk(chunk.tokens, chunk.base, chunk.rows, chunk.context, {"note": 1}, {"mass": torch.rand(3, 30)})
    with Store.open("memory://?max=64MiB", f"file://{tmp_path}?max=64MiB") as store:
        assert save(store, identity, chunk)
        back = load(store, identity, ids[10:40], 10, context_of(ids[:10]))
        assert back is not None and torch.equal(back.extra["mass"], chunk.extra["mass"])
        for a, b in zip(chunk.rows, back.rows, strict=True):
            assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v)
        assert load(store, identity, ids[10:40]) is None
        assert load(store, identity, ids[10:40], 10, context_of(ids[1:11])) is None
        assert load(store, identity, [*ids[10:39], 3], 10, chunk.context) is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scattered_rows_attend_as_a_mask_would_have_it(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 400), "slots")
    m = data.draw(st.integers(1, n), "rows")
    dense = data.draw(st.booleans(), "stretches")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    seen = torch.randperm(n, generator=generator)[:m].sort().values + 1
    if dense:  # one long stretch somewhere
        start = int(torch.randint(0, n - m + 1, (1,), generator=generator))
        seen[m // 3 :] = torch.arange(start + m // 3, start + m) + 1
        seen = torch.unique(seen)
    cap = data.draw(st.sampled_from([None, 5.0]))
    q = torch.randn(4, len(seen), 16, generator=generator)
    k, v = (torch.randn(2, n, 16, generator=generator) for _ in range(2))
    out, lse = attend(q, k, v, seen, Logits(0.25, cap))
    s = (q @ k.repeat_interleave(2, 0).mT) * 0.25
    s = s if cap is None else (s / cap).tanh() * cap
    s = s.masked_fill(torch.arange(n) >= seen[:, None], -torch.inf)
    assert torch.allclose(out, s.softmax(-1) @ v.repeat_interleave(2, 0), atol=2e-5)
    assert torch.allclose(lse, s.logsumexp(-1), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_mode_and_16_bits(dtype: torch.dtype) -> None:
    model, ids = deepcopy(subject("llama")).to(dtype), text()
    with torch.inference_mode():
        cache = patched(model, ids)
        rows = torch.arange(60, T)
        feed(model, cache, ids[60:], rows, lambda s: torch.arange(40, len(rows)) if s.layer == 1 else None)
    got = feed(model, cache, ids, range(T)).logits  # writes to what inference mode had made
    want = prefill(model, ids)[-1:]
    assert got is not None
    assert float((got - want).abs().max()) <= (TOLERANCE if dtype == torch.float32 else 0.1)

"""Cache-Craft (arXiv 2502.15734): versions of chunks, their scores, and repair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import CacheError, KVCache
from kvloom.programs import feed, place
from kvloom.programs.cache_craft import ChunkCache, Variant, disorder
from kvloom.programs.chunk import Chunk, take
from tests.families import build, prompt

A, B, C, D = (prompt(n + 1, seed=n)[0, 1:].tolist() for n in (12, 15, 10, 9))
ASK = prompt(6, seed=77)[0, 1:].tolist()


@torch.no_grad()
def full(model: PreTrainedModel, tokens: tuple[int, ...]) -> tuple[Tensor, Chunk]:
    cache = KVCache(model)
    logits = model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1:]
    return logits, take(cache, tokens, 0, "")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_1_the_same_context_costs_nothing(family: str) -> None:
    model = build(family)
    chunks = ChunkCache(model)
    first = chunks.prefill([A, B, C], ASK)
    want = full(model, first.tokens)[0]
    torch.testing.assert_close(first.logits, want, atol=3e-4, rtol=1e-4)
    again = chunks.prefill([A, B, C], ASK)
    assert first.overheads == (None, None, None) and again.overheads == (0.0, 0.0, 0.0)
    assert set(again.rows) == {len(ASK)}
    torch.testing.assert_close(again.logits, want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("options", [{"alpha": 1e9}, {"share": 1.0}], ids=str)
def test_2_everything_computed_again_is_a_full_prefill(family: str, options: dict[str, float]) -> None:
    model = build(family)
    chunks = ChunkCache(model, **options)  # type: ignore[arg-type]
    chunks.prefill([A, B, C], ASK)
    done = chunks.prefill([C, D, B], ASK)
    torch.testing.assert_close(done.logits, full(model, done.tokens)[0], atol=3e-4, rtol=1e-4)
    lazy = ChunkCache(model, alpha=0.0)
    lazy.prefill([A, B, C], ASK)
    got = lazy.prefill([C, D, B], ASK)
    assert set(got.rows) == {len(ASK) + len(D)} and (got.logits - done.logits).abs().max() > 1e-2


def test_3_overhead_falls_with_common_chunks_and_rises_with_disorder() -> None:
    model = build("llama")
    chunks = ChunkCache(model)
    chunks.prefill([A, B, C, D], ASK)
    a, b, c, d = (tuple(x) for x in (A, B, C, D))
    (version,) = chunks.held[d]
    none, one, two = (version.overhead(x) for x in ([], [b], [a, b]))
    assert 1 >= none == version.cci > one > two > version.overhead([a, b, c]) == 0
    assert version.overhead([a, b, c]) < version.overhead([a, c, b]) < version.overhead([c, b, a]) == version.cci
    assert disorder([a, b, c], [a, b, c]) == 0 and disorder([a, b, c], [c, b, a]) == 1 and disorder([a], [b, a]) == 0
    assert disorder([a, b, c], [a, c, b]) == pytest.approx(1 / 3)
    assert chunks.held[a][0].overhead([b, c]) == 0  # nothing stood before it


def test_attention_is_what_the_model_paid() -> None:
    """Mass, inter and CCI from weights that the model itself returns."""
    model = build("llama", attn_implementation="eager")
    with torch.no_grad():
        out = model(torch.tensor([[*A, *B, *C, *ASK]]), output_attentions=True).attentions
    p = torch.stack([x[0] for x in out]).mean((0, 1))  # [T, T]
    chunks = ChunkCache(build("llama"))
    chunks.prefill([A, B, C], ASK)
    (version,) = chunks.held[tuple(C)]
    rows, first, second = slice(27, 37), p[27:37, :12], p[27:37, 12:27]
    torch.testing.assert_close(version.mass, first.sum(1) + second.sum(1), atol=1e-4, rtol=1e-4)
    assert version.inter[tuple(A)] == pytest.approx(float(first.sum()), abs=1e-3)
    outer = float(first.sum()) / (10 * 12) + float(second.sum()) / (10 * 15)
    inner = float(p[rows, rows].sum()) / 100
    assert version.cci == pytest.approx(1 / (1 + math.exp(-outer / inner)), abs=1e-4) and version.cci > 0.5


def test_4_attention_to_the_context_beats_chance() -> None:
    """At equal cost, the tokens that leaned on the old context most are better to compute again than random ones."""
    model, gains = build("llama", num_hidden_layers=4), []
    for seed in range(4):
        x, y, z, new = (prompt(25, seed=10 * seed + i)[0, 1:].tolist() for i in range(4))
        chunks = ChunkCache(model, alpha=0.4)
        chunks.prefill([x, y, z], ASK)
        done = chunks.prefill([new, z], ASK)
        want, exact = full(model, done.tokens)
        version, start, count = chunks.held[tuple(z)][0], len(new), done.rows[0] - len(new) - len(ASK)
        assert 0 < count < len(z)

        def error(cache: KVCache, exact: Chunk = exact, tokens: tuple[int, ...] = done.tokens) -> float:
            pairs = zip(take(cache, tokens, 0, "").rows, exact.rows, strict=True)
            return sum(float((a.v - b.v).square().sum() + (a.k - b.k).square().sum()) for a, b in pairs)

        chance = 0.0
        for each in range(4):
            cache, g = KVCache(model), torch.Generator().manual_seed(each)
            place(cache, version.chunk, start)
            some = torch.randperm(len(z), generator=g)[:count]
            rows = torch.cat(
                [torch.arange(start), start + some.sort().values, torch.arange(start + len(z), len(done.tokens))]
            )
            feed(model, cache, torch.tensor(done.tokens)[rows], rows)
            chance += error(cache) / 4
        gains.append(chance - error(done.cache))
    assert sum(gains) > 0


def test_the_cheapest_version_is_taken() -> None:
    model = build("llama")
    chunks = ChunkCache(model)
    chunks.prefill([A, D], ASK)
    version = chunks.held[tuple(D)][0]
    chunks.held[tuple(D)].append(Variant(version.chunk, (tuple(B),), {tuple(B): 1.0}, version.mass, 0.9, True))
    assert chunks._piece(tuple(D), 0, (tuple(A),)).variant is version
    assert chunks._piece(tuple(D), 0, (tuple(B),)).variant is chunks.held[tuple(D)][1]


def test_versions_behind_repaired_text_are_marked_and_leave_first() -> None:
    model = build("llama")
    chunks = ChunkCache(model, versions=2)
    chunks.prefill([A, B], ASK)
    chunks.prefill([B, D], ASK)  # B without A: repaired, so D is not exact
    assert [v.exact for v in chunks.held[tuple(B)]] == [True] and not chunks.held[tuple(D)][0].exact
    saved = chunks.held[tuple(B)][0].saved
    assert 0 < saved < len(B)
    for exact in (False, True, True):
        old = chunks.held[tuple(D)][0]
        chunks._put(Variant(old.chunk, (), {}, old.mass, 0.9, exact))
    assert [v.exact for v in chunks.held[tuple(D)]] == [True, True]
    small = ChunkCache(model, nbytes=chunks.held[tuple(A)][0].chunk.nbytes + 100)
    small.prefill([A, C], ASK)
    assert small.nbytes <= small.limit and len(small.held) == 1  # type: ignore[operator]


def test_focus_stops_rows_of_chunks_that_the_question_does_not_look_at() -> None:
    model = build("llama", num_hidden_layers=6)
    focused, plain = ChunkCache(model, focus=2, share=0.5), ChunkCache(model, share=0.5)
    for chunks in (focused, plain):
        chunks.prefill([A, B, C], ASK)
    few, all_rows = focused.prefill([C, B, A], ASK), plain.prefill([C, B, A], ASK)
    assert set(all_rows.rows) == {all_rows.rows[0]} and few.rows[:2] == all_rows.rows[:2]
    assert len(ASK) < few.rows[-1] < few.rows[0]
    assert few.cache.get_seq_length() == len(few.tokens)


def test_generate_and_refusals() -> None:
    model = build("llama")
    chunks = ChunkCache(model)
    done = chunks.prefill([A, B], ASK)
    done.cache.crop(-1)
    ids = torch.tensor([done.tokens])
    got = model.generate(ids, past_key_values=done.cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, model.generate(ids, max_new_tokens=4, do_sample=False))
    assert chunks.prefill([], ASK).overheads == ()
    for bad in ({"alpha": -1}, {"versions": 0}, {"share": 2}, {"focus": 0}, {"nbytes": 0}):
        with pytest.raises(CacheError, match="out of range"):
            ChunkCache(model, **bad)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=r"question=\[\]"):
        chunks.prefill([A], [])

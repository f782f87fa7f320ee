"""PIE (arXiv 2407.03157): edits against full recompute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import CacheError, KVCache, ModelError
from kvloom.programs.chunk import Chunk, take
from kvloom.programs.diff import Edit
from kvloom.programs.pie import CodeSession
from tests.families import build, prompt

TEXT = prompt(60)[0].tolist()
NEW = prompt(7, seed=9)[0].tolist()
CHANGES = [Edit(10, 10, tuple(NEW)), Edit(20, 26), Edit(40, 43, tuple(NEW[:2]))]
CHANGED = [*TEXT[:10], *NEW, *TEXT[10:20], *TEXT[26:40], *NEW[:2], *TEXT[43:]]


@torch.no_grad()
def full(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, Chunk]:
    """Logits [1, V] behind the text, and its keys and values."""
    cache = KVCache(model)
    logits = model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1:]
    return logits, take(cache, tokens, 0, "")


def held(session: CodeSession) -> Chunk:
    return take(session.cache, session.tokens, 0, "")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_1_an_edit_at_the_end_is_a_full_recompute(family: str) -> None:
    model = build(family)
    session = CodeSession(model, TEXT)
    done = session.edit([Edit(50, 60, tuple(NEW))])
    assert (done.encoded, done.moved, done.kept) == (7, 0, 50)
    want, chunk = full(model, [*TEXT[:50], *NEW])
    torch.testing.assert_close(session.logits, want, atol=3e-4, rtol=1e-4)
    for got, exact in zip(held(session).rows, chunk.rows, strict=True):
        torch.testing.assert_close(got.k, exact.k, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.v, exact.v, atol=1e-4, rtol=1e-4)


def test_2_nothing_edited_and_there_and_back() -> None:
    model = build("llama")
    session = CodeSession(model, TEXT)
    before, logits = held(session), session.logits
    assert session.update(TEXT).encoded == 0 and session.edit([]).kept == 60
    assert session.logits is logits
    assert all(
        torch.equal(a.k, b.k) and torch.equal(a.v, b.v) for a, b in zip(before.rows, held(session).rows, strict=True)
    )
    for _ in range(5):
        assert session.insert(20, NEW).moved == 40 and session.delete(20, 27).moved == 40
    for a, b in zip(before.rows, held(session).rows, strict=True):
        torch.testing.assert_close(a.k[:, :-1], b.k[:, :-1], atol=2e-6, rtol=2e-6)  # all but the last token, run again
        assert torch.equal(a.v[:, :-1], b.v[:, :-1])


def test_3_layer_0_is_exact_and_values_behind_an_edit_stay() -> None:
    model = build("llama")
    session = CodeSession(model, TEXT)
    stale = held(session)
    done = session.edit(CHANGES)
    assert list(session.tokens) == CHANGED and done.encoded == 10
    assert (done.moved, done.kept) == (24, 27)  # the last 17 tokens stand where they stood
    exact, got = full(model, CHANGED)[1], held(session)
    torch.testing.assert_close(got.rows[0].k, exact.rows[0].k, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.rows[0].v, exact.rows[0].v, atol=1e-4, rtol=1e-4)
    assert torch.equal(got.rows[2].v[:, 17:27], stale.rows[2].v[:, 10:20])  # behind the first edit
    new = slice(10, 17)  # the first edit's tokens saw nothing stale
    torch.testing.assert_close(got.rows[2].k[:, new], exact.rows[2].k[:, new], atol=1e-4, rtol=1e-4)


def test_4_rotating_helps() -> None:
    """Keys behind the edit are nearer to the recomputed ones than unrotated ones are, in every layer."""
    model = build("llama", num_hidden_layers=4)
    session = CodeSession(model, TEXT)
    stale = held(session)
    session.insert(10, NEW)
    exact, got = full(model, [*TEXT[:10], *NEW, *TEXT[10:]])[1], held(session)
    for layer in range(4):
        want, turned, left = (x.rows[layer].k for x in (exact, got, stale))
        cos = [torch.cosine_similarity(want[:, 17:-1], x, -1).mean() for x in (turned[:, 17:-1], left[:, 10:-1])]
        assert cos[0] > cos[1] + 0.01 and cos[0] > 0.5


@pytest.mark.parametrize("changes", [CHANGES, CHANGES[:1], CHANGES[1:2]], ids=["several", "insertion", "deletion"])
def test_everything_refreshed_is_a_full_prefill(changes: list[Edit]) -> None:
    model = build("llama")
    session = CodeSession(model, TEXT, refresh=100)
    session.edit(changes)
    want, _ = full(model, list(session.tokens))
    torch.testing.assert_close(session.logits, want, atol=3e-4, rtol=1e-4)
    lazy = CodeSession(model, TEXT)
    lazy.edit(changes)
    assert (lazy.logits - want).abs().max() > 1e-2  # what is stale shows


def test_updates_find_the_edits_and_many_edits_stay_in_few_pieces() -> None:
    model, g = build("llama"), torch.Generator().manual_seed(0)
    session = CodeSession(model, TEXT)
    assert session.update(CHANGED).encoded == 10 and session.tokens == tuple(CHANGED)
    text = list(CHANGED)
    for _ in range(80):
        at, tokens = int(torch.randint(1, len(text) - 8, (1,), generator=g)), torch.randint(3, 300, (2,), generator=g)
        text[at : at + 2] = tokens.tolist()
        session.update(text)
    assert list(session.tokens) == text and len(session._pieces) <= 64
    assert sum(len(c) for _, c in session._pieces) == len(text)
    exact = full(model, text)[1]
    torch.testing.assert_close(held(session).rows[0].k, exact.rows[0].k, atol=1e-4, rtol=1e-4)


def test_generate_goes_on_behind_the_text() -> None:
    model = build("llama")
    session = CodeSession(model, TEXT, refresh=100)
    session.edit(CHANGES)
    cache, ids = session.prompt()
    got = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    want = model.generate(torch.tensor([CHANGED]), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, want) and session.cache.get_seq_length() == len(CHANGED)


def test_refusals() -> None:
    model = build("llama")
    session = CodeSession(model, TEXT)
    for bad in ([Edit(50, 70)], [Edit(5, 9), Edit(8, 12)], [Edit(-1, 3)]):
        with pytest.raises(CacheError, match="overlaps another or lies outside"):
            session.edit(bad)
    with pytest.raises(CacheError, match="deletes the whole text"):
        session.delete(0, 60)
    with pytest.raises(CacheError, match="no tokenizer"):
        session.update("x = 1")
    with pytest.raises(CacheError, match="at least one token"):
        CodeSession(model, [])
    with pytest.raises(CacheError, match="refresh=-1"):
        CodeSession(model, TEXT, refresh=-1)
    assert list(session.tokens) == TEXT
    with pytest.raises(ModelError, match="RoPE change with the length"):
        CodeSession(build("llama-dynamic"), TEXT).insert(3, NEW)

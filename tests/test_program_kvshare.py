"""KVShare (arXiv 2503.16525): similar prompts share keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import CacheError, KVCache, RecipeError
from kvloom.programs import feed, place
from kvloom.programs.chunk import Chunk, take
from kvloom.programs.kvshare import SharedPrompts, kvshare
from kvloom.programs.method import Span, Text, methods, parse_method
from tests.families import build, prompt

OLD = prompt(64)[0].tolist()
NEW = [*OLD[:10], 200, 201, 202, *OLD[14:34], 210, *OLD[40:], 33, 34]


@torch.no_grad()
def full(model: PreTrainedModel, tokens: list[int]) -> tuple[Tensor, Chunk]:
    cache = KVCache(model)
    logits = model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1:]
    return logits, take(cache, tokens, 0, "")


def test_1_an_identical_prompt_is_reused() -> None:
    model = build("llama")
    prompts = SharedPrompts(model)
    one, two = prompts.prefill(OLD), prompts.prefill(OLD)
    want, exact = full(model, OLD)
    assert (one.reused, two.reused) == (0, 64)
    for done in (one, two):
        torch.testing.assert_close(done.logits, want, atol=3e-4, rtol=1e-4)
    got = take(two.cache, OLD, 0, "")
    assert all(
        torch.equal(a.k[:, :-1], b.k[:, :-1]) for a, b in zip(got.rows, take(one.cache, OLD, 0, "").rows, strict=True)
    )
    assert not bool(two.deviation.any())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_2_everything_computed_again_is_a_full_prefill(family: str) -> None:
    model = build(family, num_hidden_layers=4)  # the check layer is computed for all rows, so two show nothing
    prompts = SharedPrompts(model, ratio=1.0)
    prompts.prefill(OLD)
    done = prompts.prefill(NEW)
    assert done.reused == 10 + 20 + 24
    torch.testing.assert_close(done.logits, full(model, NEW)[0], atol=3e-4, rtol=1e-4)
    lazy = SharedPrompts(model, ratio=0.0)
    lazy.prefill(OLD)
    assert (lazy.prefill(NEW).logits - done.logits).abs().max() > 1e-2


def test_3_nothing_in_common_or_another_tenant_is_a_full_prefill() -> None:
    model = build("llama")
    prompts = SharedPrompts(model, ratio=0.0)
    prompts.prefill(OLD, tenant="a")
    for tokens, tenant in ((prompt(40, seed=5)[0].tolist(), "a"), (NEW, "b")):
        done = prompts.prefill(tokens, tenant)
        assert done.reused == 0
        torch.testing.assert_close(done.logits, full(model, tokens)[0], atol=3e-4, rtol=1e-4)


def test_4_more_repair_is_better_and_deviation_beats_chance() -> None:
    model, ratios = build("llama", num_hidden_layers=4), (0.0, 0.2, 0.5, 1.0)
    errors, chance = [], 0.0
    exact = full(model, NEW)[1]

    def error(cache: KVCache) -> float:
        got = take(cache, NEW, 0, "")
        pairs = zip(got.rows, exact.rows, strict=True)
        return sum(float((a.k - b.k).square().sum() + (a.v - b.v).square().sum()) for a, b in pairs)

    for ratio in ratios:
        prompts = SharedPrompts(model, ratio=ratio)
        prompts.prefill(OLD)
        errors.append(error(prompts.prefill(NEW).cache))
    assert errors == sorted(errors, reverse=True) and errors[0] > 100 * errors[-1]
    chunk, found = prompts.partner(NEW) or pytest.fail("nothing in common")
    for seed in range(3):
        cache, g = KVCache(model), torch.Generator().manual_seed(seed)
        place(cache, [chunk.part(m.old, m.old + m.n) for m in found], [m.new for m in found])
        text = Text(tuple(NEW), tuple(Span(m.new, m.new + m.n, chunk, m.new == 0) for m in found))
        stale, rows = text.stale, text.fed(~text.exact)
        goes = torch.ones(len(NEW), dtype=torch.bool)
        goes[stale.nonzero()[:, 0][torch.randperm(int(stale.sum()), generator=g)[round(0.2 * int(stale.sum())) :]]] = (
            False
        )
        feed(model, cache, torch.tensor(NEW)[rows], rows, lambda s: goes[s.index] if s.layer == 1 else None)  # noqa: B023
        chance += error(cache) / 3
    assert errors[1] < chance


def test_decoding_repairs_what_attention_leans_on() -> None:
    model = build("llama")
    lazy = SharedPrompts(model, ratio=0.1, decode=0.0)
    eager = SharedPrompts(model, ratio=0.1, decode=1.0, every=2)
    some = SharedPrompts(model, ratio=0.1, decode=0.1, every=4)
    for prompts in (lazy, eager, some):
        prompts.prefill(OLD)
    a, b, c = lazy.prefill(NEW), eager.prefill(NEW), some.prefill(NEW)
    stale = int((b.deviation > 0).sum())
    assert stale == 44 - 4  # of the rows behind the first edit, a tenth is fresh
    for prompts, done in ((lazy, a), (eager, b), (some, c)):
        assert len(prompts.generate(done, 6)) == 6
    assert (a.repaired, b.repaired, c.repaired) == (0, stale, 4) and not bool(b.deviation.any())
    exact = full(model, NEW)[1]

    def error(cache: KVCache) -> float:
        got = take(cache, NEW, 0, "")
        return sum(float((x.v - y.v).square().sum()) for x, y in zip(got.rows, exact.rows, strict=True))

    assert error(b.cache) < error(c.cache) < error(a.cache)
    masses = SharedPrompts(model, decode=0.5, every=100)
    masses.prefill(OLD)
    done = masses.prefill(NEW)
    masses.generate(done, 3)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    assert 0 < float(done.mass.sum()) < 3 * layers * heads


def test_prompts_with_stale_text_are_not_shared_on_and_old_ones_leave() -> None:
    model = build("llama")
    prompts = SharedPrompts(model, prompts=2)
    prompts.prefill(OLD)
    prompts.prefill(NEW)
    assert len(prompts._held) == 1
    prompts.prefill(prompt(20, seed=3)[0].tolist())
    prompts.prefill(NEW)  # uses OLD
    prompts.prefill(prompt(20, seed=4)[0].tolist())
    assert prompts.partner(NEW) is not None and len(prompts._held) == 2


def test_the_method_has_a_name_and_refuses() -> None:
    assert "kvshare" in methods() and str(parse_method("kvshare(ratio=0.5)")) == "kvshare(ratio=0.5)"
    with pytest.raises(RecipeError, match="ratio=2"):
        kvshare(2)
    with pytest.raises(RecipeError, match="check=0"):
        kvshare(check=0)
    with pytest.raises(CacheError, match="every=0 is out of range"):
        SharedPrompts(build("llama"), every=0)
    with pytest.raises(CacheError, match=r"tokens=\[\]"):
        SharedPrompts(build("llama")).prefill([])

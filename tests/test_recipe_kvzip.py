"""KVzip (arXiv 2505.23416). Faithful if:

1. with a budget of the whole text logits are the full cache's, and the text is not read twice;
2. a slot's score is the largest weight that it receives from any row, of any query head of its KV head, while its chunk is
   repeated behind the text (beside the weights that the model gives out itself);
3. what stays are the best scores of all heads and layers together, as many as the budget says, and the first tokens;
4. nothing of the repetition stays: places, length and later logits are those of the text alone;
5. what is asked later has no say in what is kept, and several questions find the same cache.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import CacheError, KVCache, RecipeError, detach, parse
from tests.families import build, prompt
from tests.reference import kept, layers_of, run_cache


def weights(model: Any, ids: Tensor, again: Tensor) -> list[Tensor]:
    """Attention [Hq, rows, T] that the text ids gets, in each layer, from `again` read behind it; by the model's own eager code."""
    eager = build("llama")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        found = eager(torch.cat([ids, again], 1), output_attentions=True).attentions
    return [x[0, :, ids.shape[1] :, : ids.shape[1]] for x in found]


def reference(model: Any, ids: Tensor, chunk: int, cue: int, ask: tuple[int, ...]) -> Tensor:
    """Scores [layers, H, T]."""
    n = ids.shape[1]
    scores = torch.zeros(3, 2, n)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        again = torch.cat([torch.tensor([ask], dtype=torch.long), ids[:, max(0, start - cue) : stop]], 1)
        for layer, x in enumerate(weights(model, ids, again)):
            scores[layer, :, start:stop] = x.unflatten(0, (2, 2)).amax((1, 2))[:, start:stop]
    return scores


@pytest.mark.parametrize(("chunk", "cue", "ask"), [(2048, 8, ()), (30, 8, ()), (25, 0, (5, 9, 7))])
@pytest.mark.parametrize("budget", [20, 50])
def test_keeps_what_repeating_looks_at(chunk: int, cue: int, ask: tuple[int, ...], budget: int) -> None:
    model, ids = build("llama"), prompt(100)
    cache = KVCache(model, f"kvzip(budget={budget}, chunk={chunk}, cue={cue}, sinks=2, ask={ask})")
    got = run_cache(model, cache, ids, [100])
    torch.testing.assert_close(got, run_cache(model, KVCache(model), ids, [100]))  # the prompt itself sees all
    scores = reference(model, ids, chunk, cue, ask)
    for i, layer in enumerate(layers_of(cache)):
        for group in layer.groups:
            heads = range(2) if group.heads is None else group.heads.tolist()
            segment = group.segments["main"]
            for at, h in enumerate(heads):
                index = segment.index.expand(len(heads), -1)[at].long()
                torch.testing.assert_close(segment.column("score")[at], scores[i, h, index], atol=1e-4, rtol=1e-3)
    scores[..., :2] = torch.inf
    best = set(scores.flatten().topk(budget * 6).indices.tolist())
    held = {(i * 2 + h) * 100 + t for i, layer in enumerate(kept(cache)) for h, head in enumerate(layer) for t in head}
    assert len(held) == budget * 6 and len(held - best) <= 2  # scores that are equal up to rounding
    assert cache.get_seq_length() == 100 and len({len(head) for layer in kept(cache) for head in layer}) > 1


def test_exact_and_read_once_while_everything_fits() -> None:
    model, ids, calls = build("llama"), prompt(90), []
    model.register_forward_hook(lambda *x: calls.append(1))
    want = run_cache(model, DynamicCache(config=model.config), ids, [80] + [1] * 10)
    got = run_cache(model, KVCache(model, "kvzip(budget=90)"), ids, [80] + [1] * 10)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert len(calls) == 22


def test_the_repetition_leaves_no_trace() -> None:
    """A cache that holds all but the worst slots goes on as the full one does: same places, same length."""
    model, ids = build("llama"), prompt(70)
    cache = KVCache(model, "kvzip(budget=59)")
    got = run_cache(model, cache, ids, [60] + [1] * 10)
    want = run_cache(model, KVCache(model), ids, [60] + [1] * 10)
    assert float((got - want).abs().median()) < 0.02 and sum(len(h) for x in kept(cache) for h in x) == 6 * 69
    assert all(head[-10:] == list(range(60, 70)) for layer in kept(cache) for head in layer)
    assert "text" in str(cache.report())  # decoded tokens wait to be read again


def test_later_turns_compete_with_the_text_before() -> None:
    model = build("llama")
    cache = KVCache(model, "kvzip(budget=30, chunk=16)")
    ids = prompt(140)

    def check(length: int) -> None:
        held = sum(len(head) for layer in kept(cache) for head in layer)
        assert held == 180 if length in (60, 100, 140) else held <= 6 * 38

    run_cache(model, cache, ids, [60] + [1] * 5 + [35] + [40], check)
    assert any(t >= 105 for layer in kept(cache) for head in layer for t in head)


def test_recent_tokens_stay_if_asked_for() -> None:
    model = build("llama")
    cache = KVCache(model, "kvzip(budget=30, recent=12)")
    run_cache(model, cache, prompt(100), [100])
    assert all(head[-12:] == list(range(88, 100)) for layer in kept(cache) for head in layer)
    assert sum(len(head) for layer in kept(cache) for head in layer) == 180


def test_questions_have_no_say() -> None:
    model, ids = build("llama"), prompt(100)
    cache = KVCache(model, "kvzip(budget=40)")
    run_cache(model, cache, ids, [100])
    before = kept(cache)
    for seed in (1, 2):
        twin = copy.deepcopy(cache)
        run_cache(model, twin, torch.cat([ids, prompt(9, seed=seed)], 1), [1] * 9)
        assert [
            [h[: len(b)] for h, b in zip(x, y, strict=True)] for x, y in zip(kept(twin), before, strict=True)
        ] == before


def test_generate_batches_and_other_models() -> None:
    model = build("llama")
    ids = torch.cat([prompt(60, seed=1), prompt(60, seed=2)])
    cache = KVCache(model, "kvzip(budget=20)")
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert (
        out.shape == (2, 65)
        and sum(
            len(h)
            for x in kept(
                cache,
            )
            for h in x
        )
        == 6 * 24
    )
    alone = KVCache(model, "kvzip(budget=20)")
    run_cache(model, alone, ids[1:], [60])
    both = KVCache(model, "kvzip(budget=20)")
    run_cache(model, both, ids, [60])
    from tests.reference import held

    assert held(both, 1) == held(alone)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :20] = 0
    with pytest.raises(CacheError, match="equally long"):
        model(ids, attention_mask=mask, past_key_values=KVCache(model, "kvzip(budget=20)"))
    with pytest.raises(CacheError, match="input_ids"):
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, past_key_values=KVCache(model, "kvzip(budget=20)"))
    for family in ("gemma3", "qwen3"):
        other = build(family)
        few = KVCache(other, "kvzip(budget=20)")
        run_cache(other, few, prompt(60), [60])
        assert few.get_seq_length() == 60 and sum(len(h) for x in kept(few) for h in x) == 20 * sum(map(len, kept(few)))
    detach(model)
    assert not model._forward_hooks


def test_drafts_are_read_when_accepted() -> None:
    model, ids = build("llama"), prompt(60)
    cache = KVCache(model, "kvzip(budget=70)")
    run_cache(model, cache, ids, [50])
    cache.activate_past_recording()
    run_cache(model, cache, ids, [10])
    cache.crop(-4)
    assert layers_of(cache)[0].unread.view[0].tolist() == ids[0, :56].tolist()


def test_bytes_and_codecs() -> None:
    model = build("llama")
    full, few = KVCache(model, "full"), KVCache(model, "kvzip(budget='40KiB')")
    coded = KVCache(model, "kvzip(budget=100) | kivi(bits=4, group=16, residual=16)")
    for cache in (full, few, coded):
        assert bool(run_cache(model, cache, prompt(400), [400]).isfinite().all())
    assert 30 * 1024 < few.report().used <= 40 * 1024 < full.report().used
    assert coded.report().used < few.report().used


@pytest.mark.parametrize(
    "text", ["kvzip(chunk=0)", "kvzip(cue=-1)", "kvzip(sinks=0)", "kvzip(ask='Repeat')", "kvzip(budget=4)"]
)
def test_options(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text)

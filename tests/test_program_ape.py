"""APE (arXiv 2502.05431) against its formula, one KV head at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvloom import CacheError, KVCache, ModelError, RecipeError
from kvloom.core import attention
from kvloom.programs.ape import ParallelContexts
from tests.families import build, prompt
from tests.reference import Full, Slots, rope, run, run_cache

PREFIX, LENGTHS, QUERY = 5, (9, 17, 12), 11
SIZES = [7, 1, 1, 2]  # of the query: a forward of several tokens, and decoding


def texts(seed: int = 0) -> tuple[list[int], list[list[int]], Tensor]:
    """Prefix, contexts, query [1, n]."""
    ids = prompt(PREFIX + sum(LENGTHS) + QUERY, seed=seed)[0].tolist()
    at, parts = PREFIX, []
    for n in LENGTHS:
        parts.append(ids[at : at + n])
        at += n
    return ids[:PREFIX], parts, torch.tensor([ids[at:]])


class Reference(Full):
    """Two softmaxes for each query: over the contexts with a temperature, and over the rest; then the two joined."""

    def __init__(
        self, model: Any, prefix: list[int], contexts: list[list[int]], temperature: float, scale: float
    ) -> None:
        super().__init__(model)
        self.temperature, self.scale, self.first = temperature, scale, len(prefix) + max(map(len, contexts))
        for context in contexts:
            alone = Full(model)
            run(alone, torch.tensor([[*prefix, *context]]), [len(prefix) + len(context)])
            for at, s in alone.slots.items():
                s.score = (torch.arange(len(s.k)) >= len(prefix)).float()
                if at in self.slots:
                    s.keep(s.score == 1)
                    s = Slots(
                        *(torch.cat(x) for x in zip(vars(self.slots[at]).values(), vars(s).values(), strict=True))
                    )
                self.slots[at] = s

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        place, g, outs = torch.arange(self.first + start, self.first + start + q.shape[1]), len(q) // len(k), []
        for h in range(len(k)):
            old, m = self.slots[layer, h], q.shape[1]
            new = (rope(self.model, k[h], place), v[h], place, torch.zeros(m))
            s = self.slots[layer, h] = Slots(*(torch.cat(x) for x in zip(vars(old).values(), new, strict=True)))
            logits = rope(self.model, q[h * g : (h + 1) * g], place) @ s.k.T * q.shape[-1] ** -0.5
            context = s.score == 1
            c, rest = logits[..., context] / self.temperature, logits[..., ~context]
            rest = rest.masked_fill(s.index[~context] > place[:, None], -torch.inf)
            both = torch.stack([c.logsumexp(-1) * self.scale * self.temperature, rest.logsumexp(-1)], -1).softmax(-1)
            out = c.softmax(-1) @ s.v[context] * both[..., :1] + rest.softmax(-1) @ s.v[~context] * both[..., 1:]
            outs.append(out)
        return torch.cat(outs)


def asked(model: PreTrainedModel, cache: KVCache, query: Tensor, sizes: list[int] = SIZES) -> Tensor:
    """Logits of the query [1, n], read in forwards of these sizes."""
    blank = torch.zeros(1, cache.get_seq_length(), dtype=torch.long)
    return run_cache(model, cache, torch.cat([blank, query], 1), sizes)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize(("temperature", "scale"), [(0.9, 0.9), (0.3, 1.4), (1.0, 1.0)])
def test_logits_follow_the_formula(
    temperature: float, scale: float, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(attention, "kernels_for", lambda q: None)
    model, (prefix, contexts, query) = build("llama"), texts()
    want = run(Reference(model, prefix, contexts, temperature, scale), query, SIZES)
    ape = ParallelContexts(model, prefix, temperature=temperature, scale=scale)
    got = asked(model, ape.cache([ape.encode(each) for each in contexts]), query)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "falcon-mqa", "llama-yarn"])
def test_1_one_context_is_the_plain_text(family: str) -> None:
    model, (prefix, contexts, query) = build(family), texts()
    ids = torch.tensor([[*prefix, *contexts[1], *query[0].tolist()]])
    want = run_cache(model, DynamicCache(config=model.config), ids, [ids.shape[1]])[-QUERY:]
    ape = ParallelContexts(model, prefix, temperature=1, scale=1)
    torch.testing.assert_close(asked(model, ape.cache([ape.encode(contexts[1])]), query), want, atol=3e-4, rtol=1e-4)
    other = ParallelContexts(model, prefix)
    assert (
        asked(model, other.cache([other.encode(contexts[1])]), query) - want
    ).abs().max() > 1e-2  # the options matter


def test_2_the_order_of_contexts_means_nothing() -> None:
    model, (prefix, contexts, query) = build("llama"), texts()
    ape = ParallelContexts(model, prefix)
    held = [ape.encode(each) for each in contexts]
    one, two = (asked(model, ape.cache(each), query) for each in (held, held[::-1]))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_3_plain_parallel_encoding_is_one_softmax() -> None:
    model, (prefix, contexts, query) = build("llama"), texts()

    class Plain(Reference):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            return Full.attend(self, layer, q, k, v, self.first + start)

    want = run(Plain(model, prefix, contexts, 1, 1), query, SIZES)
    ape = ParallelContexts(model, prefix, temperature=1, scale=1)
    got = asked(model, ape.cache([ape.encode(each) for each in contexts]), query)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


def test_4_a_query_loads_stored_bytes_and_computes_no_context() -> None:
    model, (prefix, contexts, query) = build("llama"), texts()
    ape = ParallelContexts(model, prefix)
    held = [ape.encode(each) for each in contexts]
    rows: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *x: rows.append(x[1][0].shape[1]))
    cache, ids = ape.prompt(held, query)
    assert not rows
    for i, layer in enumerate(cache.managed()):
        segment = layer.rows[0].layer.groups[0].segments["contexts"]
        assert torch.equal(segment.key.dense(0, segment.n), torch.cat([each.rows[i].k for each in held], 1))
        assert torch.equal(segment.value.dense(0, segment.n), torch.cat([each.rows[i].v for each in held], 1))
    held_bytes = sum(x.nbytes for x in cache.report().entries if x.segment == "contexts" and x.plane != "column")
    assert held_bytes == sum(each.nbytes for each in held)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    hook.remove()
    assert rows == [QUERY, 1, 1, 1]
    twin = ape.cache(held)
    logits = asked(model, twin, query, [QUERY])
    for token in out[0, ids.shape[1] :]:
        assert int(logits[-1].argmax()) == int(token)
        logits = asked(model, twin, token.view(1, 1), [1])


def test_codecs_store_contexts() -> None:
    model, (prefix, contexts, query) = build("llama"), texts()
    exact, coded = (ParallelContexts(model, prefix, recipe=r) for r in ("full", "kivi(bits=8, group=8, residual=8)"))
    caches = [ape.cache([ape.encode(each) for each in contexts]) for ape in (exact, coded)]
    want, got = (asked(model, cache, query) for cache in caches)
    segment = next(caches[1].managed()).rows[0].layer.groups[0].segments["contexts"]
    assert segment.key.frozen == 32 and segment.n == sum(LENGTHS)
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()


def test_forks_beams_and_cropping() -> None:
    model, (prefix, contexts, query) = build("llama"), texts()
    ape = ParallelContexts(model, prefix)
    cache, ids = ape.prompt([ape.encode(each) for each in contexts], query)
    twin, start = copy.deepcopy(cache), cache.get_seq_length()
    want = asked(model, cache, query, [QUERY])
    cache.crop(start - cache.get_seq_length())
    torch.testing.assert_close(asked(model, cache, query, [QUERY]), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(asked(model, twin, query, [QUERY]), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(CacheError, match="cannot crop"):
        cache.crop(-QUERY - 1)
    beams_cache = ape.cache([ape.encode(each) for each in contexts])
    beams_cache.batch_repeat_interleave(2)
    beams = model.generate(ids, past_key_values=beams_cache, num_beams=2, max_new_tokens=3, do_sample=False)
    assert beams.shape == (1, ids.shape[1] + 3)


def test_no_contexts_and_no_prefix() -> None:
    model, (prefix, contexts, query) = build("llama"), texts()
    plain = torch.cat([torch.tensor([prefix]), query], 1)
    want = run_cache(model, DynamicCache(config=model.config), plain, [plain.shape[1]])[PREFIX:]
    torch.testing.assert_close(
        asked(model, ParallelContexts(model, prefix).cache([]), query), want, atol=3e-4, rtol=1e-4
    )
    bare = ParallelContexts(model, temperature=1, scale=1)
    ids = torch.cat([torch.tensor([contexts[0]]), query], 1)
    want = run_cache(model, DynamicCache(config=model.config), ids, [ids.shape[1]])[len(contexts[0]) :]
    got = asked(model, bare.cache([bare.encode(contexts[0])]), query)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


def test_refusals() -> None:
    model = build("llama")
    with pytest.raises(RecipeError, match="temperature=0 must be"):
        ParallelContexts(model, temperature=0)
    with pytest.raises(RecipeError, match="scale=-1 must be"):
        ParallelContexts(model, scale=-1)
    with pytest.raises(RecipeError, match="drops slots"):
        ParallelContexts(model, recipe="snapkv(budget=64)")
    with pytest.raises(ModelError, match="keep a cache of their own"):
        ParallelContexts(build("gemma2"))
    with pytest.raises(CacheError, match="without tokens"):
        ParallelContexts(model).encode([])
    with pytest.raises(CacheError, match="another prefix"):
        ParallelContexts(model, [1, 2]).cache([ParallelContexts(model, [1, 3]).encode([4, 5])])

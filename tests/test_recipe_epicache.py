"""EpiCache: what a probe asks for, how much layers and heads keep, and conversations in episodes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import KVCache, RecipeError
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.update import watched
from kvloom.errors import CacheError, KvloomError, ProfileError
from kvloom.policies.budgets import Tokens, Weighted
from kvloom.policies.placements import Keep
from kvloom.policies.scorers import Peak
from kvloom.programs.epicache import EpiCache
from kvloom.programs.episodes import Ngrams, clusters, episodes
from kvloom.recipes.epicache import calibrate
from tests.examples import byte_tokenizer
from tests.families import build


def text(n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (1, n), generator=torch.Generator().manual_seed(seed))


def feed(model: Any, cache: KVCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def kept(cache: KVCache) -> list[list[set[int]]]:
    """Places in the text that each head of each layer holds."""
    found = []
    for layer in cache.managed():
        heads: dict[int, set[int]] = {}
        for group in layer.rows[0].layer.groups:
            segment = group.segments["main"]
            at = segment.index.expand(group.heads_of(layer.site), -1) if segment.n else torch.zeros(99, 0)
            for i, head in enumerate(range(layer.site.kv_heads) if group.heads is None else group.heads.tolist()):
                heads[head] = set(at[i].tolist())
        found.append([heads[head] for head in sorted(heads)])
    return found


@pytest.mark.parametrize("heads", ["pooled", "even"])
def test_a_probe_keeps_what_its_queries_look_at_most(heads: str) -> None:
    """Against plain code: softmax over the stored keys alone, the largest over queries and heads of a group."""
    model, ids, question = build("llama"), text(90), text(12, 1)
    full, cache = KVCache(model, "full"), KVCache(model, f"epicache(budget=20, window=None, heads={heads!r})")
    feed(model, full, ids)
    feed(model, cache, ids)
    asked: dict[int, Tensor] = {}
    with watched(lambda layer, q, *_: asked.setdefault(layer, q)):
        feed(model, full, question)
    cache.probe(model, question)
    assert cache.get_seq_length() == 90
    for layer, found in zip(full.managed(), kept(cache), strict=True):
        keys = layer.rows[0].layer.groups[0].segments["main"].key.dense(0, 90)
        s = torch.einsum("hgqd,hnd->hgqn", asked[layer.site.layer][0].unflatten(0, (2, 2)), keys) * 16**-0.5
        score = s.softmax(-1).amax((1, 2))
        if heads == "even":
            assert found == [set(row.topk(20).indices.tolist()) for row in score]
        else:
            best = score.flatten().topk(40).indices.tolist()
            assert found == [{i % 90 for i in best if i // 90 == head} for head in range(2)]


def test_without_a_probe_the_newest_queries_ask() -> None:
    model, ids = build("llama"), text(90)
    full, cache = KVCache(model, "full"), KVCache(model, "epicache(budget=20, window=8, heads='even')")
    asked: dict[int, Tensor] = {}
    with watched(lambda layer, q, *_: asked.setdefault(layer, q)):
        feed(model, full, ids)
    feed(model, cache, ids)
    for layer, found in zip(full.managed(), kept(cache), strict=True):
        keys = layer.rows[0].layer.groups[0].segments["main"].key.dense(0, 90)
        s = torch.einsum("hgqd,hnd->hgqn", asked[layer.site.layer][0, :, -8:].unflatten(0, (2, 2)), keys) * 16**-0.5
        s = s.masked_fill(torch.ones(90, 90).triu(1).bool()[-8:], -torch.inf)
        assert found == [set(row.topk(20).indices.tolist()) for row in s.softmax(-1).amax((1, 2))]


def test_blocks_probes_and_budgets() -> None:
    """After each block as many slots as the budget says; a ledger sampled all along stays below budget and one block."""
    model, question = build("llama"), text(10, 5)
    cache = KVCache(model, "epicache(budget=24, window=None)")
    most = 0

    def sample(*_: Any) -> None:
        nonlocal most
        most = max(most, *(sum(e.nbytes for e in cache.report().entries if e.layer == i) for i in range(3)))

    with watched(sample):
        for i in range(6):
            feed(model, cache, text(30, i))
            cache.probe(model, question)
            assert [sum(map(len, heads)) for heads in kept(cache)] == [48, 48, 48]
            assert cache.get_seq_length() == 30 * (i + 1)
            assert max(max(head, default=0) for heads in kept(cache) for head in heads) < 30 * (i + 1)
    # 24 slots, a block, a probe; keys and values of 16 channels in fp32 and a place, 2 heads; queries that wait; list of heads
    assert most <= 2 * (24 + 30 + 10) * (2 * 16 * 4 + 4) + 2 * 4 * 10 * (16 + 1) * 4 + 64
    assert bool(feed(model, cache, text(7)).isfinite().all())


def test_heads_that_keep_nothing() -> None:
    model = build("llama")

    def none_in_the_second(steps: Any, tables: Any, scores: Any, budget: int) -> list[Tensor]:
        return [torch.tensor([2 * budget, 0])]

    policy = Policy(Tokens(10), Keep(), Peak(), allot=none_in_the_second)
    cache = KVCache(model, Recipe("one", {"probe": policy}))
    feed(model, cache, text(40))
    cache.probe(model, text(5))
    assert [[len(head) for head in heads] for heads in kept(cache)] == [[20, 0]] * 3
    assert bool(feed(model, cache, text(1)).isfinite().all()) and bool(feed(model, cache, text(4)).isfinite().all())
    assert [[len(head) for head in heads] for heads in kept(cache)] == [[25, 5]] * 3


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3", "gpt-oss"])
def test_a_probe_of_a_cache_that_fits_changes_nothing(family: str) -> None:
    model, ids, later = build(family), text(60), text(9, 3)
    one, two = KVCache(model, "full"), KVCache(model, "epicache(budget=500, window=None)")
    feed(model, one, ids)
    feed(model, two, ids)
    two.probe(model, text(21, 4))
    assert torch.allclose(feed(model, one, later), feed(model, two, later), atol=3e-4)
    assert two.get_seq_length() == 69


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0, 1), min_size=2, max_size=9), size=st.integers(8, 5000))
def test_layers_share_by_weight(weights: list[float], size: int) -> None:
    budget = Weighted(size, weights=tuple(weights), order=tuple(range(len(weights))))
    shares = budget.split(size)
    if not sum(weights):
        assert shares == [size] * len(weights)
        return
    assert min(shares) >= size // 4
    for w, share in zip(weights, shares, strict=True):
        assert share == max(int(w / sum(weights) * size * len(weights)), size // 4, 1)


def test_calibration(tmp_path: Path) -> None:
    """Keys of the first layer know no context, so blocks change nothing there: it is the least sensitive and gets the floor."""
    model = build("llama")
    found = calibrate(model, text(500)[0], tmp_path / "e.safetensors", lambda _: None, sinks=4)
    like = found["similarity"]
    assert float(like[0]) == pytest.approx(1.0, abs=1e-5) and bool((like[1:] < 0.999).all())
    cache = KVCache(model, f"epicache(budget=20, power=1.1, window=None, profile={str(tmp_path / 'e.safetensors')!r})")
    feed(model, cache, text(90))
    cache.probe(model, text(5))
    weights = (1 - (like - like.min()) / (like.max() - like.min())) ** 1.1
    want = [max(int(float(w / weights.sum()) * 60), 5) for w in weights]
    assert [sum(map(len, heads)) // 2 for heads in kept(cache)] == want and want[0] == 5
    with pytest.raises(ProfileError, match="calibrate"):
        KVCache(build("llama", seed=5), "epicache(power=1.1)")
    with pytest.raises(ProfileError, match="too few"):
        calibrate(model, text(100)[0], tmp_path / "f", lambda _: None)


TOPICS = {
    "garden": ["roses", "tulips", "soil", "compost", "watering", "seeds", "weeds", "lawn"],
    "sea": ["ship", "captain", "harbour", "sail", "waves", "anchor", "storm", "crew"],
    "kitchen": ["oven", "butter", "flour", "sugar", "recipe", "dough", "bake", "pastry"],
}


def talk() -> tuple[list[str], list[str]]:
    """Utterances about three topics in turn, four at a time, and the topic of each four."""
    draw, said, about = torch.Generator().manual_seed(0), [], []
    for i in range(18):
        topic = list(TOPICS)[i % 3]
        about.append(topic)
        for _ in range(4):
            words = torch.randperm(8, generator=draw)[:4].tolist()
            said.append("we spoke of " + " ".join(TOPICS[topic][w] for w in words))
    return said, about


def test_episodes_are_topics() -> None:
    said, about = talk()
    found = episodes(said, count=3)
    of_topic = {topic: {e for e, t in zip(found.of, about, strict=True) if t == topic} for topic in TOPICS}
    assert all(len(x) == 1 for x in of_topic.values()) and len(set().union(*of_topic.values())) == 3
    for topic, words in TOPICS.items():
        mine = next(iter(of_topic[topic]))
        assert found.match(f"what about the {words[0]} and the {words[5]}?") == mine
        lines = found.texts[mine].split("\n")
        assert len(lines) == 16 and all(any(word in line for word in words) for line in lines)
        places = [said.index(line) for line in lines[::4]]
        assert all(a < b for a, b in pairwise(places))  # in the order of time
    again = episodes(said, count=3)
    assert again.texts == found.texts and again.of == found.of


def test_episodes_of_little() -> None:
    assert len(episodes(["hello"] * 40, count=4).texts) == 1
    assert episodes(["a", "b"], count=4, window=1).of in ((0, 1), (1, 0))
    for wrong in ({"count": 0}, {"window": -1}, {"shown": 1.5}):
        with pytest.raises(KvloomError, match=next(iter(wrong))):
            episodes(["a"], **wrong)
    with pytest.raises(KvloomError, match="utterances"):
        episodes([])


def test_clusters_are_near_their_centres() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(60, 5, generator=draw) + 10 * torch.arange(60)[:, None].remainder(3)
    centres, own = clusters(x, 3)
    assert torch.equal(torch.cdist(x, centres).argmin(1), own)
    assert len({tuple(own[i::3].unique().tolist()) for i in range(3)}) == 3


def test_rare_words_weigh_more() -> None:
    embed = Ngrams(["the cat", "the dog", "the fox"])
    common, rare = embed(["the"])[0].norm(), embed(["fox"])[0].norm()
    assert rare > common > 0


def test_a_conversation_answers_as_the_full_cache_where_all_fits() -> None:
    model, tokenizer = build("llama"), byte_tokenizer()
    said = [f"line {i}: {word}" for i, word in enumerate(["abc", "def", "ghi", "jkl", "mno"])]
    held = EpiCache(model, tokenizer, said, "epicache(budget=400, window=None)", count=2, window=1, block=16)
    question = "which line?"
    ids = tokenizer("\n".join(said) + "\n" + question, return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    before = [kept(cache) for cache in held.caches]
    for _ in range(2):
        assert held.ask(question, max_new_tokens=12, do_sample=False).tokens == want
    assert [kept(cache) for cache in held.caches] == before
    cache, which = held.cache(question)
    assert cache.get_seq_length() == ids.shape[1] - len(question) and 0 <= which < 2


def test_a_conversation_in_small_caches() -> None:
    model, tokenizer, told = build("llama"), byte_tokenizer(), []
    said = [line[:24] for line in talk()[0][:12]]
    held = EpiCache(
        model, tokenizer, said, "epicache(budget=32, window=None) | kivi(bits=4, group=8, residual=16)", count=2, window=2,
        block=64, tell=told.append,
    )  # fmt: skip
    assert told[-1] == pytest.approx(1.0) and told == sorted(told)
    for cache in held.caches:
        assert cache.get_seq_length() == held.history.shape[1]
        assert all(sum(map(len, heads)) <= 2 * (32 + 8) for heads in kept(cache))
    assert held.nbytes == sum(cache.nbytes for cache in held.caches)
    assert len(held.ask("and the roses?", max_new_tokens=4).tokens) == 4


def test_refusals() -> None:
    model = build("llama")
    for wrong in ("power=-1", "heads='all'", "window=0", "budget=0"):
        with pytest.raises(RecipeError, match=wrong.split("=")[0]):
            KVCache(model, f"epicache({wrong})")
    with pytest.raises(CacheError, match="no policy for probes"):
        KVCache(model, "snapkv").probe(model, text(3))
    with pytest.raises(CacheError, match="empty"):
        KVCache(model, "epicache").probe(model, text(3))
    with pytest.raises(KvloomError, match="only probes"):
        EpiCache(model, byte_tokenizer(), ["a"], "epicache")
    with pytest.raises(KvloomError, match="block"):
        EpiCache(model, byte_tokenizer(), ["a"], block=0)

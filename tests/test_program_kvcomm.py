"""KVCOMM (arXiv 2510.12872): shared messages corrected by anchors, against full prefill."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import CacheError, KVCache
from kvloom.programs.chunk import Chunk, take
from kvloom.programs.kvcomm import AgentTeam
from tests.families import build, prompt

HEAD, MIDDLE, END = (prompt(n, seed=n)[0].tolist() for n in (8, 5, 6))
TEMPLATE = [HEAD, "question", MIDDLE, "draft", END]


def message(n: int, seed: int) -> list[int]:
    return prompt(n + 1, seed=100 + seed)[0, 1:].tolist()  # all prompts begin with the same token


@torch.no_grad()
def full(model: PreTrainedModel, tokens: tuple[int, ...]) -> tuple[Tensor, Chunk]:
    cache = KVCache(model)
    logits = model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1:]
    return logits, take(cache, tokens, 0, "")


def error(got: Chunk, want: Chunk, first: int = 0) -> float:
    pairs = [(a, b) for a, b in zip(got.rows[first:], want.rows[first:], strict=True)]
    return sum(float((a.k - b.k).square().sum() + (a.v - b.v).square().sum()) for a, b in pairs)


def taught(model: PreTrainedModel, messages: int = 4, **options: float) -> AgentTeam:
    """A team whose critic has read so many questions and drafts."""
    team = AgentTeam(model, **{"gamma": 1.0, **options})  # type: ignore[arg-type]
    team.add("critic", TEMPLATE)
    for i in range(messages):
        done = team.read("critic", {"question": message(12, i), "draft": message(15, 50 + i)})
        assert done.why == ("" if i > 1 and options.get("gamma", 1.0) >= 1 else done.why)
    return team


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_1_an_anchor_that_is_the_prompt_gives_the_full_prefill(family: str) -> None:
    model = build(family)
    team = taught(model, 2, temperature=1e-4)
    done = team.read("critic", {"question": message(12, 1), "draft": message(15, 51)})
    want, exact = full(model, done.tokens)
    assert not done.why and done.reused == len(done.tokens) - 1
    torch.testing.assert_close(done.logits, want, atol=3e-4, rtol=1e-4)
    got = take(done.cache, done.tokens, 0, "")
    for a, b in zip(got.rows, exact.rows, strict=True):
        torch.testing.assert_close(a.k, b.k, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.v, b.v, atol=1e-4, rtol=1e-4)


def test_2_layer_0_is_exact_and_4_corrections_help() -> None:
    model = build("llama")
    team = taught(model, 2)
    for i in range(2, 6):  # more anchors, by dense prefills
        team.gamma = -1.0
        team.read("critic", {"question": message(12, i), "draft": message(15, 50 + i)})
    team.gamma = 1.0
    done = team.read("critic", {"question": message(11, 20), "draft": message(15, 70)})
    exact, got = full(model, done.tokens)[1], take(done.cache, done.tokens, 0, "")
    torch.testing.assert_close(got.rows[0].k, exact.rows[0].k, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.rows[0].v, exact.rows[0].v, atol=1e-4, rtol=1e-4)
    plain = AgentTeam(model, gamma=1.0)
    plain.add("critic", TEMPLATE)
    for anchors in team.anchors.values():  # the same anchors with nothing to add
        for anchor in anchors:
            for both in anchor.deltas.values():
                for delta in both:
                    delta[:] = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in delta]
    turned = team.read("critic", {"question": message(11, 20), "draft": message(15, 70)})
    rotated = take(turned.cache, done.tokens, 0, "")
    left = [chunk for chunk in (team._agents["critic"][0], team.share(message(11, 20)))]
    stop = len(HEAD) + 11
    unrotated = [torch.cat([c.rows[i].k for c in left], 1) for i in range(3)]  # type: ignore[union-attr]
    wrong = sum(float((unrotated[i] - exact.rows[i].k[:, :stop]).square().sum()) for i in range(3))
    right = sum(float((rotated.rows[i].k[:, :stop] - exact.rows[i].k[:, :stop]).square().sum()) for i in range(3))
    assert error(got, exact) < error(rotated, exact) and right < wrong


def test_3_gamma_decides() -> None:
    model = build("llama")
    always = taught(model, 6, gamma=1.0)
    assert [len(a) for a in always.anchors.values()] == [2, 2]
    never = AgentTeam(model, gamma=0.0)
    never.add("critic", TEMPLATE)
    ask = {"question": message(2, 0), "draft": message(2, 1)}
    for i in range(4):
        never.read("critic", {"question": message(3, i), "draft": message(3, 10 + i)})
    for anchors in never.anchors.values():  # near ones: nothing is one-hot
        for anchor in anchors:
            anchor.chunk = never.share(message(3, 0))
    n = len(never.anchors["question"])
    done = never.read("critic", ask)
    assert "entropy" in done.why and done.entropy["question"] == pytest.approx(math.log2(n))
    torch.testing.assert_close(done.logits, full(model, done.tokens)[0], atol=3e-4, rtol=1e-4)


def test_first_requests_are_full_prefills_and_long_messages_too() -> None:
    model = build("llama")
    team = taught(model, 2)
    done = team.read("critic", {"question": message(30, 0), "draft": message(15, 0)})
    assert done.why == "question: 0 anchors of its length" and done.reused == len(HEAD)
    torch.testing.assert_close(done.logits, full(model, done.tokens)[0], atol=3e-4, rtol=1e-4)


def test_agents_have_their_own_differences_and_share_messages() -> None:
    model = build("llama")
    team = taught(model, 2)
    team.add("judge", ["draft", END])
    done = team.read("judge", {"draft": message(15, 50)})
    assert done.why == "draft: 0 anchors of its length" and done.reused == 0
    assert len(team.anchors["draft"]) == 2  # the same message: the anchor learns of a second agent
    assert set(team.anchors["draft"][0].deltas) == {("critic", 3), ("judge", 0)}
    torch.testing.assert_close(done.logits, full(model, done.tokens)[0], atol=3e-4, rtol=1e-4)


def test_the_least_used_of_the_oldest_anchors_leaves() -> None:
    model = build("llama")
    team = AgentTeam(model, gamma=1.0, anchors=3, window=2)
    team.add("judge", [HEAD, "draft", END])
    team.gamma = -1.0
    for i in range(3):
        team.read("judge", {"draft": message(9, i)})
    team.anchors["draft"][0].uses = 5
    team.read("judge", {"draft": message(9, 3)})
    assert [a.chunk.tokens for a in team.anchors["draft"]] == [tuple(message(9, i)) for i in (0, 2, 3)]
    team.gamma, team.top_p = 1.0, 1e-6
    team.read("judge", {"draft": message(9, 3)})
    assert [a.uses for a in team.anchors["draft"]] == [5, 0, 1]  # the nearest one only


def test_generate_and_messages_from_the_cache_that_wrote_them() -> None:
    model = build("llama")
    team = taught(model, 2)
    done = team.read("critic", {"question": message(12, 0), "draft": message(15, 50)})
    n = len(done.tokens)
    done.cache.crop(-1)
    out = model.generate(torch.tensor([done.tokens]), past_key_values=done.cache, max_new_tokens=5, do_sample=False)
    assert int(out[0, n]) == int(done.logits.argmax())
    said = team.said(done.cache, out[0, n:-1].tolist(), n)
    assert said.base == len(team.neutral) and len(said) == 4
    assert team.share(out[0, n:-1].tolist()) is said


def test_refusals() -> None:
    model = build("llama")
    team = AgentTeam(model)
    for bad in ({"gamma": -1}, {"anchors": 1}, {"top_p": 0}, {"temperature": 0}):
        with pytest.raises(CacheError, match="out of range"):
            AgentTeam(model, **bad)  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="has to end in token ids"):
        team.add("critic", [HEAD, "draft"])
    team.add("critic", TEMPLATE)
    with pytest.raises(CacheError, match="is there already"):
        team.add("critic", TEMPLATE)
    with pytest.raises(CacheError, match=r"unknown agent 'critc'\. Did you mean 'critic'"):
        team.read("critc", {})
    with pytest.raises(CacheError, match=r"reads \['draft', 'question'\]"):
        team.read("critic", {"draft": [1]})

"""MiniCache: pairs of layers as one direction and two lengths, against the formulas and a plain re-implementation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import KVCache, RecipeError, parse
from kvloom.core.segment import EXACT, Kind
from kvloom.lab.measure import NANO, load_model
from kvloom.segments.slerp import Slerp, angle, slerp
from tests.families import prompt, subject
from tests.reference import Full, kept, layers_of, run, run_cache


def restored(a: Tensor, b: Tensor, t: float = 0.6) -> list[Tensor]:
    code = Slerp(EXACT, t)
    return [code.decode(block, {}) for block in code.encode_together([a, b], [{}, {}])]


class Pairs(Full):
    """MiniCache after the prompt, by arccos and sines in float64, one token at a time."""

    def __init__(self, model: Any, start: int, t: float, retain: float) -> None:
        super().__init__(model)
        self.start, self.t, self.share = start, t, retain
        self.apart: dict[int, list[int]] = {}

    def after(self, layer: int, head: int, s: Any, q: Tensor, p: Tensor) -> None:
        heads = self.config.num_key_value_heads
        if p.shape[1] == 1 or head < heads - 1 or layer < self.start or (layer - self.start) % 2 == 0:
            return
        n = len(s.k)
        pairs = [(self.slots[layer - 1, h], self.slots[layer, h]) for h in range(heads)]
        angles = torch.zeros(n, dtype=torch.float64)
        for low, high in pairs:
            for a, b in ((low.k, high.k), (low.v, high.v)):
                cos = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
                angles += cos.clamp(-1, 1).arccos()
        self.apart[layer] = sorted(angles.topk(math.ceil(self.share * n)).indices.tolist())
        for low, high in pairs:
            for name in ("k", "v"):
                xs, ys = getattr(low, name), getattr(high, name)
                for i in set(range(n)) - set(self.apart[layer]):
                    x, y = xs[i].double(), ys[i].double()
                    u, w = x / x.norm(), y / y.norm()
                    omega = (u @ w).clamp(-1, 1).arccos()
                    e = ((1 - self.t) * omega).sin() / omega.sin() * u + (self.t * omega).sin() / omega.sin() * w
                    xs[i], ys[i] = (e * x.norm()).float(), (e * y.norm()).float()


def test_against_a_plain_implementation() -> None:
    model, ids = subject("llama"), prompt(70)
    plain = Pairs(model, 1, 0.6, 0.1)
    want = run(plain, ids, [60] + [1] * 10)
    cache = KVCache(model, "minicache(retain=0.1, interval=None)")
    got = run_cache(model, cache, ids, [60] + [1] * 10)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
    for layer in (1, 2):
        for head in kept(cache, ["main"])[layer]:
            assert [i for i in head if i < 60] == plain.apart[2]
    assert kept(cache)[0][0] == list(range(70)) and not kept(cache, ["pair"])[0][0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), t=st.floats(0, 1), near=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0]))
def test_lengths_stay_and_equal_directions_are_exact(seed: int, t: float, near: float) -> None:
    torch.manual_seed(seed)
    a = torch.randn(2, 5, 16)
    b = a * (0.1 + torch.rand(2, 5, 1)) + near * torch.randn(2, 5, 16)
    x, y = restored(a, b, t)
    torch.testing.assert_close(x.norm(dim=-1), a.norm(dim=-1))
    torch.testing.assert_close(y.norm(dim=-1), b.norm(dim=-1))
    if near == 0:
        torch.testing.assert_close(x, a)
        torch.testing.assert_close(y, b)
    direction = slerp(*(torch.nn.functional.normalize(z, dim=-1) for z in (a, b)), t)
    torch.testing.assert_close(angle(a, direction), t * angle(a, b), atol=2e-4, rtol=0)  # so far along the arc
    torch.testing.assert_close(angle(direction, b), (1 - t) * angle(a, b), atol=2e-4, rtol=0)


def test_zeros_and_opposites_are_finite() -> None:
    a = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    b = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]])
    for x in restored(a, b):
        assert bool(x.isfinite().all())


def test_attention_on_what_is_stored() -> None:
    torch.manual_seed(0)
    code, xs = Slerp(EXACT, 0.6), [torch.randn(2, 40, 16) for _ in range(2)]
    q, p = torch.randn(2, 3, 16), torch.rand(2, 3, 40)
    for block in code.encode_together(xs, [{}, {}]):
        x = code.decode(block, {})
        torch.testing.assert_close(code.dot(q, block, {}, 0.5), 0.5 * q @ x.mT)
        torch.testing.assert_close(code.mix(p, block, {}), p @ x)


def test_all_apart_is_the_full_cache() -> None:
    model, ids = subject("llama"), prompt(90)
    full = run_cache(model, KVCache(model, "full"), ids, [60] + [1] * 20 + [10])
    got = run_cache(model, KVCache(model, "minicache(retain=1.0)"), ids, [60] + [1] * 20 + [10])
    torch.testing.assert_close(got, full, atol=3e-4, rtol=0)


def captured() -> tuple[Any, Tensor, list[Any]]:
    """The bundled model, a text, and keys and values of the pair of layers 3 and 4, [2, H, T, D]."""
    model, tokenizer = load_model("nano")
    text = (NANO.parent / "text" / "gutenberg.txt").read_text(encoding="utf-8")[30000:36000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :840]
    cache = KVCache(model)
    run_cache(model, cache, ids, [ids.shape[1]])
    main = [layers_of(cache)[i].groups[0].segments["main"] for i in (3, 4)]
    return model, ids, [torch.stack([getattr(m, which).dense(0, m.n) for m in main]) for which in ("key", "value")]


class Mean(Slerp):
    """The plain average of both layers, at the same size."""

    def encode_together(self, planes: list[Tensor], consts: list[Any]) -> list[Any]:
        return [{"x": (planes[0] + planes[1]) / 2, "length": torch.ones(planes[0].shape[:2])} for _ in planes]


def test_arcs_and_lengths_beat_the_mean_of_two_layers() -> None:
    """Where lengths differ; and in what the bundled model says, where they hardly do."""
    torch.manual_seed(0)
    a = torch.randn(2, 50, 16)
    b = 3 * (a + 0.5 * torch.randn(2, 50, 16))
    ours, mean = (
        [code.decode(x, {}) for x in code.encode_together([a, b], [{}, {}])]
        for code in (Slerp(EXACT, 0.5), Mean(EXACT, 0.5))
    )
    for i, x in enumerate((a, b)):
        assert (ours[i] - x).square().sum() < (mean[i] - x).square().sum()
    model, ids, _ = captured()
    n, lost = ids.shape[1] - 40, []
    full = run_cache(model, KVCache(model), ids, [n] + [1] * 40)[n:].log_softmax(-1)
    for code in (Slerp(EXACT, 0.5), Mean(EXACT, 0.5)):
        found = parse("minicache(t=0.5)")
        cache = KVCache(model, replace(found, kinds={**found.kinds, "pair": Kind(code, code)}))
        got = run_cache(model, cache, ids, [n] + [1] * 40)[n:].log_softmax(-1)
        lost.append(float((full.exp() * (full - got)).sum(-1).mean()))
    assert lost[0] < 0.9 * lost[1] and lost[0] < 0.05


def test_keeping_more_apart_never_errs_more() -> None:
    """Of vectors as restored; and those that disagree most are the ones that stay."""
    model, ids, (keys, values) = captured()
    errors = []
    for share in (0.0, 0.05, 0.2, 0.5, 1.0):
        cache = KVCache(model, f"minicache(retain={share})")
        run_cache(model, cache, ids, [ids.shape[1]])
        error = 0.0
        for i, layer in enumerate(layers_of(cache)[3:5]):
            for segment in layer.groups[0]:
                at = segment.index.long().expand(2, -1)[..., None].expand(-1, -1, 64)
                error += float((segment.key.dense(0, segment.n) - keys[i].gather(1, at)).square().sum())
                error += float((segment.value.dense(0, segment.n) - values[i].gather(1, at)).square().sum())
        errors.append(error)
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


def test_bytes_are_those_of_the_card() -> None:
    model, n = subject("llama", max_position_embeddings=2048), 1000
    cache = KVCache(model, "minicache")
    run_cache(model, cache, prompt(n), [n])
    heads, dim, item, apart = 2, 16, 4, 50
    pair = 2 * (n - apart) * heads * ((dim + 2) * item + 4)
    rest = 2 * apart * heads * (2 * dim * item + 4) + n * heads * 2 * dim * item
    assert cache.report().used == pair + rest


def test_decoded_tokens_are_merged_in_bundles() -> None:
    model, ids = subject("llama"), prompt(140)
    cache, held = KVCache(model, "minicache(interval=16)"), []
    run_cache(
        model, cache, ids, [60] + [1] * 80, lambda _: held.append(layers_of(cache)[2].groups[0].segments["main"].n)
    )
    assert max(held) <= math.ceil(0.05 * 140) + 16 and held[-1] < 24
    assert all(
        a["main"] + a["pair"] == 140
        for a in [{k: s.n for k, s in x.groups[0].segments.items()} for x in layers_of(cache)]
    )


@pytest.mark.parametrize(
    "options", ["start=1.5", "start=-1", "t=2.0", "t=True", "retain=2", "interval=0", "bits=5", "start=1.0"]
)
def test_impossible_options_are_refused(options: str) -> None:
    with pytest.raises(RecipeError):
        KVCache(subject("llama"), f"minicache({options})")

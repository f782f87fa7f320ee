"""ZipCache (arXiv 2405.14256) against a dense re-implementation: classes, codes and scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import KVCache, RecipeError, parse
from kvloom.policies.scorers import Probes
from kvloom.segments.ranges import ChannelScale, RunMinMax, TokenMinMax
from tests.families import build, prompt
from tests.reference import Full, Slots, held, kept, per_token, quantize, run, run_cache


class Zip(Full):
    """Every head of a layer is judged when the last one has attended; values share a scale over heads, row by row."""

    def __init__(self, model: Any, bits: int, low: int, salient: float, gap: int, recent: float, random: float) -> None:
        super().__init__(model)
        self.bits, self.worse, self.gap, self.shares = (bits, low), 1 - salient, gap, (recent, random)
        self.classes: dict[tuple[int, int], dict[int, int]] = {}
        self.c: dict[tuple[int, int], Tensor] = {}
        self.score: dict[int, Tensor] = {}

    def probes(self, m: int, length: int) -> Tensor:
        late = max(1, int(self.shares[0] * m))
        drawn = torch.randperm(m - late, generator=torch.Generator().manual_seed(length))[: int(self.shares[1] * m)]
        return torch.cat([drawn, torch.arange(m - late, m)])

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        m, n = p.shape[1:]
        if m > 1 or n == 1:
            rows = self.probes(m, n)
            counts = ((rows + n - m)[:, None] >= torch.arange(n)).sum(0).clamp_min(1)
            self.score[head] = p[:, rows].sum((0, 1)) / counts
        else:
            self.score[head] = p.sum((0, 1))
        self.c.setdefault((layer, head), s.v.abs().amax(0).sqrt())
        if head + 1 == self.config.num_key_value_heads:
            self.encode(layer, m > 1 or n == 1)

    def encode(self, layer: int, whole: bool) -> None:
        heads = range(self.config.num_key_value_heads)
        n = len(self.slots[layer, 0].k)
        main = [[i for i in range(n) if i not in self.classes.setdefault((layer, h), {})] for h in heads]
        if not whole and len(main[0]) < self.gap:
            return
        unit = 32 if whole else 8
        left = len(main[0]) if whole else min(len(main[0]), self.gap)
        few = int(self.worse * left + 1e-9) // unit * unit
        many = (left - few) // unit * unit
        for which, count in ((1, few), (0, many)):
            rows, parts = [], []
            for h in heads:
                ranked = sorted(main[h][: few + many], key=lambda i: float(self.score[h][i]))
                rows.append(sorted(ranked[:few] if which else ranked[few:]))
            if not count:
                continue
            for h in heads:
                s, c = self.slots[layer, h], self.c[layer, h]
                s.k[rows[h]] = quantize(s.k[rows[h]].T.contiguous(), self.bits[which]).T
                parts.append(s.v[rows[h]] / c)
                self.classes[layer, h] |= dict.fromkeys(rows[h], which)
            joint = per_token(torch.cat(parts, 1), self.bits[which], None).chunk(len(parts), 1)
            for h in heads:
                self.slots[layer, h].v[rows[h]] = joint[h] * self.c[layer, h]


SIZES = {"decode": [150] + [1] * 80, "chunks": [100, 68, *[1] * 36, 50, 1, 1]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("options", [(4, 2, 0.6, 40, 0.05, 0.05), (8, 4, 0.3, 32, 0.2, 0.0)])
def test_logits_and_classes(sizes: list[int], options: tuple[Any, ...]) -> None:
    model, ids = build("llama"), prompt(sum(sizes))
    names = ("bits", "low_bits", "salient", "gap", "recent", "random")
    cache = KVCache(model, f"zipcache({', '.join(f'{a}={b}' for a, b in zip(names, options, strict=True))})")
    reference = Zip(model, *options)
    want = run(reference, ids, sizes)
    got = run_cache(model, cache, ids, sizes)
    for i, layer in enumerate(held(cache)):
        for h, classes in enumerate(layer):
            for which, name in enumerate(("high", "low")):
                of = reference.classes[i, h]
                assert classes.get(name, []) == sorted(at for at in of if of[at] == which), f"layer {i}, head {h}"
    torch.testing.assert_close(got, want, atol=3e-3, rtol=1e-3)


def test_1_the_limits() -> None:
    """8 bits are near the full cache; without unimportant tokens there is one class, in `bits`."""
    model, ids, sizes = build("llama"), prompt(160), [150] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    got = run_cache(model, KVCache(model, "zipcache(bits=8, low_bits=8)"), ids, sizes)
    assert float((got - want).square().mean()) < 0.02**2 * float(want.var())
    cache = KVCache(model, "zipcache(salient=1.0)")
    run_cache(model, cache, ids, sizes)
    assert all(not head.get("low") and len(head["high"]) == 128 for layer in held(cache) for head in layer)


def test_2_the_mean_counts_not_the_sum() -> None:
    """A token that only the last row can see is worth as much as an early one of equal mean attention."""
    n = 40
    mass = torch.full((1, 1, n), 0.1)
    mass[..., 0], mass[..., -1] = 0.5 * n, 0.5
    step = SimpleNamespace(q=torch.zeros(1, 1, n, 4), first=0, length=n, probed=lambda table, rows: mass)
    table = SimpleNamespace(index=torch.arange(n, dtype=torch.int32)[None])
    score = Probes(newest=1.0)(step, table)[0]  # type: ignore[arg-type]
    assert score[0] == score[-1] == 0.5 and score.argsort(descending=True)[:2].sort().values.tolist() == [0, n - 1]


@pytest.mark.parametrize(("recent", "random"), [(1.0, 0.0), (0.25, 0.75)])
def test_4_all_rows_give_the_mean_itself(recent: float, random: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, found = build("llama"), prompt(80), []
    score = Probes.__call__
    monkeypatch.setattr(Probes, "__call__", lambda *x: found.append(score(*x)) or found[-1])
    run_cache(model, KVCache(model, f"zipcache(recent={recent}, random={random})"), ids, [80])

    class Mean(Full):
        def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
            want = p.sum((0, 1)) / torch.arange(80, 0, -1)
            torch.testing.assert_close(found[layer][head], want, atol=1e-5, rtol=1e-4)

    run(Mean(model), ids, [80])


def test_3_channel_factors_help_values() -> None:
    """Channels of unlike size, one scale for each token over all heads: less error at the same number of scales."""
    values = torch.randn(4, 64, 16) * torch.logspace(-1, 1, 16)
    plain, scaled = TokenMinMax(2), ChannelScale(TokenMinMax(2))
    const = scaled.fit(None, values)  # type: ignore[arg-type]
    a, b = plain.encode(values, {}), scaled.encode(values, const)
    assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}

    def error(x: Tensor) -> Tensor:
        return ((x - values) / values.std((0, 1))).square().mean()

    assert error(scaled.decode(b, const)) < 0.8 * error(plain.decode(a, {}))
    values[..., 3] = 0
    assert bool(torch.isfinite(scaled.fit(None, values)["channel"]).all())  # type: ignore[arg-type]


def test_codes_of_a_run() -> None:
    """One scale per channel for all that is frozen at once; products and sums are those of what is decoded."""
    for bits in (1, 2, 3, 4, 8):
        codec, x = RunMinMax(bits), torch.randn(2, 96, 16)
        block = codec.encode(x, {})
        assert block["scale"].shape == (2, 1, 16)
        back = codec.decode(block, {})
        assert float((back - x).abs().max()) <= float(block["scale"].max()) * 0.51 + 1e-3
        q, p = torch.randn(2, 3, 16), torch.rand(2, 3, 96)
        torch.testing.assert_close(codec.dot(q, block, {}, 0.5), 0.5 * q @ back.transpose(1, 2), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(codec.mix(p, block, {}), p @ back, atol=1e-3, rtol=1e-3)


def test_shared_scales_survive_uneven_drops() -> None:
    """After a crop each head keeps other rows of a class; none is lost, and what is left decodes as before."""
    codec, x = TokenMinMax(4), torch.randn(2, 12, 16)
    block = codec.encode(x, {})
    slots = torch.tensor([[0, 1, 5], [0, 3, 11]])
    want = codec.decode(block, {}).gather(1, slots[..., None].expand(-1, -1, 16))
    assert torch.equal(codec.decode(codec.take(block, slots), {}), want)
    model, ids = build("llama"), prompt(220)
    cache = KVCache(model, "zipcache(gap=32, recent=0.1)")
    run_cache(model, cache, ids, [130] + [1] * 40)
    cache.crop(-60)
    assert all(set(range(110)) <= set(head) for layer in kept(cache) for head in layer)
    assert bool(torch.isfinite(run_cache(model, cache, ids, [1] * 60)).all())


def test_options() -> None:
    for wrong in ("salient=1.5", "gap=3", "recent=2.0", "bits=5", "random=-0.1", "low_bits=6"):
        with pytest.raises(RecipeError):
            parse(f"zipcache({wrong})")
    with pytest.raises(RecipeError, match="which tokens"):
        parse("zipcache | h2o")
    with pytest.raises(RecipeError, match="second time"):
        parse("zipcache | kivi")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernels_read_the_same(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, sizes = build("llama"), prompt(190), [150] + [1] * 40
    recipe = f"zipcache(bits={bits}, low_bits={bits}, gap=16)"
    got = run_cache(model, KVCache(model, recipe), ids, sizes)
    monkeypatch.setattr("kvloom.core.layer.job", lambda *x: None)
    want = run_cache(model, KVCache(model, recipe), ids, sizes)
    close = (got - want).abs().amax(-1) < 0.05
    assert (
        float(close.float().mean()) > 0.8
    )  # a number between two codes, or a token between two classes, may go either way

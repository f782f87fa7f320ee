"""MatryoshkaKV (arXiv 2410.14731): projections, their training, and the search for ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom import KVCache, ProfileError, RecipeError, parse
from kvloom.core.codec import Exact
from kvloom.core.profile import load
from kvloom.core.sample import rows
from kvloom.lab.measure import load_model
from kvloom.policies.subspaces import LEVELS, damages, orthonormal, principal, rates, train
from kvloom.segments.project import Project
from tests.families import build, prompt, subject
from tests.profiles import profiled
from tests.reference import Full, Slots, layers_of, run, run_cache

SIZES = [40, 9, *[1] * 12]


class Matryoshka(Full):
    """One head at a time: what is stored of a token is its projection; a forward sees its own tokens as they are."""

    def __init__(self, model: Any, bases: dict[str, tuple[Tensor, Tensor]], ranks: dict[str, Tensor]) -> None:
        super().__init__(model)
        self.bases, self.ranks, self.done = bases, ranks, 0

    def after(self, layer: int, head: int, s: Slots, q: Tensor, p: Tensor) -> None:
        m = q.shape[1]
        for plane, name in (("key", "k"), ("value", "v")):
            basis, mean = (x[layer, head] for x in self.bases[plane])
            u = basis[:, : int(self.ranks[plane][layer, head])]
            x = getattr(s, name)
            setattr(s, name, torch.cat([x[:-m], (x[-m:] - mean) @ u @ u.T + mean]))


def ranks_of(cache: KVCache) -> dict[str, Tensor]:
    found = {"key": torch.zeros(3, 2), "value": torch.zeros(3, 2)}
    for layer in layers_of(cache):
        for group in layer.groups:
            heads = range(2) if group.heads is None else group.heads.tolist()
            for plane, table in found.items():
                codec = getattr(group.segments["main"], plane).codec
                for head in heads:
                    table[layer.site.layer, head] = codec.rank
    return found


@pytest.mark.parametrize("search", [True, False])
def test_logits_equal_dense_projection(search: bool) -> None:
    model, ids = subject("llama"), prompt(sum(SIZES))
    recipe = profiled(model, f"matryoshkakv(keep=0.5, steps=2, search={search})")
    cache = KVCache(model, recipe)
    got = run_cache(model, cache, ids, SIZES)
    path = recipe.partition("profile='")[2].rstrip("')")
    held = load(path, model, "matryoshkakv", {})
    bases = {p: (orthonormal(held[f"{p}.basis"]), held[f"{p}.mean"].float()) for p in ("key", "value")}
    ranks = ranks_of(cache)
    assert float(torch.stack(list(ranks.values())).mean()) <= 8
    if search:
        assert len(torch.stack(list(ranks.values())).unique()) > 1
    want = run(Matryoshka(model, bases, ranks), ids, SIZES)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_1_all_coordinates_are_the_whole() -> None:
    model, ids = subject("llama"), prompt(sum(SIZES))
    got = run_cache(model, KVCache(model, profiled(model, "matryoshkakv(keep=1.0, steps=2)")), ids, SIZES)
    torch.testing.assert_close(got, run_cache(model, KVCache(model), ids, SIZES), atol=3e-4, rtol=1e-4)


def test_2_training_keeps_bases_orthonormal_and_lowers_the_loss() -> None:
    model = build("llama")
    ids = prompt(64 * 24)[0]
    before = {name: x.clone() for name, x in model.named_parameters()}
    start = principal(model, rows(model, ids, 4, 64), lambda text: None)
    texts = rows(model, ids[:128], 1, 64) * 24
    found, losses = train(model, start, texts, lambda text: None, rate=0.03)
    for plane, (basis, mean) in found.items():
        one = torch.eye(basis.shape[-1])
        torch.testing.assert_close(basis.transpose(-1, -2) @ basis, one.expand_as(basis), atol=1e-5, rtol=0)
        assert (
            float((basis - start[plane][0]).abs().max()) > 0.01 and float((mean - start[plane][1]).abs().max()) > 0.01
        )
    assert sum(losses[-8:]) < sum(losses[:8])
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name]) and x.requires_grad and x.grad is None


def test_3_and_4_errors_fall_with_rank_and_with_centring() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 500, 16, generator=draw) @ torch.randn(16, 16, generator=draw) + 20 * torch.randn(
        16, generator=draw
    )

    def error(rank: int, centred: bool) -> float:
        mean = x.mean(1) if centred else torch.zeros(1, 16)
        wide = (x - mean[:, None]).double()
        basis = torch.linalg.eigh(wide.transpose(1, 2) @ wide).eigenvectors.flip(-1)[..., :rank].float()
        const = {"basis": basis[:, None], "mean": mean[:, None]}
        codec = Project(Exact(), rank)
        return float((codec.decode(codec.encode(x, const), const) - x).norm())

    found = [error(rank, True) for rank in range(1, 17)]
    assert all(a > b for a, b in itertools.pairwise(found)) and found[-1] < 1e-3
    assert error(4, True) < error(4, False)


def test_5_bytes() -> None:
    model = subject("llama")
    cache = KVCache(model, profiled(model, "matryoshkakv(keep=0.5, steps=2)"))
    run_cache(model, cache, prompt(100), [100])
    ranks, entries = ranks_of(cache), cache.report().by("plane", "field")
    for plane, table in ranks.items():
        assert entries[plane, "x"] == 100 * 4 * int(table.sum())
    total = sum(cache.recipe.nbytes(layer.site, {"main": 100}) for layer in cache.managed())
    assert total == entries["key", "x"] + entries["value", "x"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), items=st.integers(1, 3), keep=st.sampled_from([0.25, 0.5, 0.8, 1.0]))
def test_rates_are_the_best_there_are(seed: int, items: int, keep: float) -> None:
    damage = torch.rand(items, LEVELS, generator=torch.Generator().manual_seed(seed)).sort(-1, descending=True).values
    damage[:, -1] = 0
    found = rates(damage, keep)
    room = max(items, int(keep * items * LEVELS + 1e-9))
    assert int(found.sum()) <= room and int(found.min()) >= 1
    tried = [each for each in itertools.product(range(LEVELS), repeat=items) if sum(each) + items <= room]
    least = min(sum(float(damage[i, x]) for i, x in enumerate(each)) for each in tried)
    assert sum(float(damage[i, x - 1]) for i, x in enumerate(found.tolist())) == pytest.approx(least, abs=1e-5)


def test_damages_are_those_of_one_head() -> None:
    model = subject("llama")
    texts = rows(model, prompt(100)[0], 1, 100)
    bases = principal(model, texts, lambda text: None)
    found = damages(model, bases, texts, lambda text: None)
    assert all(x.shape == (3, 2, LEVELS) and bool((x[..., -1] == 0).all()) for x in found.values())
    assert all(float(x[..., 0].min()) > float(x[..., -2].mean()) for x in found.values())


def test_searched_ranks_lose_less_than_one_for_all() -> None:
    """With the bundled profile, on random tokens."""
    model, _ = load_model("nano")
    ids = torch.randint(3, 4000, (1, 300), generator=torch.Generator().manual_seed(3))

    def loss(recipe: str) -> float:
        told = run_cache(model, KVCache(model, recipe), ids, [260, *[1] * 40])[260:].log_softmax(-1)
        return float((whole.exp() * (whole - told)).sum(-1).mean())

    whole = run_cache(model, KVCache(model), ids, [260, *[1] * 40])[260:].log_softmax(-1)
    assert loss("matryoshkakv(keep=0.5)") < 0.7 * loss("matryoshkakv(keep=0.5, search=False)")


def test_computes_on_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding never makes keys or values of full width."""
    model, ids = subject("llama"), prompt(90)
    cache = KVCache(model, profiled(model, "matryoshkakv(keep=0.5, steps=2)"))
    run_cache(model, cache, ids, [70])
    monkeypatch.setattr(Project, "decode", lambda *_: pytest.fail("coordinates were expanded"))
    run_cache(model, cache, ids, [1] * 5)


def test_options(tmp_path: Path) -> None:
    for wrong in ("keep=0", "keep=1.1", "keep=True", "search=1", "steps=-1", "teacher=2"):
        with pytest.raises(RecipeError, match=wrong.partition("=")[0]):
            parse(f"matryoshkakv({wrong})")
    with pytest.raises(ProfileError, match=r"kvloom calibrate .* --cache matryoshkakv"):
        KVCache(build("llama", seed=5), "matryoshkakv")

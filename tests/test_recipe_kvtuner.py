"""KVTuner: bits by layer, and the search for them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvloom import KVCache, parse
from kvloom.core import profile as profiles
from kvloom.core.sample import managed
from kvloom.errors import KvloomError, ProfileError, RecipeError
from kvloom.policies import pareto
from kvloom.policies.pairs import PAIRS, clusters, find, read, survivors
from kvloom.recipes.kvtuner import _table
from tests.families import prompt, subject
from tests.profiles import profiled
from tests.reference import layers_of, run_cache

SIZES = [90] + [1] * 30 + [20] + [1] * 10
OPTIONS = "group=8, residual=16, trials=12"


def written(model: PreTrainedModel, path: Path, tables: list[Any], scheme: str = "channel", group: int = 8) -> str:
    """A profile with these tables."""
    count = len(managed(model))
    tensors = {"group": torch.tensor([group])}
    for name in ("channel", "token"):
        mine = torch.tensor(tables, dtype=torch.uint8)
        bits = mine.float().mean((1, 2))
        tensors |= {
            f"{name}.tables": mine,
            f"{name}.bits": bits,
            f"{name}.loss": 1 / bits,
            f"{name}.errors": torch.ones(count, 9),
        }
    profiles.save(path, model, "kvtuner", tensors)
    return repr(str(path))


@pytest.mark.parametrize(
    ("options", "same"),
    [("", "kivi(bits={}, group=8, residual=16)"), (", scheme='token'", "kivi(bits={}, group=16, residual=16)")],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_1_a_uniform_table_is_the_base_quantizer(bits: int, options: str, same: str, tmp_path: Path) -> None:
    model, ids = subject("llama"), prompt(sum(SIZES))
    path = written(model, tmp_path / "p", [[[bits, bits]] * 3])
    got = KVCache(model, f"kvtuner(bits={bits}, group=8, residual=16, profile={path}{options})")
    logits = run_cache(model, got, ids, SIZES)
    if options:  # every token by itself: the codes of kivi's values, for keys as well
        segment = layers_of(got)[1].groups[0].segments["main"]
        assert segment.key.frozen == segment.value.frozen == segment.n
        assert [repr(run.codec) for run in segment.key.runs] == [f"MinMax(bits={bits}, group=None, along='channels')"]
        return
    assert torch.equal(logits, run_cache(model, KVCache(model, same.format(bits)), ids, SIZES))


def test_layers_have_their_own_bits(tmp_path: Path) -> None:
    """As the table says, in real bytes."""
    model, table = subject("llama"), [[2, 8], [8, 4], [4, 2]]
    path = written(model, tmp_path / "p", [table])
    cache = KVCache(model, f"kvtuner(bits=6, group=8, residual=16, profile={path})")
    run_cache(model, cache, prompt(160), [160])
    for layer, (k, v) in zip(layers_of(cache), table, strict=True):
        segment = layer.groups[0].segments["main"]
        key, value = (next(run for run in plane.runs if not run.codec.exact) for plane in (segment.key, segment.value))
        assert (key.codec.bits, value.codec.bits) == (k, v)
        assert key.fields["codes"].used == 2 * key.n * 16 * k // 8
        assert value.fields["codes"].used == 2 * value.n * 16 * v // 8
    want = sum(cache.recipe.nbytes(layer.site, {"main": 160}) for layer in layers_of(cache))
    assert cache.report().used == want


@settings(max_examples=20, deadline=None)
@given(bits=st.floats(2, 8))
def test_2_the_table_meets_the_budget(bits: float) -> None:
    from kvloom.lab.measure import load_model

    model = _nano(load_model)
    table = _table(model, bits, None, "channel", 32, None)
    assert sum(k + v for k, v in table.values()) / 12 <= bits + 1e-6
    assert set(itertools.chain(*table.values())) <= {2, 4, 8}


_held: list[Any] = []


def _nano(load: Any) -> Any:
    if not _held:
        _held.append(load("nano")[0])
    return _held[0]


def test_3_more_bits_never_raise_a_layers_error(nano: Any) -> None:
    found = profiles.find(None, nano[0], "kvtuner", {"channel.errors": (6, 9)})
    for scheme in ("channel", "token"):
        errors = found[f"{scheme}.errors"].view(6, 3, 3)
        assert bool((errors.diff(dim=1) <= 0.01 * errors[:, :-1]).all())
        assert bool((errors.diff(dim=2) <= 0.01 * errors[:, :, :-1]).all())
        assert bool((found[f"{scheme}.bits"].diff() > 0).all()) and bool((found[f"{scheme}.loss"].diff() < 0).all())


def test_4_no_uniform_table_beats_the_searched_ones() -> None:
    """On the texts that were searched on, at the same mean bits or fewer."""
    model = subject("llama")
    texts = [read(model, prompt(120, seed=seed), 30) for seed in range(2)]
    base = parse("kivi(bits=2, group=8, residual=16)").kinds["main"]
    from dataclasses import replace

    from kvloom.segments.minmax import MinMax

    def kind(pair: tuple[int, int]) -> Any:
        return replace(base, key=MinMax(pair[0], 8, "tokens"), value=MinMax(pair[1], 8, "channels"))

    told: list[str] = []
    found = find(model, texts, kind, 12, told.append)
    from kvloom.policies.pairs import _loss

    layers = list(managed(model))
    for pair in PAIRS:
        loss = _loss(model, texts, dict.fromkeys(layers, pair), kind)
        best = min(x for b, x in zip(found.bits.tolist(), found.loss.tolist()) if b <= sum(pair) / 2)
        assert best <= loss + 1e-9
    table = dict(zip(layers, map(tuple, found.tables[0].tolist()), strict=True))
    assert _loss(model, texts, table, kind) == pytest.approx(float(found.loss[0]))
    assert found.errors.shape == (3, 9) and len(found.groups) == 3 and len(told) >= 10


def test_pairs_that_another_beats_leave() -> None:
    errors = torch.tensor([float(16 / k + 4 / v) for k, v in PAIRS])
    kept = [PAIRS[i] for i in survivors(errors)]
    assert kept == [(2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (8, 8)]
    assert clusters(torch.stack([errors, errors * 1.2, errors * 4, errors.flip(0)])) == [[0, 1], [2], [3]]
    chain = torch.stack([errors, errors * 1.9, errors * 1.38])  # the last is near to both
    assert clusters(chain) == [[0, 1, 2]]


@given(st.dictionaries(st.integers(0, 99), st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_front(points: dict[int, tuple[float, float]]) -> None:
    found = pareto.front(points)
    costs = [points[name] for name in found]
    assert costs == sorted({c for c in points.values() if not any(pareto._better(o, c) for o in points.values())})


def test_search_finds_the_front_of_a_known_problem() -> None:
    """Of 6,561 tables a few hundred are tried, and none of the true front is far."""
    weight = [5, 1, 3, 0.5, 8, 2, 1, 4]
    tried: list[Any] = []

    def cost(genome: Any) -> tuple[float, float]:
        tried.append(genome)
        return float(sum(genome)), sum(w * 4.0**-g for w, g in zip(weight, genome))

    options = [3] * 8
    found = pareto.search(options, cost, [(0,) * 8, (2,) * 8], trials=300)
    assert len(tried) == len(set(tried)) == len(found) == 300
    true = {
        g: (float(sum(g)), sum(w * 4.0**-x for w, x in zip(weight, g))) for g in itertools.product(range(3), repeat=8)
    }
    mine = [found[name] for name in pareto.front(found)]
    for bits, loss in (true[name] for name in pareto.front(true)):
        assert min(x for b, x in mine if b <= bits) <= 1.15 * loss
    assert found == pareto.search(options, cost, [(0,) * 8, (2,) * 8], trials=300)  # the same again
    assert len(pareto.search([2, 2], lambda g: (float(g[0]), float(g[1])))) == 4  # nothing is left to try


def test_points_by_loss(tmp_path: Path) -> None:
    model = subject("llama")
    path = written(model, tmp_path / "p", [[[2, 2]] * 3, [[4, 2]] * 3, [[8, 8]] * 3])

    def bits(text: str) -> int:
        cache = KVCache(model, f"kvtuner({text}, group=8, residual=16, profile={path})")
        return cache.recipe.kinds["main"].key.table[0][0][1].bits

    assert [bits(text) for text in ("bits=2", "bits=3.5", "bits=7.9", "bits=8", "loss=0.4", "loss=0.2")] == [
        2,
        4,
        4,
        8,
        4,
        8,
    ]
    with pytest.raises(RecipeError, match=r"loss=0\.01"):
        bits("loss=0.01")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("bits=1", "bits=1"), ("bits=9.0", r"bits=9\.0"), ("scheme='kivi'", "scheme='kivi'"), ("loss=-1", "loss=-1"),
        ("trials=0", "trials=0"), ("residual=16", "residual=16"),
    ],
)  # fmt: skip
def test_wrong_options(options: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        parse(f"kvtuner({options})")


def test_profiles_that_do_not_fit(tmp_path: Path) -> None:
    model = subject("llama")
    with pytest.raises(ProfileError, match=r"kvloom calibrate .* --cache kvtuner"):
        KVCache(model, "kvtuner(group=8, residual=16)")
    path = written(model, tmp_path / "p", [[[2, 2]] * 3], group=16)
    with pytest.raises(ProfileError, match=r"group=8: .*group=16.*kvloom calibrate"):
        KVCache(model, f"kvtuner(group=8, residual=16, profile={path})")
    calibrate = parse("kvtuner").calibrate
    assert calibrate is not None
    with pytest.raises(KvloomError, match="too few"):
        calibrate(model, torch.arange(3, 40), tmp_path / "x", lambda text: None)


def test_with_a_placement() -> None:
    model, ids = subject("llama"), prompt(sum(SIZES))
    mine = parse(profiled(model, f"kvtuner(bits=4, {OPTIONS})"))
    cache = KVCache(model, parse("snapkv(budget=48, window=8)") | mine)
    assert bool(torch.isfinite(run_cache(model, cache, ids, SIZES)).all())
    assert all(layer.groups[0].segments["main"].n < 140 for layer in layers_of(cache))


def test_the_command_prints_the_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from kvloom.cli import main

    text = tmp_path / "t.txt"
    text.write_text("The lamp is lit in winter, and put out in May. " * 40)
    main(
        ["calibrate", "nano", "--cache", "kvtuner(trials=3)", "--text", str(text), "-o", str(tmp_path / "p"), "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert set(found["sets"]) == {"channel", "token"}
    points = found["sets"]["channel"]
    assert points == sorted(points, key=lambda x: x["bits"]) and points[0]["loss"] > points[-1]["loss"]

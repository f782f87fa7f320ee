"""RazorAttention (arXiv 2407.15891) against attention with the mean of the dropped tokens written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvloom import KVCache, ProfileError, RecipeError, parse
from kvloom.core import profile
from kvloom.core.attention import Logits
from kvloom.core.layer import Layer
from kvloom.core.rows import Rows
from kvloom.core.together import together
from kvloom.policies.retrieval_heads import REPEATS, measure
from kvloom.recipes.razorattention import EVERY, calibrate
from tests.families import build, prompt
from tests.reference import Full, Razor, Slots, held, run, run_cache

SIZES = {"decode": [60] + [1] * 40, "chunks": [50, 20, 1, 1, 25, 1, 1], "just over": [26] + [1] * 30}


def spec(echo: float = 0.1, induction: float = 0.2, **more: object) -> str:
    more = {"sinks": 4, "window": 20, "share": 5, **more}
    return (
        f"razorattention(echo={echo}, induction={induction}, " + ", ".join(f"{k}={v!r}" for k, v in more.items()) + ")"
    )


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, torch.Tensor]:
    """A model, its profile and the retrieval heads [layers, KV heads] at `spec()`."""
    model, path = build("llama"), tmp_path_factory.mktemp("profiles") / "llama.safetensors"
    scores = calibrate(model, path, tokens=40)
    chosen = torch.zeros(6, dtype=torch.bool)
    for name, count in (("echo", 1), ("induction", 2)):  # ceil of 10 and 20 percent of 6 KV heads
        chosen[scores[name].view(3, 2, 2).amax(-1).flatten().argsort(descending=True)[:count]] = True
    return model, str(path), chosen.view(3, 2)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("sinks", "window"), [(4, 20), (0, 20), (3, 1)])
def test_logits_equal_the_mean_written_out(scored: Any, sizes: list[int], sinks: int, window: int) -> None:
    model, path, retrieval = scored
    ids = prompt(sum(sizes))
    reference = Razor(model, retrieval, sinks, window, 5, EVERY)
    got = run_cache(model, KVCache(model, spec(sinks=sinks, window=window, profile=path)), ids, sizes)
    torch.testing.assert_close(got, run(reference, ids, sizes), atol=5e-4, rtol=1e-4)


def test_1_full_cache_with_all_heads_or_while_it_fits(scored: Any) -> None:
    model, path, _ = scored
    ids, sizes = prompt(60), [50] + [1] * 10
    want = run_cache(model, DynamicCache(config=model.config), ids, sizes)
    for recipe in (
        spec(1.0, 0.0, window=1, profile=path),
        spec(0.0, 1.0, window=1, profile=path),
        spec(window=56, profile=path),
    ):
        got = run_cache(model, KVCache(model, recipe), ids, sizes)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_2_equal_dropped_tokens_lose_nothing() -> None:
    """A slot that stands for Nd equal tokens counts Nd times: exactly full attention."""
    k, v, q = torch.randn(2, 30, 16), torch.randn(2, 30, 16), torch.randn(2, 5, 16)
    k[:, 4:20], v[:, 4:20] = k[:, 4:5], v[:, 4:5]
    want = (q @ k.transpose(1, 2) / 4).softmax(-1) @ v
    # folded in two steps, as while decoding
    mean = Rows(k[:, 4:9], v[:, 4:9], 4).mean().cat(Rows(k[:, 9:20], v[:, 9:20], 9)).mean()
    assert mean.n == 1
    torch.testing.assert_close(mean.column("logw").exp(), torch.full((2, 1), 16.0))
    few_k, few_v = (torch.cat([x[:, :4], m, x[:, 20:]], 1) for x, m in ((k, mean.k), (v, mean.v)))
    logw = torch.zeros(2, 1, 15)
    logw[..., 4] = mean.column("logw")
    got = (q @ few_k.transpose(1, 2) / 4 + logw).softmax(-1) @ few_v
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert ((q @ few_k.transpose(1, 2) / 4).softmax(-1) @ few_v - want).abs().max() > 0.01


def test_2_equal_dropped_tokens_through_the_cache(scored: Any) -> None:
    """The same through the attention of a layer of the cache."""
    model, path, _ = scored
    cache = KVCache(model, spec(0.0, 0.0, sinks=4, window=10, profile=path))
    layer = Layer(next(cache.managed()).site, cache.recipe)
    full = Layer(layer.site, parse("full"))
    k, v, q = torch.randn(2, 60, 16), torch.randn(2, 60, 16), torch.randn(4, 60, 16)
    k[:, 4:48], v[:, 4:48] = k[:, 4:5], v[:, 4:5]
    logits = Logits(0.25)
    for rows in (slice(0, 30), slice(30, 50), *(slice(i, i + 1) for i in range(50, 57))):
        got, want = together([x.forward(q[:, rows], k[:, rows], v[:, rows], logits, None, None) for x in (layer, full)])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert all(group.n < 45 for group in layer.groups)


@pytest.mark.parametrize(("window", "share"), [(20, 5), (5, 3), (1, 2)])
def test_3_sizes_equal_the_formula(scored: Any, window: int, share: int) -> None:
    """n_ret * T + n_loc * (N0 + max(S0, T / C) + 1) slots after the prompt."""
    model, path, retrieval = scored
    length = 60
    cache = KVCache(model, spec(window=window, share=share, profile=path))
    run_cache(model, cache, prompt(length), [length])
    local = 4 + max(window, length // share) + 1
    for i, layer in enumerate(held(cache)):
        for h, classes in enumerate(layer):
            assert sum(map(len, classes.values())) == (length if retrieval[i, h] else local)
            if not retrieval[i, h]:
                assert classes["main"] == [*range(4), *range(length - local + 5, length)]
                assert len(classes["mean"]) == 1


def test_3_the_retrieval_set_is_fixed(scored: Any) -> None:
    model, path, retrieval = scored
    for seed in range(3):
        cache = KVCache(model, spec(profile=path))

        def check(length: int, cache: KVCache = cache) -> None:
            for i, layer in enumerate(held(cache)):
                for h, classes in enumerate(layer):
                    assert (classes["main"] == list(range(length))) == bool(retrieval[i, h])

        run_cache(model, cache, prompt(90, seed=seed), [60, 15] + [1] * 15, check)


def test_4_compensation_is_closer_than_none(scored: Any) -> None:
    model, path, retrieval = scored
    errors, sizes = torch.zeros(2), [60] + [1] * 15
    for seed in range(5):
        ids = prompt(75, seed=seed)
        want = run_cache(model, DynamicCache(config=model.config), ids, sizes)[60:]
        on = run_cache(model, KVCache(model, spec(profile=path)), ids, sizes)[60:]
        reference = Razor(model, retrieval, 4, 20, 5, EVERY)
        reference.compensate = False
        off = run(reference, ids, sizes)[60:]
        errors += torch.stack([(x - want).square().mean() for x in (on, off)])
    assert errors[0] <= errors[1]


class _Scores(Full):
    """Echo and induction sums from whole rows of attention."""

    def __init__(self, model: Any, period: int) -> None:
        super().__init__(model)
        self.period, self.found = period, torch.zeros(2, 3, 4)

    def after(self, layer: int, head: int, s: Slots, q: torch.Tensor, p: torch.Tensor) -> None:
        length, period = p.shape[-1], self.period
        rows = range(1 + period, length)  # every token that has occurred before; token 0 is a BOS
        for query in rows:
            earlier = range(query - period, 0, -period)
            for i, ahead in enumerate((0, 1)):
                for at in earlier:
                    self.found[i, layer, 2 * head : 2 * head + 2] += p[:, query, at + ahead] / len(rows)


def test_head_scores_equal_whole_attention() -> None:
    """Mean attention to earlier occurrences of the same token (echo) and to what followed them (induction)."""
    model, period = build("llama"), 13
    read: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0]))
    scores = measure(model, tokens=period)
    ids = read[0]
    assert ids.shape == (1, 1 + REPEATS * period) and ids[0, 0] == model.config.bos_token_id
    assert torch.equal(ids[0, 1 : 1 + period], ids[0, 1 + 2 * period : 1 + 3 * period])
    assert not bool((ids[0, 1:, None] == torch.tensor([0, 1])).any())
    naive = _Scores(model, period)
    run(naive, ids, [ids.shape[1]])
    torch.testing.assert_close(scores["echo"], naive.found[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(scores["induction"], naive.found[1], atol=1e-4, rtol=1e-3)


def test_profile_round_trip(scored: Any, tmp_path: Path) -> None:
    """The file gives what measuring again would give."""
    model, _, _ = scored
    path = tmp_path / "deeper" / "p.safetensors"
    calibrate(model, path, tokens=(512 - 1) // 4)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    ids = prompt(70)
    with_file = run_cache(model, KVCache(model, spec(profile=str(path))), ids, [60] + [1] * 10)
    measured = run_cache(model, KVCache(model, spec()), ids, [60] + [1] * 10)
    assert torch.equal(with_file, measured)


def test_profile_of_another_model_or_recipe(scored: Any, tmp_path: Path) -> None:
    model, path, _ = scored
    with pytest.raises(ProfileError, match="another model"):
        KVCache(build("llama", seed=1), spec(profile=path))
    with pytest.raises(ProfileError, match="no file"):
        KVCache(model, spec(profile=str(tmp_path / "none")))
    other = tmp_path / "other"
    profile.save(other, model, "another", {"echo": torch.zeros(3, 4)})
    with pytest.raises(ProfileError, match="another"):
        KVCache(model, spec(profile=str(other)))
    profile.save(other, model, "razorattention", {"echo": torch.zeros(3, 4), "induction": torch.zeros(4, 3)})
    with pytest.raises(ProfileError, match="induction"):
        KVCache(model, spec(profile=str(other)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_profile(scored: Any, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever happened to the bytes: a ProfileError, or (where it doesn't matter) the same scores."""
    model, path, _ = scored
    damaged, whole = tmp_path / "damaged", bytearray(Path(path).read_bytes())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
            whole[at] = data.draw(st.integers(0, 255))
    damaged.write_bytes(whole)
    shapes = {"echo": (3, 4), "induction": (3, 4)}
    try:
        found = profile.load(damaged, model, "razorattention", shapes)
    except ProfileError as error:
        assert str(damaged) in str(error)
    else:
        intact = profile.load(path, model, "razorattention", shapes)
        assert all(torch.equal(found[name], intact[name]) for name in shapes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_profile_of_no_scores(scored: Any, tmp_path: Path, value: float) -> None:
    model, path = scored[0], tmp_path / "odd"
    profile.save(path, model, "razorattention", {"echo": torch.full((3, 4), value), "induction": torch.zeros(3, 4)})
    with pytest.raises(ProfileError, match="echo"):
        KVCache(model, spec(profile=str(path)))


def test_options() -> None:
    for wrong in ("echo=-0.1", "induction=2", "sinks=-1", "window=0", "share=0", "budget='1MiB'", "budget=3"):
        with pytest.raises(RecipeError):
            parse(f"razorattention({wrong})")

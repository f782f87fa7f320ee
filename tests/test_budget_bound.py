"""No layer and head ever holds more than its budget plus what may not leave yet, and freezing happens once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import KVCache
from kvloom.core.codec import Block, Const
from kvloom.segments.minmax import MinMax
from tests.families import prompt, subject
from tests.reference import held, kept, layers_of, run_cache

# recipe -> most slots of a head after any forward: budget, what an interval lets wait, a unit less one
BOUNDS = {
    "streamingllm(sinks=4, window=28)": 32,
    "h2o(budget=32)": 32,
    "h2o(budget=32, window=0)": 32,
    "snapkv(budget=32, window=8, interval=1)": 32,
    "snapkv(budget=32, window=8, interval=8)": 32 + 7,
    "razorattention(echo=0.0, induction=0.0, sinks=4, budget=32)": 32 + 15,
    "tova(budget=32)": 32,
    "keydiff(budget=32, interval=8)": 32 + 7,
    "expected-attention(budget=32, window=8, interval=8)": 32 + 7,
    "razorattention(echo=0.0, induction=0.0, sinks=4, window=20, share=100)": 4 + 20 + 1 + 15,
    "streamingllm(sinks=4, window=60) | kivi(bits=8, group=8, residual=8)": 64 + 7,
    "streamingllm(sinks=4, window=60) | kivi(bits=4, group=16, residual=32)": 64 + 15,
    "h2o(budget=64) | kivi(bits=8, group=8, residual=8)": 64 + 7,
    "tova(budget=64) | kivi(bits=8, group=8, residual=8)": 64 + 7,
    "h2o(budget=64, window=8) | kivi(bits=4, group=8, residual=16)": 64 + 7,
    "snapkv(budget=64, window=8, interval=4) | kivi(bits=8, group=8, residual=8)": 64 + 3 + 7,
    "razorattention(echo=0.0, induction=0.0, budget=64) | kivi(bits=8, group=8, residual=8)": 64 + 15 + 7,
}
SIZES = {
    "decode": [90] + [1] * 60,
    "chunks and turns": [40, 30, 1, 1, 50, 1, 1, 1, 25, 1],
    "just over": [70] + [1] * 50,
    "single tokens": [1] * 120,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", BOUNDS)
def test_slots_stay_within_the_bound(recipe: str, sizes: list[int]) -> None:
    model = subject("llama")
    cache = KVCache(model, recipe)

    def check(length: int) -> None:
        worst = max(len(head) for layer in kept(cache) for head in layer)
        assert worst <= BOUNDS[recipe], f"{worst} slots at {length}"

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


# What must never leave, whatever a unit holds: the newest tokens that the recipe promises.
NEWEST = {
    "streamingllm(sinks=4, window=60) | kivi(bits=8, group=8, residual=8)": 60,
    "streamingllm(sinks=0, window=40) | kivi(bits=4, group=16, residual=32)": 40,
    "h2o(budget=64) | kivi(bits=8, group=8, residual=8)": 32,
    "h2o(budget=64, window=8) | kivi(bits=4, group=8, residual=16)": 8,
    "snapkv(budget=64, window=8, interval=4) | kivi(bits=8, group=8, residual=8)": 8,
    "razorattention(echo=0.0, induction=0.0, window=40, share=100) | kivi(bits=8, group=8, residual=8)": 40,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", NEWEST)
def test_newest_tokens_stay_in_compositions(recipe: str, sizes: list[int]) -> None:
    model = subject("llama")
    cache = KVCache(model, recipe)

    def check(length: int) -> None:
        want = set(range(max(0, length - NEWEST[recipe]), length))
        for layer in held(cache):
            for head in layer:
                missing = want - {i for name, index in head.items() if name != "mean" for i in index}
                assert not missing, f"{sorted(missing)[:5]} gone at {length}"

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "recipe", ["h2o(budget=64)", "streamingllm(window=60)", "snapkv(budget=64, window=16, interval=4)"]
)
def test_what_is_exact_is_the_newest(recipe: str, sizes: list[int]) -> None:
    """A value outside the residual is frozen, so the exact values are the newest tokens of those held."""
    model, residual = subject("llama"), 16
    cache = KVCache(model, f"{recipe} | kivi(bits=4, group=8, residual={residual})")

    def check(length: int) -> None:
        for layer in layers_of(cache):
            for group in layer.groups:
                segment = group.segments["main"]
                if segment.n:
                    for index in segment.index:
                        exact = index[segment.value.frozen :].tolist()
                        newest = index.sort().values.tolist()[len(index) - len(exact) :]
                        assert sorted(exact) == newest, f"at {length}"

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "recipe",
    [
        "kivi(bits=2, group=8, residual=16)",
        "streamingllm(sinks=4, window=44) | kivi(bits=2, group=8, residual=16)",
        "h2o(budget=48) | kivi(bits=2, group=8, residual=16)",
        "snapkv(budget=48, window=8, interval=8) | kivi(bits=2, group=8, residual=16)",
        "razorattention(echo=0.2, induction=0.2, budget=48) | kivi(bits=2, group=8, residual=16)",
        "mikv(budget=0.3)",
    ],
)
def test_nothing_is_encoded_twice(recipe: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row that is encoded is one that the model made, and each at most once per plane."""
    model = subject("llama")
    cache = KVCache(model, recipe)
    made: set[bytes] = set()
    update, encode = type(cache).update, MinMax.encode

    def watch(self: Any, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        made.update(row.numpy().tobytes() for x in (k, v) for row in x.flatten(0, 2).contiguous())
        return update(self, k, v, *args, **kwargs)

    rows: dict[bytes, int] = {}

    def spy(self: MinMax, x: Tensor, const: Const) -> Block:
        for row in x.flatten(0, 1).contiguous():
            data = row.numpy().tobytes()
            rows[data] = rows.get(data, 0) + 1
        return encode(self, x, const)

    monkeypatch.setattr(type(cache), "update", watch)
    monkeypatch.setattr(MinMax, "encode", spy)
    ids = torch.randperm(290)[None, : sum(sizes)] + 10  # no token twice: the first layer's values know no position
    run_cache(model, cache, ids, sizes)
    assert rows and max(rows.values()) == 1
    if "mikv" not in recipe:  # its keys are balanced before they are encoded
        assert rows.keys() <= made


@pytest.mark.parametrize("recipe", list(BOUNDS)[7:12])
def test_bytes_of_dropped_units_are_freed(recipe: str) -> None:
    """Bytes do not grow with the text once the budget is reached."""
    model = subject("llama")
    cache, sizes = KVCache(model, recipe), []
    run_cache(model, cache, prompt(340), [140] + [1] * 200, lambda n: sizes.append(cache.nbytes))
    room = 2 * 3 * (64 * 2 * 16 * 4)  # of the buffers that come and go
    assert max(sizes[100:]) <= max(sizes[1:60]) + room
    assert max(len(head) for layer in kept(cache) for head in layer) < 90


def test_stays_close_to_full_with_a_loose_budget() -> None:
    """A composition whose budget holds everything is its codec alone."""
    model, ids, sizes = subject("llama"), prompt(100), [80] + [1] * 20
    for placement in ("h2o(budget=200)", "snapkv(budget=200)", "streamingllm(window=200)"):
        got = run_cache(model, KVCache(model, f"{placement} | kivi(bits=8, group=8, residual=16)"), ids, sizes)
        want = run_cache(model, KVCache(model, "kivi(bits=8, group=8, residual=16)"), ids, sizes)
        assert (got - want).abs().max() < (0.2 if "streaming" in placement else 1e-3), placement

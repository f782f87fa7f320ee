"""The ledger against the memory that really lives, and budgets in bytes against the ledger."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from kvloom import KVCache
from kvloom.core.cache import KVLayer
from tests.families import build, prompt, subject
from tests.reference import kept, layers_of, run_cache

RECIPES = [
    "full",
    "streamingllm(sinks=4, window=60)",
    "h2o(budget=0.3)",
    "snapkv(budget=64, window=8, interval=8)",
    "pyramidkv(budget=64, window=8, interval=8)",
    "adakv(budget=64, window=8, interval=8)",
    "kvcrush(budget=64, window=8, interval=8)",
    "task-kv(budget=64, sinks=4, recent=20, window=8, interval=8)",
    "scissorhands(budget=64, window=16)",
    "expected-attention(budget=64, window=16, interval=8)",
    "razorattention(echo=0.2, induction=0.2, window=20, share=10)",
    "kivi(bits=2, group=8, residual=32)",
    "kivi(bits=3, group=16, residual=32)",
    "mikv(budget=0.3, bits=2)",
    "streamingllm(sinks=4, window=60) | kivi(bits=4, group=8, residual=16)",
    "h2o(budget=0.4) | kivi(bits=4, group=8, residual=16)",
    "snapkv(budget=100, window=8) | kivi(bits=2, group=8, residual=16)",
]
SIZES = {
    "prompt": [300], "odd prompt": [299], "decode": [200] + [1] * 40, "chunks": [150, 60, 1, 1, 31, 1],
    "single tokens": [1] * 120,
}  # fmt: skip


def living() -> int:
    """Bytes of all storages that a tensor known to Python holds."""
    gc.collect()
    sizes = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter):
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_nbytes_is_what_deleting_frees(recipe: str, sizes: list[int]) -> None:
    model = subject("llama")
    cache = KVCache(model, recipe)
    run_cache(model, cache, prompt(sum(sizes)), sizes)
    told, before = cache.nbytes, living()
    assert told == cache.report().used + cache.report().room
    del cache
    assert abs(before - living() - told) <= 0.01 * told


def test_nbytes_with_forks() -> None:
    """What copies share is counted once by each and freed with the last."""
    model = subject("llama")
    cache = KVCache(model, "kivi(bits=2, group=8, residual=16)")
    run_cache(model, cache, prompt(300), [300])
    twin = copy.deepcopy(cache)
    batch = copy.deepcopy(cache)
    batch.batch_repeat_interleave(3)
    assert twin.nbytes <= 1.02 * cache.nbytes and batch.nbytes <= 1.2 * cache.nbytes
    told, before = cache.nbytes, living()
    del cache, batch
    assert before - living() < 0.25 * told, "the twin still needs the bytes"
    run_cache(model, twin, prompt(340), [1] * 40)
    told, before = twin.nbytes, living()
    del twin
    assert abs(before - living() - told) <= 0.01 * told


def state(cache: KVCache) -> int:
    return sum(
        e.nbytes for e in cache.report().entries if e.plane == "state" or e.segment == "heads" or e.plane == "constant"
    )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_used_equals_the_formula(recipe: str, sizes: list[int]) -> None:
    """Keys and values to the byte; columns at most what the formula says."""
    model = subject("llama")
    cache = KVCache(model, recipe)
    run_cache(model, cache, prompt(sum(sizes)), sizes)
    planes = columns = want = most = 0
    for entry in cache.report().entries:
        planes += entry.nbytes if entry.plane in ("key", "value") else 0
        columns += entry.nbytes if entry.plane == "column" else 0
    for layer in layers_of(cache):
        for group in layer.groups:
            heads = 2 if group.heads is None else len(group.heads)
            counts = {name: segment.n for name, segment in group.segments.items()}
            numbers = 4 * heads * sum(n * cache.recipe.columns(name) for name, n in counts.items())
            want += cache.recipe.nbytes(layer.site, counts) * heads // 2 - numbers
            most += numbers
    if "|" not in recipe or "chunks" not in str(sizes):
        due = [s for x in layers_of(cache) for g in x.groups for s in g if s.key.frozen or s.value.frozen]
        if all((s.key.frozen, s.value.frozen) == s.kind.frozen(s.n) for s in due):
            assert planes == want
    assert columns <= most
    assert cache.report().used == planes + columns + state(cache)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_little_empty_room(recipe: str, sizes: list[int]) -> None:
    """At most 256 slots of every buffer, or 6 % of it."""
    model = subject("llama")
    check_room(model, recipe, sizes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_little_empty_room_after_a_long_prompt(recipe: str) -> None:
    check_room(subject("llama", max_position_embeddings=4096), recipe, [2001, 1, 1, 1])


def check_room(model: torch.nn.Module, recipe: str, sizes: list[int]) -> None:
    cache = KVCache(model, recipe)  # type: ignore[arg-type]

    def check(length: int) -> None:
        for layer in layers_of(cache):
            for group in layer.groups:
                for name, segment in group.segments.items():
                    buffers = [(b, f"{name} {f}") for f, b in segment.cols.items()]
                    for plane in (segment.key, segment.value):
                        buffers += [
                            (b, f"{name} {plane.which} {f}") for run in plane.runs for f, b in run.fields.items()
                        ]
                    for buffer, label in buffers:
                        room = (
                            buffer.data.untyped_storage().nbytes() / max(1, buffer.data[:, :1].nbytes) - buffer.n
                        ) * buffer.per
                        assert room <= max(256, 0.06 * buffer.n * buffer.per), (
                            f"{label} at {length}: {room:.0f} empty slots"
                        )

    run_cache(model, cache, prompt(sum(sizes)), sizes, check)  # type: ignore[arg-type]


BYTES = {
    "streamingllm": "streamingllm(sinks=4, budget={!r})",
    "h2o": "h2o(budget={!r})",
    "snapkv": "snapkv(window=8, budget={!r})",
    "tova": "tova(budget={!r})",
    "pyramidkv": "pyramidkv(window=8, budget={!r})",
    "adakv": "adakv(window=8, budget={!r})",
    "expected-attention": "expected-attention(window=8, budget={!r})",
}
KIVI = " | kivi(bits=4, group=8, residual=16)"


@pytest.mark.parametrize(("budget", "size"), [("64KiB", 2**16), ("100KB", 10**5), ("1MiB", 2**20)])
@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("kivi", ["", KIVI], ids=["exact", "kivi"])
def test_budget_in_bytes(name: str, kivi: str, budget: str, size: int) -> None:
    """Bytes of the sequence after the prompt, empty room aside: no more than asked for, nor much less."""
    model = subject("llama", max_position_embeddings=8192)
    length = (400 if size < 2**18 else 2500) * (2 if kivi else 1)
    cache = KVCache(model, BYTES[name].format(budget) + kivi)
    run_cache(model, cache, prompt(length), [length])
    used = cache.report().used
    assert used <= size
    assert used > 0.9 * size


@pytest.mark.parametrize("name", BYTES)
def test_fewer_bits_keep_more_tokens(name: str) -> None:
    model, counts = subject("llama"), []
    for kivi in ("", KIVI):
        cache = KVCache(model, BYTES[name].format("100KB") + kivi)
        run_cache(model, cache, prompt(500), [500])
        counts.append(min(len(head) for layer in kept(cache) for head in layer))
    assert counts[1] > 1.5 * counts[0]


def test_layers_left_alone_are_named_and_counted() -> None:
    model = build("gemma3")
    cache = KVCache(model, "full")
    run_cache(model, cache, prompt(60), [60])
    report = cache.report()
    alone = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, KVLayer)]
    assert list(report.left_alone) == alone == [0]
    assert "left alone: 0" in str(report) and report.to_dict()["left_alone"] == {"0": cache.report().left_alone[0]}
    assert sum(e.nbytes for e in report.entries if e.layer == 0) > 0
    told, before = cache.nbytes, living()
    del cache
    assert abs(before - living() - told) <= 0.01 * told

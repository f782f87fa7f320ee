"""Ways to make room in the engine: swapping out and compressing harder."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core.run import Buffer
from kvloom.engine.engine import Engine
from kvloom.engine.request import Request, Sampling
from kvloom.engine.scheduler import Plan, Sarathi
from kvloom.engine.swap import Room, Swap
from kvloom.errors import RecipeError, RequestError
from tests.families import build

GREEDY = Sampling(max_tokens=72, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return build("qwen3")


def prompts(count, length=150, shared=0, seed=0):
    draw = random.Random(seed)
    head = [draw.randrange(90) for _ in range(shared)]
    return [head + [draw.randrange(90) for _ in range(length - shared + i)] for i in range(count)]


def answers(engine, texts, sampling=GREEDY, restless=False):
    """Tokens of every answer, and who was squeezed. `restless`: sequences are given up at random, too."""
    draw = random.Random(1)
    for i, text in enumerate(texts):
        engine.add(Request(text, sampling, id=str(i)))
    found = {str(i): [] for i in range(len(texts))}
    squeezed = set()
    for _ in range(5000):
        if not engine.busy:
            break
        for out in engine.step():
            assert not out.error, out.error
            if out.token is not None:
                found[out.id].append(out.token)
            if out.squeezed:
                squeezed.add(out.id)
        assert engine.pool.free >= -engine.pool.limit // 20  # forks that go on have empty room of their own
        running = [r for r in engine.live.values() if r.sequence is not None]
        if restless and running and engine.stats()["preempted"] < 12 and draw.random() < 0.2:
            engine._preempt(draw.choice(running), Plan())
    assert not engine.busy
    return [found[str(i)] for i in range(len(texts))], squeezed


def alone(model, recipe, texts, **options):
    engine = Engine(model, recipe, part=64, **options)
    return [answers(engine, [text])[0][0] for text in texts]


@pytest.mark.parametrize("recipe", ["full", "kivi(bits=4, group=32, residual=32)", "h2o(budget=64)"])
def test_swapped_out_and_back_bit_for_bit(model, recipe, tmp_path):
    """Answers under pressure are those of requests alone, and nothing was fed twice."""
    texts = prompts(5)
    wanted = alone(model, recipe, texts)
    swap = Swap(64 << 20, tmp_path if recipe.startswith("kivi") else None)
    engine = Engine(model, recipe, part=64, keep=False, scheduler=Sarathi(mode="swap"), swap=swap)
    assert answers(engine, texts, restless=True)[0] == wanted
    stats = engine.stats()
    assert stats["preempted"] and stats["swapped"] == stats["preempted"], stats
    assert swap.used == 0 and engine.pool.used == engine.pool.promised == engine.pool.holders == 0


def test_swap_leaves_shared_beginnings_and_falls_back(model):
    """A beginning that others share stays in memory; a swap area that is full means to feed again."""
    texts = prompts(4, 320, shared=270)
    wanted = alone(model, "full", texts)
    probe = Engine(model, "full")
    for size in (16 << 20, 20 << 10):
        limit = int(1.5 * probe.outline("").more(0, 320))
        engine = Engine(model, "full", memory=limit, scheduler=Sarathi(mode="swap"), swap=Swap(size))
        assert answers(engine, texts)[0] == wanted
        assert engine.stats()["preempted"]
        engine.prefix.clear()
        assert engine.pool.used == engine.pool.promised == engine.pool.holders == 0


def test_only_what_is_new_leaves_again():
    """A copy stays valid until its room is needed: the second time only new rows are moved, and rows come back as they were."""
    swap = Swap(1 << 20)
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, n, 8, generator=draw) for n in (40, 5, 3)]
    buffer, first = Buffer(parts[0]), parts[0].nbytes
    for i in (1, 2):
        assert swap.out([(buffer, True)]) and swap.away(buffer) and buffer.data.numel() == 0
        swap.back([buffer])
        assert torch.equal(buffer.view, torch.cat(parts[:i], 1))
        buffer.append(parts[i])
    moved = swap.out_bytes
    assert first + parts[1].nbytes <= moved < first + parts[1].nbytes + 128
    assert swap.out([(buffer, True)]) and swap.out_bytes - moved <= parts[2].nbytes + 64
    swap.back([buffer])
    assert torch.equal(buffer.view, torch.cat(parts, 1))
    moved = swap.out_bytes
    swap.out([(buffer, True)])
    assert swap.out_bytes == moved  # unchanged: nothing moves
    swap.back([buffer])
    swap.out([(buffer, False)])  # one that may have been written to: all of it
    assert swap.out_bytes - moved >= buffer.n * 2 * 8 * 4
    del buffer
    assert swap.used == 0


def test_one_run_for_many_buffers_and_copies_give_way():
    swap = Swap(64 << 10)
    some = [Buffer(torch.randn(2, 30, 8)) for _ in range(8)]
    assert swap.out((x, True) for x in some) and swap.runs == 1
    swap.back(some)
    other = Buffer(torch.randn(2, 900, 8))
    assert swap.out([(other, True)])  # the copies of what is back make room
    assert not swap.out([(x, True) for x in some]) and not any(map(swap.away, some))
    with pytest.raises(RequestError):
        Swap(10)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_free_runs_never_touch(moves):
    room, held = Room(1000), []
    for take, n in moves:
        if take:
            start = room.take(n)
            largest = max((b - a for a, b in room.runs), default=0)
            if start is None:
                assert largest < n
            else:
                held.append((start, n))
        elif held:
            room.give(*held.pop(n % len(held)))
        spans = sorted([*((a, a + n) for a, n in held), *room.runs])
        assert all(a[1] == b[0] for a, b in pairwise(spans)) and sum(b - a for a, b in spans) == 1000
        assert all(a[1] < b[0] for a, b in pairwise(room.runs))
        assert room.free == sum(b - a for a, b in room.runs)


@pytest.mark.parametrize(
    ("recipe", "squeeze"),
    [
        ("full", "kivi(bits=2, group=32, residual=32)"),
        ("full", "streamingllm(sinks=4, window=40)"),
        ("snapkv(budget=128)", "snapkv(budget=48)"),
        ("kivi(bits=4, group=32, residual=32)", "keydiff(budget=64) | kivi(bits=4, group=32, residual=32)"),
    ],
)
def test_squeezed_caches_take_less_and_say_so(model, recipe, squeeze):
    texts = prompts(3, 180)
    probe = Engine(model, recipe, part=64)
    tight = recipe == "full"
    limit = int(2.02 * probe.outline("").more(0, 180)) if tight else 1 << 20
    engine = Engine(
        model, recipe, part=64, memory=limit, keep=False, scheduler=Sarathi(mode="squeeze"), squeeze=squeeze
    )
    found, squeezed = answers(engine, texts, restless=not tight)
    assert all(len(x) == 72 for x in found)
    assert squeezed and engine.stats()["squeezed"] == len(squeezed)
    whole = alone(model, recipe, texts)
    assert all(x == y for i, (x, y) in enumerate(zip(found, whole, strict=True)) if str(i) not in squeezed)
    assert engine.pool.used == engine.pool.promised == engine.pool.holders == 0


def test_squeezing_frees_bytes_and_keeps_what_was_encoded(model):
    engine = Engine(
        model,
        "kivi(bits=4, group=32, residual=32)",
        part=64,
        squeeze="keydiff(budget=64) | kivi(bits=4, group=32, residual=32)",
    )
    engine.add(Request(prompts(1, 260)[0], GREEDY, id="a"))
    while not engine.live["a"].answered:
        engine.step()
    r = engine.live["a"]
    before = sum(n for _, n, _ in set(r.sequence.storages()))
    assert engine._squeeze(r)
    assert sum(n for _, n, _ in set(r.sequence.storages())) < 0.6 * before
    assert all(group.n <= 64 + 32 for layer in r.sequence.layers for group in layer.groups)
    assert not engine._squeeze(r)


@pytest.mark.parametrize(
    ("recipe", "squeeze"),
    [
        ("full", "snapkv(budget=64)"), ("snapkv", "h2o(budget=64)"), ("kivi(bits=4)", "kivi(bits=2)"), ("full", "xkv"),
        ("streamingllm", "snapkv"),
    ],
)  # fmt: skip
def test_squeezes_that_cannot_be_are_refused_at_start(model, recipe, squeeze):
    with pytest.raises(RecipeError, match="squeezed"):
        Engine(model, recipe, squeeze=squeeze)

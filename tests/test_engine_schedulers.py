"""Who goes next: bounds, orders and fairness of the engine's schedulers."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.engine.batch import BatchLLM, families
from kvloom.engine.engine import Engine
from kvloom.engine.fair import FastSwitch, KVShare
from kvloom.engine.pace import Pace
from kvloom.engine.request import Request, Sampling
from kvloom.engine.scheduler import Sarathi
from kvloom.engine.swap import Swap
from kvloom.errors import RequestError
from tests.families import build


@pytest.fixture(scope="module")
def model():
    return build("qwen3")


def greedy(tokens, n=12, **options):
    return Request(tokens, Sampling(max_tokens=n, temperature=0.0), **options)


def texts(count, length, shared=0, seed=0):
    draw = random.Random(seed)
    head = [draw.randrange(90) for _ in range(shared)]
    return [head + [draw.randrange(90) for _ in range(length - shared)] for _ in range(count)]


def drain(engine, steps=4000):
    """Tokens of each answer."""
    found = {}
    for _ in range(steps):
        if not engine.busy:
            return found
        for out in engine.step():
            assert not out.error, out.error
            if out.token is not None:
                found.setdefault(out.id, []).append(out.token)
    raise AssertionError("it does not come to an end")


def alone(model, recipe, requests, **options):
    engine = Engine(model, recipe, keep=False, **options)
    found = {}
    for request in requests:
        engine.add(request)
        found |= drain(engine)
    return found


def test_pace_learns_what_steps_cost():
    draw, pace, cost = random.Random(0), Pace(), np.array([0.004, 0.0005, 2e-6, 0.0003, 3e-8])
    for _ in range(200):
        rows, n = draw.choice((0, 0, 64, 200)), draw.randrange(1, 30)
        load = (n, n * draw.randrange(100, 2000), rows, rows * draw.randrange(4000))
        pace.note(load, float(cost @ [1, *load]) * draw.uniform(0.9, 1.1))
    for load in ((1, 100, 0, 0), (20, 30_000, 0, 0), (8, 8000, 128, 256_000)):
        assert pace.seconds(load) == pytest.approx(float(cost @ [1, *load]), rel=0.12)
    assert pace.known


class Clocked(Sarathi):
    """Steps take what a formula says."""

    def __init__(self, **options):
        super().__init__(**options)
        self.times = []

    def ran(self, plan, seconds):
        decoding, context, rows, pairs = plan.load
        alone = 0.004 + 0.0005 * decoding + 1e-6 * context
        self.times.append((decoding, rows, alone, alone + 0.0004 * rows + 1e-7 * pairs))
        super().ran(plan, self.times[-1][3])


@pytest.mark.parametrize("recipe", ["full", "kivi(bits=4, group=32, residual=32)"])
def test_prompts_hold_nobody_up_for_longer_than_asked(model, recipe):
    """What arrives in the middle of answers makes a step at most `stall` times as long; the answers are what they were."""
    long, short = texts(4, 400), texts(4, 30, seed=1)
    requests = [greedy(x, 80, id=f"s{i}") for i, x in enumerate(short)]
    late = [greedy(x, 6, id=f"l{i}") for i, x in enumerate(long)]
    wanted = alone(model, recipe, [*requests, *late], part=32)
    for stall in (3.0, None):
        scheduler = Clocked(rows=256, stall=stall)
        engine = Engine(model, recipe, part=32, keep=False, scheduler=scheduler)
        for request in requests:
            engine.add(request)
        found = {}
        for step in range(400):
            if step in (10, 20, 26, 32):
                engine.add(late[(10, 20, 26, 32).index(step)])
            for out in engine.step():
                found.setdefault(out.id, []).append(out.token)
            if not engine.busy:
                break
        assert found == wanted
        ratios = [took / alone for decoding, rows, alone, took in scheduler.times[12:] if decoding]
        if stall is None:
            assert max(ratios) > 6
        elif recipe == "full":
            assert 2 < max(ratios) <= 3.3
        else:  # one part is the least
            assert max(rows for decoding, rows, *_ in scheduler.times[12:] if decoding) <= 32


def test_a_stall_below_one_is_refused():
    with pytest.raises(RequestError, match="stall"):
        Sarathi(stall=1.0)


def whole_tree(prompts):
    """Tokens saved if every level of the tree were shared: all tokens less the distinct beginnings."""
    return sum(map(len, prompts)) - len({tuple(x[:i]) for x in prompts for i in range(1, len(x) + 1)})


def single_level(prompts, part):
    """Most tokens that groups save, one beginning for each prompt, by trying all nodes of the tree from the leaves on."""
    heads = {tuple(x[:i]) for x in prompts for i in range(0, len(x), part)}
    below = {head: [x for x in prompts if tuple(x[: len(head)]) == head and len(x) > len(head)] for head in heads}

    def best(head):
        children = [h for h in heads if len(h) == len(head) + part and h[: len(head)] == head]
        return max((len(below[head]) - 1) * len(head), sum(map(best, children)))

    return best(())


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=14),
    st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_families_save_most(prompts, part):
    found = families(prompts, part)
    assert sorted(i for family in found for i in family.members) == list(range(len(prompts)))
    for family in found:
        heads = {tuple(prompts[i][: family.length]) for i in family.members}
        assert len(heads) == 1 and family.length % part == 0
        assert all(len(prompts[i]) > family.length for i in family.members)
    saved = sum(family.saved for family in found)
    assert saved == single_level(prompts, part) <= whole_tree(prompts)


@pytest.mark.parametrize("recipe", ["full", "kivi(bits=4, group=32, residual=32)", "snapkv(budget=48, window=8)"])
def test_a_batch_computes_every_beginning_once(model, recipe):
    """In little memory and shuffled: prompt tokens computed are those of the plan, fewer than first come, first served needs."""
    groups = [texts(4, 290, shared=256, seed=i) for i in range(5)]
    prompts = [x for group in groups for x in group]
    random.Random(3).shuffle(prompts)
    requests = [greedy(x, 4 + i % 9, id=str(i)) for i, x in enumerate(prompts)]
    wanted = alone(model, recipe, requests)
    probe = Engine(model, recipe).outline("")
    memory, counts = int(3 * probe.more(0, 300)), []
    for scheduler in (BatchLLM(rows=256), Sarathi(rows=256)):
        engine = Engine(model, recipe, memory=memory, scheduler=scheduler)
        order = scheduler.plan(requests, 256) if isinstance(scheduler, BatchLLM) else requests
        for request in order:
            engine.add(request)
        assert drain(engine) == wanted
        stats = engine.stats()
        counts.append(stats["prefix_queries"] - stats["prefix_hits"])
        if isinstance(scheduler, BatchLLM):
            assert counts[0] == 5 * 256 + 20 * 34 and not stats["preempted"]
            assert stats["kept"] == 0 and engine.pool.used == engine.pool.promised == 0
    assert (
        counts[0] <= counts[1] if recipe.startswith("snapkv") else counts[0] < 0.7 * counts[1]
    )  # the first has room for all


def test_fair_shares_by_swapping(model):
    """A client with many long answers and one with few take turns; nothing is fed twice, and answers are those alone."""
    heavy = [greedy(x, 90, id=f"h{i}", salt="heavy") for i, x in enumerate(texts(6, 100))]
    light = [greedy(x, 20, id=f"l{i}", salt="light") for i, x in enumerate(texts(2, 100, seed=5))]
    wanted = alone(model, "full", [*heavy, *light], part=64)
    probe = Engine(model, "full", part=64).outline("")
    ends = {}
    for scheduler in (FastSwitch(every=4), Sarathi(mode="swap")):
        swap = Swap(8 << 20)
        engine = Engine(
            model, "full", part=64, memory=int(2.2 * probe.more(0, 192)), keep=False, scheduler=scheduler, swap=swap
        )
        for request in (*heavy, *light):
            engine.add(request)
        found, steps = {}, 0
        while engine.busy:
            steps += 1
            assert steps < 3000
            for out in engine.step():
                assert not out.error
                found.setdefault(out.id, []).append(out.token)
                if out.finish:
                    ends[type(scheduler).__name__, out.id] = steps
        assert found == wanted
        stats = engine.stats()
        assert stats["swapped"] == stats["preempted"]
        if isinstance(scheduler, FastSwitch):
            assert stats["swapped"] and swap.runs <= stats["swapped"]  # each in one run
            assert not scheduler._known and len(scheduler.had) <= 1
    late = max(ends["FastSwitch", f"l{i}"] for i in range(2))
    assert late < 0.5 * max(ends["Sarathi", f"l{i}"] for i in range(2))


def test_cached_first_but_nobody_waits_for_good(model):
    """Requests whose beginning is kept go before a cold one that came first, `patience` of them at most."""
    shared = texts(12, 300, shared=256)
    (cold,) = texts(1, 300, seed=9)
    places = {}
    for patience in (3, 100):
        engine = Engine(model, "full", scheduler=KVShare(most=1, patience=patience))
        engine.add(greedy(shared[0], 2, id="first"))
        drain(engine)
        engine.add(greedy(cold, 2, id="cold"))
        for i, x in enumerate(shared[1:]):
            engine.add(greedy(x, 2, id=str(i)))
        order = list(drain(engine))
        places[patience] = order.index("cold")
    assert places == {3: 3, 100: 11}

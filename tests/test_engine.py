"""The engine: whatever runs beside a request, its answer is that of the request alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import KVCache, ModelError, RecipeError
from kvloom.engine.engine import Engine
from kvloom.engine.packed import Packed, Part
from kvloom.engine.request import Output, Request, Sampling
from kvloom.engine.scheduler import FCFS, Sarathi
from kvloom.engine.sequence import Outline, Sequence
from kvloom.errors import Full, RequestError
from kvloom.kernels import native
from tests.families import FAMILIES, build, prompt, subject
from tests.reference import run_cache

VARYING = ("llama-dynamic", "llama-longrope")
RECIPES = (
    "full",
    "kivi(bits=4, group=16, residual=16)",
    "snapkv(budget=32, window=8)",
    "streamingllm(sinks=4, window=24)",
    "h2o(budget=32) | kivi(bits=4, group=8, residual=16)",
    "adakv(budget=32, window=8)",
)


def texts(count: int, length: int, vocabulary: int = 50, seed: int = 0) -> list[list[int]]:
    found: Tensor = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return found.tolist()


def run(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """The tokens of each answer. Nothing may fail."""
    for request in requests:
        engine.add(request)
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    for _ in range(2000):
        if not engine.busy:
            return found
        for out in engine.step():
            assert out.finish != "error", out.error
            if out.token is not None:
                found[out.id].append(out.token)
    raise AssertionError("it does not come to an end")


def greedy(tokens: list[int], n: int = 12, **options: Any) -> Request:
    return Request(tokens, Sampling(max_tokens=n, temperature=0.0), **options)


def alone(model: PreTrainedModel, recipe: str, requests: list[Request], **options: Any) -> list[list[int]]:
    """Each request's answer from an engine that runs nothing else."""
    return [
        run(Engine(model, recipe, part=16, **options), [Request(r.tokens, r.sampling)]).popitem()[1] for r in requests
    ]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in VARYING])
def test_packed_logits_are_the_models(family: str) -> None:
    """Prompts cut anywhere, single tokens and forks side by side, past the window of layers that slide."""
    model, texts_ = build(family), texts(2, 80)
    with torch.no_grad():
        want = [model(torch.tensor([text])).logits[0] for text in texts_]
    packed, outline = Packed(model), Outline(model, "full", 80, 64)
    a, b = Sequence(outline), Sequence(outline)

    def check(parts: list[tuple[Sequence, int, int]]) -> None:
        """(sequence, which text, tokens to feed)."""
        before = [s.length for s, _, _ in parts]
        found = packed.run([Part(s, texts_[i][n : n + m]) for (s, i, m), n in zip(parts, before, strict=True)])
        for logits, (_, i, m), n in zip(found, parts, before, strict=True):
            assert float((logits - want[i][n + m - 1]).abs().max()) < 3e-4

    check([(a, 0, 30), (b, 1, 9)])
    check([(a, 0, 1), (b, 1, 30)])
    fork = a.fork()
    check([(a, 0, 14), (b, 1, 1), (fork, 0, 2)])
    for step in range(20):
        parts = [(b, 1, 1), (a, 0, 1)]
        check(parts if step % 3 else [*parts, (fork, 0, 1)])
    check([(b, 1, 3), (a, 0, 1), (fork, 0, 15)])
    twin = b.fork()
    for _ in range(3):
        check([(twin, 1, 1), (a, 0, 1), (b, 1, 1)])
    assert a.length == 69 and twin.length == b.length


@pytest.mark.parametrize("recipe", [*RECIPES, "minicache(interval=2, start=0.0)", "xquant(bits=4, group=16)"])
def test_one_sequence_is_as_under_generate(recipe: str) -> None:
    """A prompt in the same parts, then tokens one by one: the logits of `KVCache`."""
    options = {"num_key_value_heads": 4} if "xquant" in recipe else {}
    model = subject("llama", num_hidden_layers=4, **options)
    ids, sizes = prompt(80), [16, 16, 16, 9] + [1] * 23
    want = run_cache(model, KVCache(model, recipe), ids, sizes)
    packed, sequence = Packed(model), Sequence(Outline(model, recipe, 80, 16))
    start = 0
    for m in sizes:
        got = packed.run([Part(sequence, ids[0, start : start + m].tolist())])[0]
        start += m
        assert float((got - want[start - 1]).abs().max()) < 3e-4


@pytest.mark.skipif(native.ISA is None, reason="kernels alone decode on their own")
def test_kernels_decode_on_their_own() -> None:
    """Most steps of an exact cache make no layer do anything, and a report takes them in."""
    model = subject("llama")
    packed, sequence = Packed(model), Sequence(Outline(model, "full", 200, 64))
    packed.run([Part(sequence, texts(1, 60)[0])])
    slow, ahead = 0, []
    for _ in range(60):
        packed.run([Part(sequence, [5])])
        slow += sequence.ahead[1] == 0
        ahead.append(sequence.ahead[1])
    assert slow < 10 and max(ahead) >= 10 and sequence.length == 120
    assert sequence.layer(1).length == 120 and sequence.layers[1].groups[0].segments["main"].key.n == 120


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scheduler", [Sarathi(rows=40), FCFS(rows=24), Sarathi(rows=200, most=2)])
def test_company_changes_nothing(recipe: str, scheduler: Sarathi | FCFS) -> None:
    """Together, again with what was kept, and with too little memory: the answers of requests alone."""
    model = subject("llama")
    shared, rest = texts(1, 40)[0], texts(6, 60, seed=1)
    requests = [greedy(shared[: 40 * (i % 2)] + text[: 7 + 9 * i], 10 + i) for i, text in enumerate(rest)]
    want = alone(model, recipe, requests, keep=False)
    engine = Engine(model, recipe, part=16, scheduler=scheduler)
    assert list(run(engine, requests).values()) == want
    again = [Request(r.tokens, r.sampling) for r in requests]
    assert list(run(engine, again).values()) == want
    assert engine.stats()["prefix_hits"] > 0
    needs = max(engine.outline("").more(0, len(r.tokens) + 20) for r in requests)
    tight = Engine(
        model, recipe, part=16, scheduler=scheduler, memory=int(needs * 1.5) + engine.outline("").copied(100)
    )
    assert list(run(tight, [Request(r.tokens, r.sampling) for r in requests]).values()) == want
    assert tight.pool.used <= tight.pool.limit


def test_who_gives_up_memory_answers_the_same() -> None:
    """With room for two and a half answers, some begin again and are fed what they had answered."""
    model = subject("llama")
    requests = [greedy(text, 120) for text in texts(5, 20)]
    want = alone(model, "kivi(bits=4, group=16, residual=16)", requests)
    engine = Engine(model, "kivi(bits=4, group=16, residual=16)", part=16, keep=False)
    engine.pool.limit = int(engine.outline("").more(0, 140) * 2.5)
    assert list(run(engine, requests).values()) == want
    assert engine.stats()["preempted"] > 0 and engine.pool.used == engine.pool.promised == engine.pool.holders == 0


def test_kept_beginnings_share_bytes() -> None:
    """Eight prompts with one beginning hold it once, and it is fed once."""
    shared, rest = texts(1, 512)[0], texts(8, 10, seed=2)
    model = subject("llama", max_position_embeddings=1024)
    engine = Engine(model, part=256)
    run(engine, [greedy(shared + rest[0], 2)])
    held = engine.pool.used
    outs: list[Output] = []
    for text in rest:
        engine.add(greedy(shared + text, 30))
    for _ in range(4):
        outs += engine.step()
    one = engine.outline("").nbytes(512)
    assert all(out.cached == 512 for out in outs if out.token is not None)
    assert engine.stats()["running"] == 8 and engine.pool.used < held + one


def test_salt_keeps_prompts_apart() -> None:
    model, text = subject("llama"), texts(1, 50)[0]
    engine = Engine(model, part=16)
    for salt, cached in (("a", 0), ("b", 0), ("a", 48), ("", 0)):
        engine.add(greedy(text, 1, salt=salt))
        (out,) = (out for _ in range(9) if engine.busy for out in engine.step())
        assert out.cached == cached


def test_sampling_hangs_on_the_seed_alone() -> None:
    model = subject("llama")
    settings_ = [
        Sampling(max_tokens=15, temperature=0.9, seed=7, top_p=0.9, logprobs=3),
        Sampling(max_tokens=15, temperature=1.3, seed=8, top_k=5),
        Sampling(max_tokens=15, temperature=1.0, seed=9, min_p=0.05, repetition=1.3, presence=0.2, frequency=0.1),
    ]
    requests = [Request(text, s) for text, s in zip(texts(3, 30), settings_, strict=True)]
    want = alone(model, "full", requests)
    engine = Engine(model, part=16)
    assert list(run(engine, requests).values()) == want
    other = [Request(r.tokens, Sampling(max_tokens=15, temperature=1.3, seed=100)) for r in requests]
    assert list(run(engine, other).values()) != want


def test_logprobs_are_the_models() -> None:
    model, text = subject("llama"), texts(1, 30)[0]
    engine = Engine(model, part=16)
    engine.add(Request(text, Sampling(max_tokens=3, temperature=0.0, logprobs=2, bias={7: 100.0})))
    outs = [out for _ in range(9) if engine.busy for out in engine.step()]
    with torch.no_grad():
        logs = model(torch.tensor([[*text, 7, 7]])).logits[0, -3:].log_softmax(-1)
    for out, row in zip(outs, logs, strict=True):
        assert out.token == 7 and out.logprob == pytest.approx(float(row[7]), abs=1e-4)
        assert [token for token, _ in out.top] == row.topk(2).indices.tolist()


def test_ends() -> None:
    """At a stop token, not before the least number, at the most, and when told to."""
    model, text = subject("llama"), texts(1, 30)[0]
    [answer] = alone(model, "full", [greedy(text, 20)])
    at = next(i for i, token in enumerate(answer) if token not in answer[:i] and i > 3)
    engine = Engine(model, part=16)
    stop = frozenset({answer[at]})
    assert run(engine, [Request(text, Sampling(20, 0.0, stop=stop))]).popitem()[1] == answer[: at + 1]
    longer = run(engine, [Request(text, Sampling(20, 0.0, stop=stop, min_tokens=at + 3))]).popitem()[1]
    assert len(longer) > at + 1 and longer[:at] == answer[:at]
    request = greedy(text, 20)
    engine.add(request)
    engine.step(), engine.step(), engine.step()
    engine.abort(request.id)
    assert [out.finish for out in engine.step()] == ["abort"] and not engine.busy
    engine.prefix.clear()
    assert engine.pool.used == engine.pool.promised == 0


def test_what_cannot_be_served() -> None:
    model = subject("llama")
    for family in VARYING:
        with pytest.raises(ModelError, match="longest text"):
            Outline(build(family), "full", 4096, 64)
    with pytest.raises(RecipeError, match="second time"):
        Engine(model, "kvzip(budget=0.5)")
    engine = Engine(model, part=16, context=64, queue=2, allowed=["snapkv"])
    for request, why in (
        (greedy([]), "empty"),
        (greedy([1 << 30]), "token 1073741824"),
        (greedy([3] * 60), "context of 64"),
        (greedy([3] * 10, recipe="h2o"), "Available: 'full', 'snapkv'"),
    ):
        with pytest.raises(RequestError, match=why):
            engine.add(request)
    small = Engine(model, part=16, memory=1000)
    with pytest.raises(RequestError, match="KV memory"):
        small.add(greedy([3] * 20))
    one, two, three = (greedy([3] * 20) for _ in range(3))
    engine.add(one), engine.add(two)
    with pytest.raises(Full):
        engine.add(three)
    with pytest.raises(RequestError, match="runs already"):
        engine.add(one)


def test_a_step_that_fails_ends_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject("llama")
    engine = Engine(model, part=16)
    engine.add(greedy([3] * 20))
    monkeypatch.setattr(engine.packed, "run", lambda parts: 1 / 0)
    [out] = engine.step()
    assert out.finish == "error" and "ZeroDivisionError" in out.error and not engine.busy
    monkeypatch.undo()
    assert len(run(engine, [greedy([3] * 20)]).popitem()[1]) == 12


class Machine(RuleBasedStateMachine):
    """Requests come, run, are ended and crowd each other out, in any order."""

    @initialize(recipe=st.sampled_from(RECIPES[:4]), room=st.sampled_from((1.6, 3.0, 50.0)), keep=st.booleans())
    def begin(self, recipe: str, room: float, keep: bool) -> None:
        self.model, self.recipe = subject("llama"), recipe
        self.engine = Engine(self.model, recipe, part=16, scheduler=Sarathi(rows=32), keep=keep)
        outline = self.engine.outline("")
        self.engine.pool.limit = int(outline.more(0, 100) * room) + outline.copied(60)
        self.texts = texts(4, 60)
        self.asked: dict[str, Request] = {}
        self.got: dict[str, list[int]] = {}
        self.waited: dict[str, int] = {}

    @rule(which=st.integers(0, 3), n=st.integers(1, 60), most=st.integers(1, 30))
    def ask(self, which: int, n: int, most: int) -> None:
        request = greedy(self.texts[which][:n], most)
        self.engine.add(request)
        self.asked[request.id], self.got[request.id] = request, []

    @precondition(lambda self: self.engine.busy)
    @rule(steps=st.integers(1, 12))
    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.take(self.engine.step())

    def take(self, outs: list[Output]) -> None:
        for out in outs:
            assert out.finish != "error", out.error
            if out.token is not None:
                self.got[out.id].append(out.token)
            if out.finish in ("stop", "length"):
                request = self.asked.pop(out.id)
                assert [self.got[out.id]] == answers(self.recipe, request)

    @precondition(lambda self: self.asked)
    @rule(at=st.integers(0, 99))
    def end(self, at: int) -> None:
        id = sorted(self.asked)[at % len(self.asked)]
        self.engine.abort(id)
        del self.asked[id]

    @invariant()
    def memory_is_kept_to(self) -> None:
        engine = self.engine
        live = [r for r in engine.live.values() if not r.waiting]
        kept = 0 if engine.prefix is None else len(engine.prefix)
        assert engine.pool.holders == len(live) + kept
        assert engine.pool.used <= engine.pool.limit
        held = {x[:2] for r in live if r.sequence for x in r.sequence.storages()}
        held |= {x[:2] for node in (engine.prefix._kept if engine.prefix else ()) for x in node.sequence.storages()}
        assert sum(nbytes for _, nbytes in held) <= engine.pool.limit

    @invariant()
    def the_oldest_goes_first(self) -> None:
        """Nobody waits while a later one with the same priority has begun, unless it has just given way."""
        waiting = [r.request.arrival for r in self.engine.live.values() if r.waiting and not r.preempted]
        running = [r.request.arrival for r in self.engine.live.values() if not r.waiting]
        assert (
            not waiting
            or not running
            or min(waiting) >= max(running)
            or any(r.preempted for r in self.engine.live.values())
        )

    def teardown(self) -> None:
        for _ in range(3000):
            if not self.engine.busy:
                break
            self.take(self.engine.step())
        assert not self.engine.busy and not self.asked
        if self.engine.prefix is not None:
            self.engine.prefix.clear()
        assert self.engine.pool.used == self.engine.pool.promised == self.engine.pool.holders == 0


_known: dict[Any, list[list[int]]] = {}


def answers(recipe: str, request: Request) -> list[list[int]]:
    """What a request alone is answered, in an engine of its own."""
    key = recipe, tuple(request.tokens), request.sampling.max_tokens
    if key not in _known:
        _known[key] = alone(subject("llama"), recipe, [request])
    return _known[key]


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)

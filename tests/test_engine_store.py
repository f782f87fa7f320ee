"""The store behind the engine: what was kept is found again, by another process too; whatever it does, answers stay what they are."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvloom.engine.engine import Engine
from kvloom.engine.request import Output, Request, Sampling
from kvloom.errors import StoreError
from kvloom.store import Store
from kvloom.store.faults import FaultyTier
from kvloom.store.files import FileTier
from tests.families import build, prompt, subject
from tests.test_engine_adapters import TARGETS, write

KIVI = "kivi(bits=4, group=8, residual=16)"
RECIPES = ("full", KIVI, "h2o(budget=24)", "snapkv(budget=24, window=4) | " + KIVI)
PART = 16


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open("memory://?max=64MiB") as opened:
        yield opened


def serve(engine: Engine, *requests: Request) -> dict[str, list[Output]]:
    found: dict[str, list[Output]] = {}
    for request in requests:
        engine.add(request)
        found[request.id] = []
    while engine.busy:
        for output in engine.step():
            found[output.id].append(output)
        assert engine.pool.used <= engine.pool.limit
    return found


def ask(engine: Engine, ids: list[int], tokens: int = 6, **options: Any) -> tuple[list[int | None], int]:
    """The answer, and how many tokens of the prompt were found."""
    request = Request(ids, Sampling(max_tokens=tokens, temperature=0.0), **options)
    (outputs,) = serve(engine, request).values()
    assert outputs[-1].finish == "length", outputs[-1].error
    return [x.token for x in outputs], outputs[-1].cached


def text(n: int, seed: int = 0) -> list[int]:
    return [int(x) for x in prompt(n, seed=seed)[0]]


def fresh(store: Store | None, recipe: str = "full", **options: Any) -> Engine:
    return Engine(subject("llama"), recipe, part=PART, store=store, **options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_engine_finds_what_one_kept(recipe: str, store: Store) -> None:
    ids = text(75)
    want, none = ask(fresh(None, recipe), ids)
    first = fresh(store, recipe)
    assert ask(first, ids) == (want, 0) and none == 0
    first.close()
    second = fresh(store, recipe)
    assert ask(second, ids) == (want, 64) and second.stats()["store_hits"] == 64
    assert ask(second, ids) == (want, 64) and second.stats()["store_hits"] == 64  # in memory by now
    while second.prefix is not None and second.prefix.evict():
        pass
    assert not second.shelf.jobs and (second.pool.used, second.pool.promised, second.pool.holders) == (0, 0, 0)  # type: ignore[union-attr]


def test_a_whole_state_is_written_once(store: Store) -> None:
    """Input rows can't be cut into parts: one state of a prompt is stored, not one at each border."""
    recipe, ids = "xquant(bits=8)", text(75)
    first = fresh(store, recipe)
    want, _ = ask(first, ids)
    first.close()
    assert store.stat()["memory://"]["puts"] == 1
    assert ask(fresh(store, recipe), ids) == (want, 64)


@pytest.mark.parametrize("recipe", RECIPES[:2])
def test_what_is_in_memory_is_not_read_again(recipe: str, store: Store) -> None:
    """A text that goes on behind one in memory takes the rest from the store, and shares what they have in common."""
    ids = text(120)
    writer = fresh(store, recipe)
    want, _ = ask(writer, ids)
    writer.close()
    for upto in (17, 33, 50, 97):
        engine = fresh(store, recipe)
        ask(engine, ids[:upto])
        hits = store.stat()["memory://"].get("hits") or 0
        assert ask(engine, ids) == (want, 112)
        assert (store.stat()["memory://"]["hits"] or 0) - hits == 7 - upto // PART


@pytest.mark.parametrize("recipe", RECIPES[:2])
def test_answers_are_kept_where_they_are_what_a_prompt_would_be(recipe: str, store: Store) -> None:
    engine = fresh(store, recipe)
    answer, _ = ask(engine, text(20), tokens=40)
    engine.close()
    ids = text(20) + [int(x or 0) for x in answer] + text(9, seed=3)
    want, _ = ask(fresh(None, recipe), ids)
    assert ask(fresh(store, recipe), ids) == (want, 48 if recipe == "full" else 16)


def test_tenants_and_adapters_meet_nothing_of_one_another(store: Store, tmp_path: Path) -> None:
    ids, paths = text(40), {f"a{i}": write(tmp_path / str(i), subject("llama"), TARGETS["llama"], i) for i in range(2)}
    renamed = {"a1": paths["a0"], "a0": paths["a1"]}
    engine = fresh(store, adapters=paths)
    want = {key: ask(engine, ids, adapter=key[0], salt=key[1]) for key in (("", ""), ("", "x"), ("a0", ""), ("a1", ""))}
    assert all(cached == 0 for _, cached in want.values())
    engine.close()
    again = fresh(store, adapters=renamed)
    for (adapter, salt), (tokens, _) in want.items():
        name = {"": "", "a0": "a1", "a1": "a0"}[adapter]  # a name is nothing, what it stands for is
        assert ask(again, ids, adapter=name, salt=salt) == (tokens, 32)
    assert ask(fresh(store), ids, salt="y")[1] == 0


@pytest.mark.parametrize("fault", ["cut", "flip", "tear", "drop", "wrong", "delay", "full"])
@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_a_store_that_fails_changes_nothing(recipe: str, fault: str, tmp_path: Path) -> None:
    ids = text(60)
    want, _ = ask(fresh(None, recipe), ids)
    tier = FaultyTier(FileTier(tmp_path), [fault], seed=2, rate=0.5, on="both", delay=0.05)
    with Store(tier, pause=0.0, deadline=2.0) as store:
        for _ in range(3):
            engine = fresh(store, recipe)
            assert ask(engine, ids)[0] == want
            engine.close()


def test_others_do_not_wait_for_a_slow_store(tmp_path: Path) -> None:
    ids, other = text(60), text(40, seed=5)
    tier = FaultyTier(FileTier(tmp_path), ["delay"], on="get", delay=0.4)
    with Store(tier) as store:
        engine = fresh(store, deadline=0.1)
        want, _ = ask(fresh(None), ids)
        start = time.monotonic()
        assert ask(engine, ids) == (want, 0) and time.monotonic() - start < 2.0
        engine.close()
        engine = fresh(store, deadline=3.0)
        slow, fast = (Request(x, Sampling(max_tokens=4, temperature=0.0)) for x in (ids, [7, 8, 9]))
        engine.add(slow)
        engine.step()
        engine.add(fast)
        done: list[str] = []
        while engine.busy:
            done += [x.id for x in engine.step() if x.finish]
        assert done == [fast.id, slow.id]
        # one that leaves meanwhile gives its memory back once its threads are done
        engine = fresh(store, deadline=3.0)
        gone = Request(other, Sampling(max_tokens=4))
        engine.add(gone)
        engine.step()
        assert engine.pool.promised > 0
        engine.abort(gone.id)
        assert engine.pool.promised > 0
        while engine.shelf is not None and engine.shelf.jobs:
            engine.step()
            time.sleep(0.05)
        assert (engine.pool.used, engine.pool.promised, engine.pool.holders) == (0, 0, 0)
        tier.rate = 0.0


def test_one_reads_for_all_that_begin_alike(store: Store) -> None:
    ids = text(64)
    engine = fresh(store)
    ask(engine, [*ids, 7])
    engine.close()
    requests = [Request(ids + text(3 + i, seed=i), Sampling(max_tokens=3, temperature=0.0)) for i in range(6)]
    want = serve(fresh(None), *requests)
    engine, hits = fresh(store), store.stat()["memory://"].get("hits") or 0
    got = serve(engine, *requests)
    assert {k: [x.token for x in v] for k, v in got.items()} == {k: [x.token for x in v] for k, v in want.items()}
    assert {v[-1].cached for v in got.values()} == {64}
    assert (store.stat()["memory://"]["hits"] or 0) - hits == 4


@pytest.mark.parametrize("seed", [1, 23])
def test_all_are_served_in_little_memory_over_a_faulty_store(seed: int, tmp_path: Path) -> None:
    """Requests come, leave, make room for others and read, while parts are written: nobody is lost, nothing leaks."""
    draw, texts = random.Random(seed), [text(120, seed=i) for i in range(3)]
    tier = FaultyTier(FileTier(tmp_path), ["delay", "drop"], seed=seed, rate=0.3, on="both", delay=0.03)
    outline = fresh(None, KIVI).outline("")
    memory = int(1.5 * outline.more(0, 160)) + outline.copied(120)
    with Store(tier, pause=0.0) as store:
        engine = fresh(store, KIVI, memory=memory, deadline=0.5)
        waiting = [
            Request(
                draw.choice(texts)[: draw.randint(5, 110)], Sampling(max_tokens=draw.randint(1, 20), temperature=0.0)
            )
            for _ in range(10)
        ]
        ends: list[Output] = []
        while waiting or engine.busy:
            for _ in range(draw.randint(0, 2)):
                if waiting:
                    engine.add(waiting.pop())
            if engine.live and draw.random() < 0.03:
                engine.abort(draw.choice([*engine.live]))
            ends += [x for x in engine.step() if x.finish is not None]
        assert len(ends) == 10 and all(x.finish != "error" for x in ends), [x.error for x in ends]
        engine.close()
        assert engine.shelf is not None and engine.prefix is not None
        while engine.shelf.jobs:
            list(engine.shelf.collect())
            time.sleep(0.01)
        engine.prefix.clear()
        assert (engine.pool.used, engine.pool.promised, engine.pool.holders) == (0, 0, 0)
        tier.rate = 0.0


def test_what_cannot_be_stored_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="whole text"):
        Engine(build("mistral-sliding"), store=store)
    with pytest.raises(StoreError, match="keep=False"):
        fresh(store, keep=False)


PROGRAM = """
import os, signal, sys
import torch
from kvloom.store import Store
from tests.test_engine_store import RECIPES, ask, fresh, text
torch.set_num_threads(1)
with_store = [fresh(Store.open(sys.argv[1]), recipe) for recipe in RECIPES]
print([ask(engine, text(75)) for engine in with_store], flush=True)
for engine in with_store:
    engine.shelf.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_what_the_next_one_finds(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, f"file://{tmp_path}?max=64MiB"]
    root = Path(__file__).parent.parent
    want = [ask(fresh(None, recipe), text(75))[0] for recipe in RECIPES]
    for cached in (0, 64):
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert done.stdout.strip() == repr([(tokens, cached) for tokens in want])


@pytest.mark.slow
def test_a_killed_server_leaves_what_the_next_one_finds(tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    command = [
        sys.executable,
        "-m",
        "kvloom",
        "serve",
        "nano",
        "--port",
        "0",
        "--kv-memory",
        "64MiB",
        "--store",
        f"file://{tmp_path}",
    ]
    body = {"prompt": text(700), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    found = []
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            head = [process.stderr.readline() for _ in range(4)]
            assert str(tmp_path) in head[1], head
            url, end = head[3].split()[0].removesuffix("/v1"), time.monotonic() + 30
            while True:
                try:
                    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < end
                    time.sleep(0.1)
            found.append((answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]))
            while not found[-1][1] and sum(x.stat().st_size > 100_000 for x in tmp_path.rglob("*") if x.is_file()) < 2:
                assert time.monotonic() < end
                time.sleep(0.1)
            time.sleep(0.5)
        finally:
            process.kill()
            process.communicate()
    assert found[0] == (found[1][0], 0) and found[1][1] == 512

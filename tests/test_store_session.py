"""Models with a store: what comes from it gives the tokens that computing gives, for every way of feeding a recipe needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvloom
from kvloom.core.registry import parse
from kvloom.errors import StoreError
from kvloom.store import Agent, Document, Identity, Place, Store, attach, chunk_keys
from kvloom.store.faults import FaultyTier
from kvloom.store.files import FileTier
from kvloom.store.fingerprint import describe, fingerprint
from kvloom.store.memory import MemoryTier
from kvloom.store.session import Attached
from tests.families import build, prompt, subject

KIVI = "kivi(bits=4, group=8, residual=16)"
RECIPES = ("full", KIVI, "snapkv(budget=24, window=4)", "h2o(budget=24)", "snapkv(budget=40, window=4) | " + KIVI)
BLOCK = 16


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open("memory://?max=64MiB") as opened:
        yield opened


def answers(
    attached: Attached, ids: torch.Tensor, tenant: str = "", **options: Any
) -> tuple[list[int], torch.Tensor, Any]:
    """Greedy tokens, their logits [n, V], and the report."""
    options = {"max_new_tokens": 6, "do_sample": False} | options
    reply = attached.session(tenant).generate(ids, output_logits=True, return_dict_in_generate=False, **options)
    cache, _ = attached.session(tenant).prefill(ids)
    with torch.no_grad():
        logits = attached.model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits[0, -1]
    return reply.tokens, logits, reply.report


def same(a: torch.Tensor, b: torch.Tensor, exact: bool) -> bool:
    return torch.equal(a, b) if exact else bool(torch.allclose(a, b, atol=1e-4))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_hit_gives_what_no_hit_gives(family: str, recipe: str, store: Store) -> None:
    model, ids = subject(family), prompt(75)
    with attach(model, recipe=recipe, store=Store(MemoryTier()), block=BLOCK) as other:
        want, logits, first = answers(other, ids)
    with store.attach(model, recipe=recipe, block=BLOCK) as attached:
        cold = attached.session().prefill(ids)[1]
        assert cold.hits == 0 and cold.computed + cold.left == 75 and cold.left <= BLOCK and cold.saved_bytes > 0
        got, again, report = answers(attached, ids)
        assert report.hits == {"rows": 64, "blocks": 64, "whole": 74}[attached.mode]
        assert report.reused == {"memory://": report.hits} and report.loaded_bytes > 0
        assert got == want
        assert same(again, logits, exact=attached.mode != "rows")
        # beside the model without a store
        cache = kvloom.KVCache(model, recipe)
        plain = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, max_new_tokens=6
        )
        if attached.mode == "rows":
            assert plain[0, 75:].tolist() == want
    assert first.hits == 0


@pytest.mark.parametrize("recipe", RECIPES[:2])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shared_beginning(recipe: str, data: st.DataObject) -> None:
    """A tree of prompts, in any order: all logits are those of a store that is empty."""
    model = subject("llama")
    lengths = st.integers(1, 60)
    with Store(MemoryTier()) as store, store.attach(model, recipe=recipe, block=BLOCK) as attached:
        base = prompt(60)[0].tolist()
        for seed in range(3):
            cut, more = data.draw(lengths), data.draw(lengths)
            ids = torch.tensor([base[:cut] + prompt(more, seed=seed)[0].tolist()])
            with Store(MemoryTier()) as empty, empty.attach(model, recipe=recipe, block=BLOCK) as fresh:
                want, got = (x.session().prefill(ids)[0] for x in (fresh, attached))
            with torch.no_grad():
                logits = [model(ids[:, c.get_seq_length() :], past_key_values=c).logits[0, -1] for c in (want, got)]
            assert same(*logits, exact=recipe != "full")
            if seed:
                base = ids[0].tolist()


def test_part_of_a_block_serves_exact_rows(store: Store) -> None:
    model = subject("llama")
    with store.attach(model, block=BLOCK) as attached:
        attached.session().prefill(prompt(49))
        ids = torch.cat([prompt(49)[:, :40], prompt(20, seed=3)], 1)
        assert attached.session().prefill(ids)[1].hits == 40
        assert attached.session().prefill(prompt(48))[1].hits == 47  # the last token is left
        assert attached.session().prefill(prompt(30))[1].hits == 29
    with store.attach(model, recipe=KIVI, block=BLOCK) as attached:
        assert attached.session().prefill(ids)[1].hits == 0  # another recipe's blocks
        assert attached.session().prefill(prompt(49))[1].hits == 32  # what both begin with, in whole blocks
        assert attached.session().prefill(ids)[1].hits == 48
        assert attached.session().prefill(prompt(48))[1].hits == 32  # the last block is left


def test_a_cache_that_depends_on_what_follows_serves_one_prompt(store: Store) -> None:
    with store.attach(subject("llama"), recipe="snapkv(budget=24, window=4)", block=BLOCK) as attached:
        session = attached.session()
        session.prefill(prompt(50))
        assert session.prefill(prompt(50))[1].hits == 49
        for ids in (prompt(51), prompt(49), torch.cat([prompt(48), prompt(2, seed=1)], 1)):
            assert attached.session().prefill(ids)[1].hits == 0
        assert attached.session("another").prefill(prompt(50))[1].hits == 0
        with pytest.raises(StoreError, match="one prompt only"):
            Document(attached, prompt(50)).prepare()


def test_turns_are_kept(store: Store) -> None:
    for recipe in ("full", KIVI):
        with store.attach(subject("llama"), recipe=recipe, block=BLOCK) as attached:
            session = attached.session()
            first = session.generate(prompt(40), keep=True, max_new_tokens=30, do_sample=False)
            ids = torch.cat([first.sequences, prompt(9, seed=5)], 1)
            got = session.generate(ids, max_new_tokens=4, do_sample=False)
            assert got.report.hits == 64
            with Store(MemoryTier()) as empty, empty.attach(subject("llama"), recipe=recipe, block=BLOCK) as fresh:
                assert fresh.session().generate(ids, max_new_tokens=4, do_sample=False).tokens == got.tokens
    with pytest.raises(StoreError, match="exactly one"):
        session.generate(prompt(40), keep=True, num_beams=2, max_new_tokens=4)


@pytest.mark.parametrize("coding", ["zstd", "rans"])
@pytest.mark.parametrize("recipe", ["full", KIVI, "h2o(budget=24)"])
def test_packed_chunks_come_back_the_same(recipe: str, coding: str, store: Store) -> None:
    with store.attach(subject("llama"), recipe=recipe, block=BLOCK, coding=coding) as attached:
        first, second = (attached.session().generate(prompt(60), max_new_tokens=4, do_sample=False) for _ in range(2))
        assert second.report.hits >= 48 and first.tokens == second.tokens


def test_documents_and_agents(store: Store) -> None:
    with store.attach(subject("llama"), block=BLOCK) as attached:
        document = Document(attached, prompt(50))
        with document:
            assert document.prepare().hits == 48
            reply = attached.session().generate([document, [20, 21, 22]], max_new_tokens=3, do_sample=False)
            assert reply.report.hits == 48 and reply.report.tokens == 53
        one = Agent(attached, prompt(40))
        one.say([30, 31], max_new_tokens=30, do_sample=False)
        two = one.fork()
        assert two.say([32], max_new_tokens=3, do_sample=False).report.hits >= 64
        assert one.say([33], max_new_tokens=3, do_sample=False).report.hits >= 64
        seen: list[Any] = []

        def program(cache: Any, tokens: Any, spans: Any) -> None:
            seen.extend((span.start, span.stop) for span in spans)
            with torch.no_grad():
                attached.model(torch.tensor([tokens[cache.get_seq_length() :]]), past_key_values=cache)

        attached.program = program
        puts = store.stat()["memory://"]["puts"]
        reply = attached.session().generate([[5, 6, 7], document, [8]], keep=True, max_new_tokens=3)
        assert reply.report.mixed and seen == [(3, 53)] and store.stat()["memory://"]["puts"] == puts


@pytest.mark.parametrize("family", ["mistral-sliding", "llama-dynamic"])
def test_models_that_cannot_be_served(family: str, store: Store) -> None:
    with pytest.raises(StoreError, match=r"whole text|change with the length"):
        store.attach(build(family))


def test_misuse(store: Store) -> None:
    with store.attach(subject("llama"), block=BLOCK) as attached:
        session = attached.session()
        with pytest.raises(StoreError, match="tokenizer"):
            session.prefill("a text")
        with pytest.raises(StoreError, match="empty"):
            session.prefill([])
        with pytest.raises(StoreError, match="no part of a prompt"):
            session.prefill(3.5)  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="shape"):
            session.prefill(prompt(5).expand(2, -1))
        attached.model.train()
        try:
            with pytest.raises(StoreError, match="training"):
                session.prefill(prompt(5))
        finally:
            attached.model.eval()
    with pytest.raises(StoreError, match="coding"):
        store.attach(subject("llama"), coding="cachegen(level=2)")
    with pytest.raises(StoreError, match="block"):
        store.attach(subject("llama"), block=0)


def test_identity_of_a_model() -> None:
    model = build("llama", seed=1)
    first = Identity.of(model)
    assert Identity.of(model) == first and Identity.of(build("llama", seed=1)) == first
    assert first.layout == ((2, 16, 16),) * 3 and first.dtype == "float32" and first.recipe == ""
    others = {
        "weights": Identity.of(build("llama", seed=2)),
        "recipe": Identity.of(model, recipe=KIVI),
        "option": Identity.of(model, recipe="kivi(bits=2, group=8, residual=16)"),
        "block": Identity.of(model, recipe=KIVI, block=128),
        "tenant": Identity.of(model, tenant="secret"),
        "adapter": Identity.of(model, adapter="lora"),
        "rope": Identity.of(build("llama-linear", seed=1)),
        "half": Identity.of(build("llama", seed=1).half()),
    }
    assert len({x.digest for x in (first, *others.values())}) == len(others) + 1
    # one bit of one weight, wherever it stands
    weights = fingerprint(model)
    with torch.no_grad():
        last = list(model.parameters())[-1]
        last.view(torch.int32).view(-1)[-1] ^= 1
    assert fingerprint(model) != weights
    assert describe(parse("full"), 1) == describe(parse("full"), 2) == ""


def test_put_checks_against_the_identity(store: Store) -> None:
    identity = Identity("w", "t", "float32", ((2, 8, 4),))
    (key,) = chunk_keys(identity, range(4), 4)
    good = {Place(0, "key"): torch.zeros(2, 4, 8), Place(0, "value"): torch.zeros(2, 4, 4)}
    assert store.put(key, good, identity=identity)
    for place, x in (
        (Place(1), torch.zeros(2, 4, 8)),
        (Place(0), torch.zeros(4, 4, 8)),
        (Place(0), torch.zeros(2, 4, 4)),
        (Place(0), torch.zeros(2, 4, 8).half()),
        (Place(0, "value"), torch.zeros(2, 4, 8)),
    ):
        with pytest.raises(StoreError, match="layer"):
            store.put(key, {place: x}, identity=identity)
    with pytest.raises(StoreError, match="another identity"):
        store.put(key, good, identity=Identity("w", "t", "float16", ((2, 8, 4),)))


@pytest.mark.parametrize("fault", ["cut", "flip", "tear", "drop", "wrong", "delay", "full"])
@pytest.mark.parametrize("recipe", ["full", KIVI, "h2o(budget=24)"])
def test_tiers_that_fail_cost_time_only(recipe: str, fault: str, tmp_path: Path) -> None:
    model, ids = subject("llama"), prompt(60)
    with Store(MemoryTier()) as store, store.attach(model, recipe=recipe, block=BLOCK) as attached:
        want = attached.session().generate(ids, max_new_tokens=5, do_sample=False).tokens
    tier = FaultyTier(FileTier(tmp_path), [fault], seed=2, rate=0.5, on="both", delay=0.05)
    with Store(tier, pause=0.0, deadline=2.0) as store, store.attach(model, recipe=recipe, block=BLOCK) as attached:
        for _ in range(3):
            session = attached.session()
            assert session.generate(ids, keep=True, max_new_tokens=5, do_sample=False).tokens == want


def test_a_deadline_ends_loading(tmp_path: Path) -> None:
    model, ids = subject("llama"), prompt(60)
    tier = FaultyTier(FileTier(tmp_path), ["delay"], on="get", delay=1.0)
    with Store(tier) as store, store.attach(model, block=BLOCK) as attached:
        attached.session().prefill(ids)
        _, report = attached.session().prefill(ids, deadline=0.1)
        assert report.seconds["load"] < 0.9 and report.computed + report.hits + report.left == 60 and report.hits < 48
        tier.rate = 0.0


def test_a_chunk_that_does_not_fit_is_a_miss(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A valid frame under the right key, by somebody who stored something else there."""
    for recipe in ("full", KIVI, "h2o(budget=24)"):
        with store.attach(subject("llama"), recipe=recipe, block=BLOCK) as attached:
            identity, ids = attached.identity(), prompt(50)
            tokens = ids[0].tolist()
            if attached.mode == "whole":
                (key,) = chunk_keys(identity, tokens[:49], 49)
            else:
                key = chunk_keys(identity, tokens, BLOCK)[0]
            store.put(key, {Place(0, "key"): torch.zeros(2, 3, 16)})
            assert attached.session().prefill(ids)[1].hits == 0
            assert "does not fit" in caplog.text
            assert attached.session().prefill(ids)[1].hits  # the right one took its place
            caplog.clear()


PROGRAM = """
import sys
import torch
from kvloom.store import Store
from tests.families import build, prompt
torch.set_num_threads(1)
with Store.open(sys.argv[1]) as store, store.attach(build("llama"), recipe=sys.argv[2], block=16) as attached:
    reply = attached.session().generate(prompt(60), max_new_tokens=5, do_sample=False)
    print(reply.report.hits, *reply.tokens)
"""


def test_two_processes_share_files(tmp_path: Path) -> None:
    for recipe, hits in (("full", 48), (KIVI, 48)):
        command = [sys.executable, "-c", PROGRAM, f"file://{tmp_path}?max=64MiB", recipe]
        root = Path(__file__).parent.parent
        first, second = (
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.split()
            for _ in range(2)
        )
        assert first[0] == "0" and second[0] == str(hits) and first[1:] == second[1:]

"""Whatever a tier does, the tokens that a model generates are those that it generates without a store."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import time
from pathlib import Path

import pytest
import torch

from kvloom.lab.measure import load_model
from kvloom.store import Store, pack
from kvloom.store.faults import FAULTS, FaultyTier
from kvloom.store.frame import Frame
from kvloom.store.identity import ChunkKey
from kvloom.store.memory import MemoryTier
from kvloom.store.session import attach
from kvloom.store.store import open_tier
from kvloom.store.tier import Deadline, Facts, Tier
from scripts import fuzz

BLOCK = 32
SOON = Deadline(1e6)
OPTIONS = {"max_new_tokens": 6, "do_sample": False}
RECIPES = ["full", "kivi(bits=4, residual=32)"]


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    _, tokenizer = load_model("nano")
    text = "Anna keeps the key of the old tower in a tin box under the stairs. " * 12
    return list(tokenizer.encode(text)[: 4 * BLOCK + 5])


def tokens(
    recipe: str, prompt: list[int], tier: Tier, deadline: float = 5.0
) -> tuple[list[int], dict[str, int | None]]:
    """What is generated with a store over the tier, and the tier's counters."""
    model, tokenizer = load_model("nano")
    with (
        Store(tier, deadline=deadline, failures=9, pause=0.0) as store,
        attach(model, tokenizer, recipe, store=store, block=BLOCK) as attached,
    ):
        reply = attached.session().generate(prompt, **OPTIONS)
        return reply.tokens, store.stat()[tier.name]


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_tokens_under_every_fault(recipe: str, prompt: list[int], tmp_path: Path) -> None:
    held = open_tier(f"file://{tmp_path}")
    want, _ = tokens(recipe, prompt, MemoryTier())
    if recipe == "full":
        model, _ = load_model("nano")
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
        assert want == alone[0, len(prompt) :].tolist()
    # packed chunks go the same way: a few faults are enough for them
    faults = FAULTS if recipe == "full" else ("tear", "flip", "wrong", "cut")
    for fault, on in [("", "get"), *((fault, on) for fault in faults for on in ("put", "get"))]:
        for key in list(held.keys(SOON)):
            held.delete(key, SOON)
        faulty = FaultyTier(held, [fault] if fault else [], seed=len(fault), on=on, delay=9.0)
        faulty.rate = float(on == "put")
        for _ in range(2):  # the first fills the tier, the second reads what is there
            got, counts = tokens(recipe, prompt, faulty, 0.1 if fault == "delay" else 5.0)
            assert got == want, (fault, on)
            faulty.rate = 1.0
        if not fault:
            assert counts.get("hits")
        elif (fault, on) != ("full", "get"):
            assert faulty.happened.get(fault), (fault, on)
    held.close()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("changed", ["identity", "context", "start", "tokens"])
def test_same_tokens_where_others_chunks_lie(recipe: str, changed: str, prompt: list[int]) -> None:
    """Another model's, tenant's or place's numbers under our names, intact and with right checksums."""
    memory = MemoryTier()
    want, _ = tokens(recipe, prompt, memory)
    names = list(memory.keys(SOON))
    other = {"identity": "0" * 64, "context": "1" * 64, "start": 7 * BLOCK, "tokens": (5,) * BLOCK}[changed]
    for name in names:
        frame = Frame.open(bytes(memory.get(name, 0, 1 << 30, SOON) or b""))
        header = frame.header
        key = ChunkKey(header.identity, header.context, header.start, header.tokens)
        wrong = dataclasses.replace(key, **{changed: other})
        noise = {p: torch.zeros_like(x) for p, x in frame.read().items()}
        memory.delete(name, SOON)
        memory.put(name, bytes(pack(wrong, noise, notes=header.notes)), Facts(), SOON)
    got, counts = tokens(recipe, prompt, memory)
    assert got == want and counts["wrong"] and not counts.get("hits")


def crash() -> str:
    faulthandler.disable()  # the crash is meant; no traceback of it in the log
    os.abort()


def hang() -> str:
    time.sleep(60)
    return "refused"


def hoard() -> str:
    return str(len(bytearray(1 << 30)))


@pytest.mark.parametrize(
    ("what", "message"), [(crash, "exit code -6"), (hang, "no answer in 0 s"), (hoard, "see above"), (None, "")]
)
def test_the_fuzzer_finds(
    what: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Crashes, hangs and allocations that are too large, and keeps the frame that did it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "PATIENCE", 0.3)
    real, calls = fuzz.attempt, []

    def attempt(frames: fuzz.Frames, rng: object, now: fuzz.Now) -> str:
        calls.append(real(frames, rng, now))
        return what() if callable(what) and len(calls) > 3 else calls[-1]

    monkeypatch.setattr(fuzz, "attempt", attempt)
    assert fuzz.watch(10, 60.0, 5) == (what is not None)
    out = capfd.readouterr().out
    kept = list(tmp_path.glob("fuzz-*.frame"))
    if what is None:
        assert "10 mutations, seed 5" in out and not kept
    else:
        assert f"FAILED at mutation 3 of seed 5: {message}" in out
        assert [path.name for path in kept] == ["fuzz-5-3.frame"] and kept[0].stat().st_size

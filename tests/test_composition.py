"""Every codec beside every placement: what docs/composition.md says, run on a small model.

The default run takes a pair for every codec and every placement; `make test-all` takes all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import KVCache, parse
from kvloom.core import profile as profiles
from kvloom.core.codec import Block, Codec, Const
from kvloom.core.recipe import Recipe
from kvloom.core.segment import Kind
from kvloom.core.view import sites_of
from kvloom.errors import KvloomError
from kvloom.policies.token_gates import fresh
from scripts import composition
from tests.families import prompt, subject
from tests.profiles import folder, profiled
from tests.reference import kept, layers_of, run_cache

SIZES = [300] + [1] * 200 + [40] + [1] * 20  # a prompt, 200 tokens one by one, a second turn
SHORT = [300] + [1] * 40 + [40] + [1] * 5
NEVER = 1 << 30


def model(placement: str = "") -> PreTrainedModel:
    layers = 4 if placement == "d2o" else 2  # it keeps the first two and the last whole
    return subject("llama", head_dim=64, num_hidden_layers=layers, max_position_embeddings=1024)


@functools.cache
def text() -> Tensor:
    return prompt(sum(SIZES))


def small(placement: str) -> str:
    """The placement with options at which it gives up or moves some of the text."""
    names = {option.name for option in composition.recipes()[placement].options}
    # the mean of neighbours, not their maximum: of equal scores, which leave hangs on the order in which slots are stored
    pooled = ("budget=96", "window=16", "pool='avg'")
    ways = (
        ("start=0.0",),
        ("budget=96", "text_first=False", "merge=None"),  # what merges can't go on behind codes, and says so
        pooled,
        ("budget=96", "window=16"),
        ("budget=96",),
        ("budget=0.3",),
        ("window=60", "share=32"),
        ("window=60",),
        (),
    )
    for way in ways:
        if {each.partition("=")[0] for each in way} <= names:
            try:
                if placement == "attention-gate":
                    return gated()
                recipe = profiled(model(placement), f"{placement}({', '.join(way)})")
                KVCache(model(placement), recipe)
                return recipe
            except KvloomError:
                continue
    raise AssertionError(f"no options found for {placement}")


@functools.cache
def gated() -> str:
    """Attention-Gate with gates of which about half are open; a profile of the shared ones has all open."""
    site = sites_of(model())[0]
    gates = fresh(2, site.kv_heads, 2 * site.key_dim)
    path = Path(folder().name) / "half-open.safetensors"
    profiles.save(path, model(), "attention-gate", {**gates, "out": 20 * gates["out"], "bias": 0 * gates["bias"]})
    return f"attention-gate(profile={str(path)!r})"


def composed(placement: str, codec: str) -> Recipe:
    return (parse(small(placement)) | parse(profiled(model(placement), codec))).ready(model(placement))


class Whole(Codec):
    """Loses nothing; encodes one token at a time, of the keys and of as many heads as the codec it stands for."""

    def __init__(self, like: Codec) -> None:
        self.scope, self.tap, self.per = like.scope, like.tap, {"whole": 1}

    def encode(self, x: Tensor, const: Const) -> Block:
        return {"whole": x.clone()}

    def decode(self, block: Block, const: Const) -> Tensor:
        return block["whole"]

    def nbytes(self, n: int, heads: int, dim: int, itemsize: int) -> int:
        return n * heads * dim * itemsize


def late(kind: Kind) -> Kind:
    """Nothing is ever old enough to be encoded."""
    return replace(kind, key_tail=replace(kind.key_tail, keep=NEVER), value_tail=replace(kind.value_tail, keep=NEVER))


def whole(kind: Kind) -> Kind:
    """Encoded when the recipe does it, but without loss."""
    key, value = (codec if codec.exact else Whole(codec) for codec in (kind.key, kind.value))
    return replace(kind, key=key, value=value)


def main(recipe: Recipe, change: Any) -> Recipe:
    return replace(recipe, kinds={**recipe.kinds, "main": change(recipe.kinds["main"])})


@dataclass
class Ran:
    logits: Tensor
    cache: KVCache
    slots: list[int]  # of each head of each layer, in the end


def ran(placement: str, recipe: Recipe | str, sizes: Sequence[int]) -> Ran:
    """Runs the text on the placement's model, and looks after every forward that no slot is lost or doubled."""
    cache = KVCache(model(placement), recipe)

    def watch(length: int) -> None:
        if length % 16 and length < sum(sizes):
            return
        for layer in kept(cache):
            for head in layer:
                assert len(set(head)) == len(head), "a slot is there twice"
                assert head and min(head) >= 0 and max(head) < length, "a slot of no token"

    logits = run_cache(model(placement), cache, text(), sizes, watch)
    return Ran(logits, cache, [len(head) for layer in kept(cache) for head in layer])


@functools.cache
def alone(placement: str, short: bool) -> Ran:
    return ran(placement, small(placement), SHORT if short else SIZES)


@functools.cache
def full(placement: str) -> Tensor:
    return ran(placement, "full", SIZES).logits.log_softmax(-1)


def check_bytes(cache: KVCache) -> None:
    """Every run takes the bytes that its codec's formula tells of it. Where all that was frozen at once shares something,
    what has left later is still in it."""
    for layer in layers_of(cache):
        site = layer.site
        for group in layer.groups:
            heads = site.kv_heads if group.heads is None else len(group.heads)
            for segment in group.segments.values():
                for plane in (segment.key, segment.value):
                    all_heads, dim = segment.kind.shape(site, plane.which)
                    for run in () if plane.mirrors else plane.runs:
                        told = run.codec.nbytes(run.n, min(heads, all_heads), dim, site.itemsize)
                        held = sum(buffer.used for buffer in run.fields.values())
                        assert held == told if run.grows else held >= told
    report = cache.report()
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for c in layers_of(cache)
        for *_, x, _ in c.tensors()
    }
    assert cache.nbytes == report.used + report.room == sum(held.values())


def pairs() -> list[tuple[str, str]]:
    return [
        (p, c)
        for p, c in itertools.product(composition.placements(), composition.codecs())
        if not composition.refusal(p, c)
    ]


def few() -> list[tuple[str, str]]:
    """As few pairs as hold every codec and every placement that composes with anything."""
    every, chosen = pairs(), []
    for codec in sorted(composition.codecs(), key=lambda c: sum(c == other for _, other in every)):
        mine = [pair for pair in every if pair[1] == codec]
        fresh = [pair for pair in mine if pair[0] not in {p for p, _ in chosen}]
        chosen += (fresh or mine)[:1]
    for at, placement in enumerate(composition.placements()):
        mine = [pair for pair in every if pair[0] == placement]
        if mine and placement not in {p for p, _ in chosen}:
            chosen.append(mine[at % len(mine)])
    return chosen


def cases() -> list[Any]:
    fast = set(few())
    return [pytest.param(*pair, id="-".join(pair), marks=[] if pair in fast else pytest.mark.slow) for pair in pairs()]


@pytest.mark.parametrize(("placement", "codec"), cases())
def test_nothing_is_lost_but_numbers(placement: str, codec: str) -> None:
    """A prompt, 200 steps and a second turn: slots, bytes and a finite distance to the full cache."""
    got, other = ran(placement, composed(placement, codec), SIZES), alone(placement, short=False)
    base, mine = full(placement), got.logits.log_softmax(-1)
    kl = float((base.exp() * (base - mine)).sum(-1).mean())
    assert bool(torch.isfinite(got.logits).all()) and 0 <= kl < 20
    check_bytes(got.cache)
    unit = got.cache.recipe.kinds["main"].unit
    # uneven heads: a budget of the layer may fall to them in another way, as numbers differ
    mine_all, its_all = sum(got.slots), sum(other.slots)
    assert abs(mine_all - its_all) <= (unit + 2) * len(got.slots)


@pytest.mark.parametrize("change", [late, whole])
@pytest.mark.parametrize(("placement", "codec"), cases())
def test_without_loss_it_is_the_placement_alone(placement: str, codec: str, change: Any) -> None:
    got, want = ran(placement, main(composed(placement, codec), change), SHORT), alone(placement, short=True)
    assert got.slots == want.slots
    assert float((got.logits - want.logits).abs().max()) < 3e-4
    if change is late:
        assert not any(
            s.key.frozen or s.value.frozen
            for layer in layers_of(got.cache)
            for g in layer.groups
            for s in (g.segments["main"],)
        )


@pytest.mark.parametrize("placement", composition.placements())
def test_control_the_placements_give_up_something(placement: str) -> None:
    """At the settings used here they hold less than everything."""
    cache = alone(placement, short=True).cache
    assert cache.report().used < 0.9 * ran(placement, "full", SHORT).cache.report().used


@pytest.mark.parametrize(
    ("placement", "codec"),
    [(p, c) for p in composition.placements() for c in composition.codecs() if composition.refusal(p, c)],
)
def test_refused_with_a_reason(placement: str, codec: str) -> None:
    """Before any work, and in a sentence that says what to use instead."""
    with pytest.raises(KvloomError) as caught:
        KVCache(model(placement), composed(placement, codec))
    assert any(word in str(caught.value).lower() for word in ("use ", "compose ", "keep "))


def test_the_page_is_current() -> None:
    assert composition.PAGE.read_text(encoding="utf-8") == composition.page()

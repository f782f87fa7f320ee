"""What models that rewrite their text, such as diffusion models, need of a code (arXiv 2508.14896): for every recipe that encodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvloom import parse
from kvloom.core.codec import Codec, Const
from kvloom.core.view import sites_of
from kvloom.errors import KvloomError
from scripts import composition
from tests.families import subject
from tests.profiles import profiled

N = 192


def planes(recipe: str) -> Iterator[tuple[str, Codec, Const, Tensor]]:
    """Codecs of one layer's keys and values as they are, with their constants, and numbers [h, N, D] to store.

    Not those that take constants from a text, share rows with other layers, or store something else than keys and values.
    """
    model = subject("llama", head_dim=64, num_hidden_layers=2, max_position_embeddings=1024)
    site = sites_of(model)[0]
    try:
        kind = parse(profiled(model, recipe)).ready(model).kinds["main"]
    except KvloomError as error:
        pytest.skip(f"not on this model: {error}")
    for name, outer in (("key", kind.key), ("value", kind.value)):
        heads, codec = outer.at(site, name)[0]
        known = not codec.fits and codec.scope in ("head", "layer") and codec.tap in ("pre-rope", "post-rope")
        if codec.exact or not known or not all(codec.per.values()):
            continue
        h = site.kv_heads if heads is None else len(heads)
        x = torch.randn(h, N, 64, generator=torch.Generator().manual_seed(3))
        yield name, codec, codec.const(site, name), x * torch.linspace(0.3, 3, 64)


@pytest.mark.parametrize("recipe", composition.codecs())
def test_a_place_can_be_written_again(recipe: str) -> None:
    """Units are independent: one that is encoded anew reads as if all had been, and no other changes."""
    for name, codec, const, x in planes(recipe):
        unit = codec.unit
        block, at = codec.encode(x, const), N // unit // 2 * unit
        new = x.clone()
        new[:, at : at + unit] = x[:, :unit].flip(1) * 0.7
        part = codec.encode(new[:, at : at + unit], const)
        pieces = (codec.cut(block, 0, at), part, codec.cut(block, at + unit, N))
        joined = {field: torch.cat([piece[field] for piece in pieces], 1) for field in block}
        got, want, before = (codec.decode(each, const) for each in (joined, codec.encode(new, const), block))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4, msg=f"{recipe}, {name}")
        others = [i for i in range(N) if not at <= i < at + unit]
        assert torch.equal(got[:, others], before[:, others])


@pytest.mark.parametrize("recipe", composition.codecs())
def test_massive_tokens_harm_only_their_group(recipe: str) -> None:
    """One token in twenty, a hundred times as large: tokens that share no unit with one are read back as before."""
    for name, codec, const, x in planes(recipe):
        massive = torch.arange(5, N, 20)
        loud = x.clone()
        loud[:, massive] *= 100
        calm, shaken = (codec.decode(codec.encode(each, const), const) for each in (x, loud))
        hit = set((massive // codec.unit).tolist())
        others = [i for i in range(N) if i // codec.unit not in hit]
        assert torch.equal(calm[:, others], shaken[:, others]), (recipe, name)
        if codec.unit == 1:
            assert len(others) == N - len(massive)


@pytest.mark.parametrize("recipe", composition.codecs())
def test_scores_follow_tokens_wherever_they_stand(recipe: str) -> None:
    """Units in another order have the same dot products in that order."""
    for name, codec, const, x in planes(recipe):
        units = torch.randperm(N // codec.unit, generator=torch.Generator().manual_seed(1))
        order = (units[:, None] * codec.unit + torch.arange(codec.unit)).flatten()
        q = torch.randn(len(x), 3, 64, generator=torch.Generator().manual_seed(2))
        if name == "key":
            a, b = (codec.dot(q, codec.encode(each, const), const, 0.125) for each in (x, x[:, order]))
            torch.testing.assert_close(b, a[..., order], atol=2e-3, rtol=1e-3)


def test_control_by_channel_a_massive_token_does_harm_its_group() -> None:
    """So codes of keys by channel suit such models less: what shares a group with a massive token is lost."""
    found = {name: (codec, const, x) for name, codec, const, x in planes("kivi")}
    codec, const, x = found["key"]
    loud = x.clone()
    loud[:, 5] *= 100
    calm, shaken = (codec.decode(codec.encode(each, const), const) for each in (x, loud))
    error = [float((y[:, 6:32] - x[:, 6:32]).norm() / x[:, 6:32].norm()) for y in (calm, shaken)]
    assert error[1] > 1.5 * error[0]

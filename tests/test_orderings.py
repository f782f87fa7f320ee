"""What papers claim of one code against another, on the bundled model: keys, values and queries that it made of a text, or its
predictions. Planted outlier channels stand for those of large models, which the bundled one has only mildly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import KVCache
from kvloom.core.codec import Codec
from kvloom.lab.measure import load_model
from kvloom.lab.tasks.base import SHIPPED
from kvloom.policies.pairs import Text, read
from kvloom.segments.levels import Levels
from kvloom.segments.lloyd import lloyd
from kvloom.segments.minmax import MinMax
from kvloom.segments.rotate import Rotate

Store = Callable[[Tensor], Tensor]  # keys or values [H, n, D] -> as they are read back
MODELS = ("nano", "nano+outliers")


@functools.cache
def loaded(name: str) -> tuple[Any, Any]:
    return load_model(name)


def ids_of(name: str, at: int, tokens: int) -> Tensor:
    """Text that profiles were not made from: the places between those."""
    words = SHIPPED.read_text(encoding="utf-8")
    found = loaded(name)[1].encode(words[at : at + 8 * tokens], add_special_tokens=False)
    return torch.tensor([found[:tokens]])


@functools.cache
def captured(name: str, at: int = 100_000) -> Text:
    return read(loaded(name)[0], ids_of(name, at, 576), 64)


def coded(codec: Codec, const: dict[str, Tensor] | None = None) -> Store:
    return lambda x: codec.decode(codec.encode(x, const or {}), const or {})


def same(x: Tensor) -> Tensor:
    return x


def rotated(bits: int, dim: int = 64) -> Store:
    codec = Rotate(MinMax(bits, None, "channels"), "hadamard")
    site: Any = type("Site", (), {"key_dim": dim, "value_dim": dim})()
    return coded(codec, codec.const(site, "key"))


def error(name: str, keys: Store, values: Store = same) -> float:
    """Of the attention outputs, over their size, mean of the layers."""
    text, total = captured(name), 0.0
    for layer, q in text.queries.items():
        held, form = text.prompt.layers[layer], text.forms[layer]

        def output(k: Tensor, v: Tensor, q: Tensor = q, scale: float = form.scale) -> Tensor:
            p = (q.unflatten(0, (len(k), -1)).flatten(1, 2) @ k.float().transpose(1, 2) * scale).softmax(-1)
            return p @ v.float()

        want = output(held.keys[0], held.values[0])
        got = output(keys(held.keys[0]), values(held.values[0]))
        total += float((got - want).norm() / want.norm())
    return total / len(text.queries)


@functools.cache
def kl(name: str, recipe: str) -> float:
    """Nats per token from the full cache's predictions, over 64 tokens behind each of three prompts."""
    model, total = loaded(name)[0], 0.0
    for at in (60_000, 300_000, 640_000):
        ids = ids_of(name, at, 704)
        logp = []
        for text in ("full", recipe):
            cache = KVCache(model, text)
            with torch.no_grad():
                model(ids[:, :640], past_key_values=cache)
                logp.append(model(ids[:, 640:], past_key_values=cache).logits[0].log_softmax(-1))
        total += float((logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean()) / 3
    return total


@pytest.mark.parametrize("name", MODELS)
def test_keys_by_channel_beat_keys_by_token_at_2_bits(name: str) -> None:
    """KIVI, arXiv 2402.02750."""
    by_channel, by_token = (error(name, coded(MinMax(2, 32, along))) for along in ("tokens", "channels"))
    assert by_channel < (0.9 if name == "nano" else 0.5) * by_token


def test_values_by_token_lose_more_here() -> None:
    """The other half of KIVI's choice: the bundled model's values have channels that stand out too, and the card says so."""
    by_token, by_channel = (error("nano", same, coded(MinMax(2, 32, along))) for along in ("channels", "tokens"))
    assert by_channel < by_token < 1.3 * by_channel


@pytest.mark.parametrize("name", MODELS)
def test_learned_levels_beat_even_ones_at_3_bits(name: str) -> None:
    """KVQuant, arXiv 2401.18079: levels from one text, tried on another."""
    here, there, bits = captured(name), captured(name, 500_000), 3
    codec, lost = Levels(bits, "tokens"), {"learned": 0.0, "even": 0.0}
    for layer in here.queries:
        learnt, x = (text.prompt.layers[layer].keys[0].float() for text in (there, here))
        low, high = learnt.amin(1), learnt.amax(1)
        const = {"mid": (low + high) / 2, "half": (high - low) / 2}
        unit = ((learnt - const["mid"][:, None]) / const["half"][:, None]).flatten().sort().values.double()
        tables = {
            "learned": lloyd(unit, torch.ones_like(unit), 2**bits, 50),
            "even": torch.linspace(-1, 1, 2**bits + 1).double(),
        }
        tables["even"] = (tables["even"][1:] + tables["even"][:-1]) / 2
        for which, levels in tables.items():
            mine = {**const, "levels": levels.float()[None], "shown": levels.float()[None]}
            y = codec.decode(codec.encode(x, mine), mine)
            lost[which] += float((y - x).norm() / x.norm())
    assert lost["learned"] < 0.95 * lost["even"]


@pytest.mark.parametrize("name", MODELS)
def test_low_rank_and_outliers_mend_2_bits(name: str) -> None:
    """GEAR, arXiv 2403.05527."""
    options = "bits=2, group=32, residual=32"
    bare = kl(name, f"gear({options}, outliers=0.0, rank=0, late_rank=0)")
    low_rank, both = kl(name, f"gear({options}, outliers=0.0)"), kl(name, f"gear({options})")
    assert both < 0.8 * bare and low_rank < bare


def test_rotation_beats_none_where_channels_stand_out() -> None:
    """A code for each token by itself (RotateKV, arXiv 2501.16383; TurboQuant). Without outliers there is little to spread."""
    for bits, gain in ((2, 0.85), (3, 0.6), (4, 0.5)):
        plain = coded(MinMax(bits, None, "channels"))
        assert error("nano+outliers", rotated(bits)) < gain * error("nano+outliers", plain)
        assert 0.8 < error("nano", rotated(bits)) / error("nano", plain) < 1.25


def test_searched_bits_beat_even_ones_at_equal_bytes() -> None:
    """KVTuner, arXiv 2502.04420: at the bytes of even bits or fewer, on text that was not searched on."""
    for bits, even in ((3, 3), (4, 4)):
        searched, base = f"kvtuner(bits={bits})", f"kivi(bits={even}, residual=32)"
        model = loaded("nano")[0]
        used = []
        for text in (searched, base):
            cache = KVCache(model, text)
            with torch.no_grad():
                model(ids_of("nano", 60_000, 640), past_key_values=cache)
            used.append(sum(e.nbytes for e in cache.report().entries if e.plane in ("key", "value")))
        assert used[0] <= used[1] and kl("nano", searched) < 0.8 * kl("nano", base)

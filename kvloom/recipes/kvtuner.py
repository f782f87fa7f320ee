"""KVTuner: every layer has its own bits for keys and for values, found once for a model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core import profile as profiles
from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.sample import managed, rows
from kvloom.core.segment import Kind, Tail
from kvloom.errors import ProfileError, RecipeError
from kvloom.policies.pairs import BITS, PAIRS, Found, find, read
from kvloom.segments.differing import Differing
from kvloom.segments.minmax import MinMax

CARD = Card(
    name="kvtuner",
    title="KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization for Efficient and Nearly Lossless LLM "
    "Inference",
    year=2025,
    arxiv="2502.04420",
    code="cmd2001/KVTuner",
    idea="Layers differ in how much fewer bits cost them, and keys mostly cost more than values. So each layer gets its own pair of "
    "bits, searched once with two aims, few bits and little loss, and nothing is decided while the model runs.",
    claims="Nearly lossless at 3.25 bits for Llama-3.1-8B and at 4 for Qwen2.5-7B in mathematical reasoning; up to 21.25 % more "
    "throughput than 8 bits of KIVI.",
    differs="The search lessens the distance (KL) to the full cache's predictions behind calibration texts instead of raising a "
    "task's score. Minima are 16-bit numbers, not whole multiples of the scale. Codes are packed, and none is made twice: with "
    "scheme='channel' the authors encode the whole tail again when it is full, with scheme='token' at every step.",
    open="A layer's error is that of its attention output, relative. Layers decide together where the same pairs survive and errors are "
    "within a factor of 1.4 of another's. `bits` leaves scales out, as in the paper.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one, in fp32; KL to the full cache in "
    "nats per token and same top token: bits=2.5: 0.0044, 97 % at 3.8 bits per number with scales and tail; 3.25: 0.0011, 99 % at 4.5; 4: "
    "0.0002, 99 % at 5.1. The same codes with equal bits in all layers: 2 bits 0.116, 87 % at 3.3; keys 4, values 2: 0.015, 97 % at "
    "4.3; 4 bits 0.0033, 97 % at 5.3. So 2.5 searched bits do as well as 4 even ones: the last layer's values and the second layer's "
    "keys need 4 or 8, the others 2. scheme='token', bits=4: 0.0061 at 4.5; keys 4, values 2: 0.066 at 3.5. The profile, from the bundled book: "
    "110 tables for each scheme, 87 seconds of one core.",
    bytes="per token and KV head at a layer's bits (b_K, b_V): D*(b_K + b_V)/8 + 8*D/group, with scheme='token' + 8; the newest "
    "`residual` or fewer exact; the profile is not read after the cache is made",
    points=("bits=3.25", "bits=4.0", "bits=4.0, scheme='token'"),
)
SCHEMES = ("channel", "token")


@recipe(CARD)
def kvtuner(
    bits: float = 4.0,
    loss: float | None = None,
    scheme: Literal["channel", "token"] = "channel",
    group: int = 32,
    residual: int = 32,
    trials: int = 100,
    profile: str | None = None,
) -> Recipe:
    """Stores keys and values of each layer in the bits of the best table in a profile.

    Args:
        bits: mean bits per number at most, over layers, keys and values, without scales.
        loss: take the table of fewest bits with at most this loss (KL in nats per token on the calibration texts) instead.
        scheme: "channel": KIVI's codes, keys by channel; "token": keys and values of each token by themselves, no tail.
        group: numbers that share one scale in scheme="channel"; as the profile was made for.
        residual: newest tokens kept exact in scheme="channel"; keys are frozen that many at a time.
        trials: tables that a calibration tries, for each scheme.
        profile: file made by `kvloom calibrate`; None: the model's own folder, or the user's cache.
    """
    if scheme not in SCHEMES:
        raise RecipeError(f"scheme={scheme!r} must be 'channel' or 'token'.")
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not BITS[0] <= bits <= BITS[-1]:
        raise RecipeError(f"bits={bits!r} must be a number from {BITS[0]} to {BITS[-1]}, such as 4.0.")
    if loss is not None and (isinstance(loss, bool) or not isinstance(loss, int | float) or loss < 0):
        raise RecipeError(f"loss={loss!r} must be a KL divergence in nats per token, 0 or more, such as 0.01, or None.")
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise RecipeError(f"trials={trials!r} must be a number of tables, at least 1.")
    if not isinstance(residual, int) or residual < group or residual % group:
        raise RecipeError(f"residual={residual!r} must be a multiple of group={group}, for example {group}.")

    def base(scheme: str, pair: tuple[int, int]) -> Kind:
        k, v = pair
        if scheme == "token":
            return Kind(MinMax(k, None, "channels"), MinMax(v, None, "channels"))
        return Kind(MinMax(k, group, "tokens"), MinMax(v, group, "channels"), Tail(every=residual), Tail(keep=residual))

    def prepare(model: PreTrainedModel) -> Recipe:
        table, kind = _table(model, bits, loss, scheme, group, profile), base(scheme, (2, 2))
        kinds = {layer: base(scheme, pair) for layer, pair in table.items()}
        key = Differing({layer: [(None, each.key)] for layer, each in kinds.items()})
        value = Differing({layer: [(None, each.value)] for layer, each in kinds.items()})
        return Recipe("kvtuner", kinds={"main": Kind(key, value, kind.key_tail, kind.value_tail)})

    def sketch(config: Any) -> Recipe:
        most = next(b for b in BITS if b >= bits) if loss is None else BITS[-1]
        return Recipe("kvtuner", kinds={"main": base(scheme, (most, most))})

    def calibrate(model: PreTrainedModel, ids: Tensor, path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
        found = {name: learn(model, ids, partial(base, name), trials, tell) for name in SCHEMES}
        tensors = {f"{name}.{part}": x for name, each in found.items() for part, x in each.tensors.items()}
        tensors["group"] = torch.tensor([group])
        profiles.save(path, model, "kvtuner", tensors, trials=trials, residual=residual)
        return tensors

    return Recipe("kvtuner", kinds=sketch(None).kinds, prepare=prepare, sketch=sketch, calibrate=calibrate)


def learn(
    model: PreTrainedModel,
    ids: Tensor,
    base: Callable[[tuple[int, int]], Kind],
    trials: int,
    tell: Callable[[str], None],
    count: int = 6,
    length: int = 1088,
) -> Found:
    """The tables that no other beats, on `count` stretches of a text ids [T]; the last 64 tokens of each are what is compared."""
    texts = rows(model, ids, count, length)
    tell("reading")
    return find(model, [read(model, text, min(64, text.shape[1] // 4)) for text in texts], base, trials, tell)


def _table(
    model: PreTrainedModel, bits: float, loss: float | None, scheme: str, group: int, path: str | None
) -> dict[int, tuple[int, int]]:
    """Bits of keys and of values by layer."""
    layers = list(managed(model))
    shapes = {f"{name}.errors": (len(layers), len(PAIRS)) for name in SCHEMES} | {"group": (1,)}
    found = profiles.find(path, model, "kvtuner", dict(shapes))
    if scheme == "channel" and int(found["group"]) != group:
        raise ProfileError(
            f"group={group}: the profile was made for group={int(found['group'])}. Use that, or make another with: "
            f"kvloom calibrate MODEL --cache 'kvtuner(group={group}, residual={group})' -o FILE"
        )
    tables, mean, losses = (found[f"{scheme}.{part}"] for part in ("tables", "bits", "loss"))
    fits = mean <= bits + 1e-6 if loss is None else losses <= loss
    if not bool(fits.any()):
        raise RecipeError(
            f"loss={loss}: no table in the profile loses so little; the least is {float(losses.min()):.2g}."
        )
    at = int(fits.nonzero().flatten()[-1 if loss is None else 0])  # by rising bits and falling loss
    return {layer: (int(k), int(v)) for layer, (k, v) in zip(layers, tables[at].tolist(), strict=True)}

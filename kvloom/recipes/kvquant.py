"""KVQuant: levels learned for each layer, keys before RoPE in ranges of their channels, and one number in a hundred exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core import profile as profiles
from kvloom.core.card import Card
from kvloom.core.codec import Codec, Const
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.sample import managed, rows, samples
from kvloom.core.segment import Kind
from kvloom.errors import ProfileError, RecipeError
from kvloom.segments.levels import Levels
from kvloom.segments.lloyd import lloyd
from kvloom.segments.outliers import RangeOutliers, TokenOutliers

CARD = Card(
    name="kvquant",
    title="KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization",
    year=2024,
    arxiv="2401.18079",
    code="SqueezeAILab/KVQuant",
    idea="Before RoPE a key's channel keeps its range, so ranges and uneven levels can be learned beforehand, by how much "
    "each number matters to the loss; values take each token's own range. One number in a hundred stays exact.",
    claims="Less than 0.1 of perplexity at 3 bits on Wikitext-2 and C4; 1M tokens of LLaMA-7B on one GPU of 80 GB.",
    differs="Of each key as many outliers are stored as of each value, those furthest outside their channel's range (the "
    "authors' kernels cap them alike); what else lies outside goes to the nearest level. The first tokens are not kept exact "
    "(their default too). Fisher information is the gradient of the loss by what is cached, on the calibration text.",
    open="Range and middle of a token, levels and outliers are the numbers' own size or 16-bit; places take 2 bytes. Ranges "
    "come from 8,192 tokens, levels from a histogram of all of them.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one"
    ", in fp32; KL to the full cache in nats per token and same top token: "
    "bits=4: 0.012, 94 % at 4.9 bits per number; 3: 0.043, 93 % at 3.9; 2: 0.121, 79 % at 2.9 (outliers take 0.75 of it: of 128 "
    "channels 2 stay, in fp32). kivi(group=32, residual=32) beside it: 4 bits 0.003, 97 % at 5.3; 3 bits 0.019, 94 % at 4.3; 2 bits "
    "0.116, 87 % at 3.3. Profile from the bundled book: 16 texts of 2,048 tokens, about a minute of one core.",
    bytes="per token and KV head: D*bits/8 for keys and again for values; per token and plane 2*ceil(outliers/2*C)*(itemsize "
    "+ 2) with C = H*D, and 4 for values; the profile once per layer: 4*C and 8 * 2**bits for each plane",
    points=("bits=2", "bits=3", "bits=4"),
)
BITS = (2, 3, 4)
CELLS = 8192  # of a histogram over [-1, 1]
FEW = 8192  # tokens whose keys are looked at for ranges


@recipe(CARD)
def kvquant(
    bits: int = 3,
    outliers: float = 0.01,
    spread: Literal["layer", "head"] = "layer",
    norm: bool | None = None,
    profile: str | None = None,
) -> Recipe:
    """Stores every token on arrival in levels from a profile of the model.

    Args:
        bits: bits per number, 2, 3 or 4.
        outliers: share of the numbers that stay exact, as the profile was made for.
        spread: "layer": outliers and a value's range are sought among all heads together; "head": in each head, so that a
            placement may drop tokens head by head.
        norm: give what is decoded the mean and spread of what was encoded (Q-Norm); None: with 2 bits.
        profile: file made by `kvloom calibrate`; None: the model's own folder, or the user's cache.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise RecipeError(f"bits={bits!r} is not supported. Choose one of {', '.join(map(str, BITS))}.")
    if isinstance(outliers, bool) or not isinstance(outliers, int | float) or not 0 <= outliers < 1:
        raise RecipeError(f"outliers={outliers!r} must be a share of the numbers, from 0.0 to below 1.0, such as 0.01.")
    if spread not in ("layer", "head"):
        raise RecipeError(f"spread={spread!r} must be 'layer' or 'head'.")
    normed = bits == 2 if norm is None else bool(norm)

    def stored(tables: dict[str, dict[int, Const]] | None) -> Recipe:
        keys, values = (None, None) if tables is None else (tables["key"], tables["value"])
        key: Codec = Levels(bits, "tokens", keys, tap="pre-rope")
        value: Codec = Levels(bits, "channels", values, spread)
        if outliers:
            key, value = RangeOutliers(key, outliers, spread, up=True), TokenOutliers(value, outliers, spread, up=True)
        return Recipe("kvquant", kinds={"main": Kind(key, value)})

    def prepare(model: PreTrainedModel) -> Recipe:
        return stored(_tables(model, bits, outliers, normed, profile))

    def calibrate(model: PreTrainedModel, ids: Tensor, path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
        return learn(model, ids, path, tell, outliers)

    outline = stored(None)
    return Recipe("kvquant", kinds=outline.kinds, prepare=prepare, sketch=lambda config: outline, calibrate=calibrate)


def _tables(
    model: PreTrainedModel, bits: int, outliers: float, normed: bool, path: str | None
) -> dict[str, dict[int, Const]]:
    """Constants of every layer for keys and for values."""
    sites = managed(model)
    count, site = len(sites), next(iter(sites.values()))
    shapes: dict[str, tuple[int, ...]] = {"share": (1,)}
    shapes |= {f"key.{name}": (count, site.kv_heads, site.key_dim) for name in ("mid", "half")}
    for plane in ("key", "value"):
        shapes |= {f"{plane}.levels{bits}": (count, 2**bits), f"{plane}.norm{bits}": (count, 2)}
    found = profiles.find(path, model, "kvquant", shapes)
    if abs(float(found["share"]) - outliers) > 1e-6:
        raise ProfileError(
            f"outliers={outliers}: the profile was made for outliers={float(found['share']):g}. Use that, or make another with: "
            f"kvloom calibrate MODEL --cache 'kvquant(outliers={outliers})' -o FILE"
        )
    tables: dict[str, dict[int, Const]] = {"key": {}, "value": {}}
    for at, layer in enumerate(sites):
        for plane, table in tables.items():
            levels = found[f"{plane}.levels{bits}"][at].clone()[None]
            a, c = found[f"{plane}.norm{bits}"][at].tolist()
            table[layer] = {"levels": levels, "shown": levels * a + c if normed else levels}
        tables["key"][layer] |= {name: found[f"key.{name}"][at].clone() for name in ("mid", "half")}
    return tables


@torch.no_grad()
def learn(
    model: PreTrainedModel,
    ids: Tensor,
    path: Path,
    tell: Callable[[str], None],
    outliers: float = 0.01,
    count: int = 16,
    length: int = 2048,
) -> dict[str, Tensor]:
    """Makes the profile that `kvquant(profile=path)` reads, from a text ids [T]: the model reads it twice.

    First for the range of each key channel, its (1 +- (1 - outliers)) / 2 quantiles; then with gradients for the levels of
    each layer and plane, by k-means of all numbers inside their range, each weighted by its squared gradient.
    """
    texts = rows(model, ids, count, length)
    seen: dict[int, list[Tensor]] = {}
    every = max(1, sum(text.shape[1] for text in texts) // FEW)
    for sample in samples(model, texts, weights=False, pre_rope=True, tell=tell):
        seen.setdefault(sample.layer, []).append(sample.keys[:, ::every].cpu())
    ends = torch.tensor([outliers / 2, 1 - outliers / 2])
    ranges = {layer: torch.quantile(torch.cat(keys, 1), ends, dim=1) for layer, keys in seen.items()}
    mid = {layer: ((low + high) / 2).half() for layer, (low, high) in ranges.items()}
    half = {layer: ((high - low) / 2).clamp_min(1e-6).half() for layer, (low, high) in ranges.items()}
    grids: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    for sample in samples(model, texts, weights=True, pre_rope=True, tell=tell):
        keys = (sample.keys.cpu() - mid[sample.layer][:, None].float()) / half[sample.layer][:, None].float()
        for plane, x, weight in (
            ("key", keys, sample.key_weight),
            ("value", _spread(sample.values.cpu(), outliers), sample.value_weight),
        ):
            assert weight is not None
            held = grids.setdefault((plane, sample.layer), tuple(torch.zeros(2, CELLS, dtype=torch.float64)))
            inside = x.abs() <= 1
            cell = ((x[inside] + 1) / 2 * CELLS).long().clamp_max(CELLS - 1)
            held[0].index_add_(0, cell, weight.cpu()[inside].double())
            held[1].index_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))
    found = {"share": torch.tensor([outliers])}
    found |= {"key.mid": torch.stack(list(mid.values())), "key.half": torch.stack(list(half.values()))}
    for plane in ("key", "value"):
        for bits in BITS:
            made = [_levels(*grids[plane, layer], bits) for layer in mid]
            found[f"{plane}.levels{bits}"], found[f"{plane}.norm{bits}"] = (
                torch.stack(x) for x in zip(*made, strict=True)
            )
    profiles.save(path, model, "kvquant", found, texts=len(texts), length=texts[0].shape[1], outliers=outliers)
    return found


def _spread(values: Tensor, outliers: float) -> Tensor:
    """Values [H, n, D] as their codec sees them: from -1 to 1 between the ends of each token's other numbers."""
    wide = values.transpose(0, 1).flatten(1)
    each = TokenOutliers(Levels(2, "channels"), outliers, up=True).each(wide.shape[1])
    ordered = wide.sort(-1).values
    low, high = ordered[:, each : each + 1], ordered[:, -1 - each : ordered.shape[1] - each]
    return (
        ((wide - (low + high) / 2) / ((high - low) / 2).clamp_min(1e-6)).unflatten(1, (len(values), -1)).transpose(0, 1)
    )


def _levels(weights: Tensor, counts: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels [2**bits], and the two numbers that give what they say the spread and the mean of what was encoded."""
    x = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 - 1
    found = lloyd(x, weights + 1e-9 * weights.sum() * counts / counts.sum(), 2**bits, 1000)
    told = found[torch.bucketize(x, (found[1:] + found[:-1]) / 2)]
    share = counts / counts.sum()
    means = [float((share * y).sum()) for y in (x, told)]
    spreads = [float((share * (y - m).square()).sum()) ** 0.5 for y, m in zip((x, told), means, strict=True)]
    a = spreads[0] / max(spreads[1], 1e-12)
    return found.float(), torch.tensor([a, means[0] - a * means[1]])

"""CSKV: old tokens as coordinates of all heads together, in few directions of a layer's keys before RoPE and of its values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core import profile as profiles
from kvloom.core.card import Card
from kvloom.core.codec import Codec, Const, Exact, Plane
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.sample import managed, rows
from kvloom.core.segment import Kind, Tail
from kvloom.core.view import kv_heads_of, text_config
from kvloom.errors import ProfileError, RecipeError
from kvloom.policies.subspaces import orthonormal, principal
from kvloom.policies.weights import weight_directions
from kvloom.segments.minmax import MinMax
from kvloom.segments.project import Project

CARD = Card(
    name="cskv",
    title="CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
    year=2024,
    arxiv="2409.10593",
    code="wln20/CSKV",
    idea="Keys before RoPE and values of a layer, all heads together, are of low rank: old tokens keep a few coordinates, the "
    "newest window stays exact. The factors come from the weights and are trained layer by layer.",
    claims="80 % less cache with long-context ability kept, 95 % with 4-bit codes on top.",
    differs="Coordinates come from the keys and values at hand, not from hidden states. Nothing is lost: factors X A B of "
    "K = X W are at their best with A = W V and B = V^T, V the first singular directions of K, which is where training by "
    "the paper's loss ends. So 'data' finds V at once; 'asvd' and 'svd' are the paper's starting points. Coordinates of "
    "the window need not be kept beside it. No quantization-aware training.",
    open="The densities behind the 80 and 95 % are not published; the default is the authors' example. Tokens are encoded `window` at a "
    "time, once so many are exact, by the same factors in prompts, later turns and while decoding; until the next forward they "
    "are seen exactly. With `bits`, a value's codes share one scale per head, or per token if 8 does not divide a head's share.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one"
    ", in fp32; KL to the full cache in nats per token and same top token: "
    "keys=0.5, values=0.5: 0.029, 92 % at 16 of 32 bits per number, with directions of start='asvd' 0.041, 87 %, of 'svd' 0.054, "
    "86 %; keys=0.25, values=0.75: 0.056, 90 %; keys=0.2, values=0.2: 0.556, 65 % at 6. Two heads of 64 channels have little "
    "in common: kivi(bits=4, residual=32) loses 0.003 at 5.3 bits. With codes it "
    "wins: bits=4 loses 0.030 at 2.5 bits, kivi(bits=2, residual=32) 0.116 at 3.3. Profile from the bundled book: 16 texts of 1,024 tokens, "
    "seconds of one core. Attention over the coordinates of 8 heads of 64 "
    "at a density of 0.5 takes 5 times as long as `full`: every head goes over the 256 coordinates that all share.",
    bytes="per old token and layer H * (floor(keys * D) + floor(values * D)) * itemsize, or bits/8 each and 4 per window and "
    "coordinate (keys) and per token (values); up to window - 1 exact tokens; 4 * H*D * rank for each plane once per layer",
    points=("keys=0.5, values=0.5", "keys=0.25, values=0.75", "keys=0.2, values=0.2", "bits=4"),
)
SHIPPED = 0.5  # a profile holds at least this density


@recipe(CARD)
def cskv(
    keys: float = 0.5,
    values: float = 0.5,
    window: int = 32,
    bits: int | None = None,
    start: Literal["data", "asvd", "svd"] = "data",
    profile: str | None = None,
) -> Recipe:
    """Keeps a share of the channels of a layer's old keys and values, in directions from a profile.

    Args:
        keys: share of the channels that old keys keep, up to 1.0.
        values: share of the channels that old values keep.
        window: tokens that are encoded at a time; up to one less are exact.
        bits: bits per coordinate; None: the model's own numbers.
        start: where a profile's directions come from when it is made: "data": what the model caches on the text; "asvd": weights
            scaled by their inputs; "svd": weights.
        profile: file made by `kvloom calibrate`; None: the model's own folder, or the user's cache.
    """
    for name, given in (("keys", keys), ("values", values)):
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
            raise RecipeError(f"{name}={given!r} must be a share of the channels, up to 1.0.")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise RecipeError(f"window={window!r} must be a number of tokens, at least 1.")
    if start not in ("data", "asvd", "svd"):
        raise RecipeError(f"start={start!r} must be 'data', 'asvd' or 'svd'.")

    def stored(heads: int, dim: int, tables: dict[Plane, dict[int, Const]] | None) -> Recipe:
        def plane(which: Plane, share: float) -> Codec:
            each = max(1, int(share * dim + 1e-9))
            inner: Codec = Exact()
            if bits is not None:
                inner = MinMax(bits, window, "tokens") if which == "key" else MinMax(bits, _group(each), "channels")
            tap: Literal["pre-rope", "post-rope"] = "pre-rope" if which == "key" else "post-rope"
            return Project(inner, each * heads, None, None if tables is None else tables[which], tap=tap)

        tail = Tail(every=window)
        return Recipe("cskv", kinds={"main": Kind(plane("key", keys), plane("value", values), tail, tail)})

    def sketch(config: Any) -> Recipe:
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return stored(kv_heads_of(config), dim, None)

    def prepare(model: PreTrainedModel) -> Recipe:
        site = next(iter(managed(model).values()))
        return stored(site.kv_heads, site.key_dim, _tables(model, profile, {"key": keys, "value": values}))

    def calibrate(model: PreTrainedModel, ids: Tensor, path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
        return learn(model, ids, path, tell, keys, values, start)

    kinds = stored(1, 8, None).kinds
    return Recipe("cskv", kinds=kinds, prepare=prepare, sketch=sketch, calibrate=calibrate)


def _group(each: int) -> int | None:
    return None if each % 8 else each


def _tables(model: PreTrainedModel, path: str | None, shares: dict[Plane, float]) -> dict[Plane, dict[int, Const]]:
    """Constants of every layer for keys and for values."""
    found = profiles.find(path, model, "cskv", {})
    sites = managed(model)
    site = next(iter(sites.values()))
    tables: dict[Plane, dict[int, Const]] = {}
    for plane, share in shares.items():
        dim = site.key_dim if plane == "key" else site.value_dim
        rank = site.kv_heads * max(1, int(share * dim + 1e-9))
        basis = found.get(f"{plane}.basis", torch.zeros(0, 0, 0))
        if basis.shape[:2] != (len(sites), site.kv_heads * dim) or basis.shape[2] < rank:
            raise ProfileError(
                f"{plane}s={share}: the profile holds directions {tuple(basis.shape)}, fewer than {rank} for each layer. Make "
                f"another with: kvloom calibrate MODEL --cache 'cskv({plane}s={share})' -o FILE"
            )
        turned = orthonormal(basis[..., :rank]).unflatten(1, (site.kv_heads, dim))
        tables[plane] = {layer: {"basis": turned[at][None].clone()} for at, layer in enumerate(sites)}
    return tables


@torch.no_grad()
def learn(
    model: PreTrainedModel,
    ids: Tensor,
    path: Path,
    tell: Callable[[str], None],
    keys: float,
    values: float,
    start: str = "data",
) -> dict[str, Tensor]:
    """Makes the profile: from a text ids [T], directions of keys and of values for these densities, best first."""
    texts = rows(model, ids, 16, 1024)
    if start == "data":
        bases = principal(model, texts, tell, join=None, centred=False, pre_rope=True)
        made = {plane: basis[:, 0] for plane, (basis, _) in bases.items()}
    else:
        made = weight_directions(model, texts, start == "asvd", tell)
    heads, found = kv_heads_of(text_config(model)), {}
    for plane, share in (("key", keys), ("value", values)):
        basis = made["key" if plane == "key" else "value"]
        rank = heads * max(1, int(max(share, SHIPPED) * basis.shape[1] // heads + 1e-9))
        found[f"{plane}.basis"] = basis[..., :rank].half()
    profiles.save(path, model, "cskv", found, start=start, texts=len(texts), length=texts[0].shape[1])
    return found

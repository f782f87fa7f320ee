"""RotateKV: keys from before RoPE turned over several heads at once, their channels in a learned order; values turned too."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core import profile as profiles
from kvloom.core.card import Card
from kvloom.core.codec import Codec
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.sample import managed, rows, samples
from kvloom.core.segment import Kind
from kvloom.errors import ProfileError
from kvloom.segments.across import AcrossHeads, blocked, turned_together
from kvloom.segments.minmax import Clipped
from kvloom.segments.rotate import Rotate
from kvloom.segments.spared import Spared

CARD = Card(
    name="rotatekv",
    title="RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations",
    year=2025,
    arxiv="2501.16383",
    code="ZunhaiSu/RotateKV",
    idea="Before RoPE, keys of several heads are turned together by Hadamard's matrix, which spreads their outliers; channels are then "
    "put in an order in which those that share a scale are alike. Values are turned head by head. Tokens that attention leans on "
    "stay exact.",
    claims="Less than 0.3 of perplexity at 2 bits with LLaMA-2-13B on WikiText-2, less than 1.7 % on GSM8K; 3.97x less peak memory, "
    "2.32x decoding speed.",
    differs="Sinks are found by the attention that the newest 64 queries of the first prompt pay, four of them; the authors take the tokens "
    "that own one of the 20 largest numbers in a layer's input, which a cache does not see. Nothing is fused into weights: values are "
    "turned when stored, and sums of them turned back. A prompt attends to itself exactly. With 3 bits the top level is 2^3 - 1 (the "
    "authors' 3^2 - 1 is a slip).",
    open="Where the number of heads is no multiple of four, as many are turned together as divide both. Later turns and further chunks of "
    "a prompt spare their first four tokens, decoded ones none; all others are encoded on arrival. Exact tokens keep their places beside "
    "every number.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one, in fp32; KL to the full cache in nats "
    "per token and same top token: bits=2: 0.257, 72 % at 2.5 bits per number; with group=64 0.146, 81 % at 2.7; 3: 0.053, 92 % at 3.5; 4: "
    "0.012, 92 % at 4.5. kivi(group=32, residual=32) beside it: 2 bits 0.116, 87 % at 3.3, 3 bits 0.019, 94 % at 4.3. sinks=0: 0.254, 71 % at "
    "2.4 with 2 bits: this model's attention leans on no single tokens. The default group of 128 is a whole token of its two heads. With "
    "planted outlier channels 1.90 at 2 bits, less than 0.7 of the loss of the same codes unturned, turboquant(bits=2) 1.48, kivi 0.132; at 4 "
    "bits 0.085: a turn spreads outliers over all, and scales along channels, as kivi's, leave the others alone. Profile from the bundled book: 16 "
    "texts of 4,096 tokens, under a minute of one core. Decoding is bounded by turning keys back: each head multiplies all "
    "channels of a token by a matrix, so such a token costs four of `full` behind 1,536.",
    bytes="per token and KV head: D*bits/8 + 4*D/group for keys (of all heads together) and again for values (group at most D); "
    "sinks * D * (itemsize + 4) per plane; the order, 2*H*D per layer, and Hadamard's matrix, 4*D*D, once per model",
)


@recipe(CARD)
def rotatekv(
    bits: int = 2,
    value_bits: int | None = None,
    heads: int = 4,
    group: int = 128,
    clip: float | None = None,
    sinks: int = 4,
    profile: str | None = None,
) -> Recipe:
    """Stores every token on arrival, turned by Hadamard's matrix.

    Args:
        bits: bits per number of keys, 1, 2, 3, 4 or 8.
        value_bits: bits per number of values; None: as keys.
        heads: KV heads whose keys are turned together; where that does not divide their number, the most that does.
        group: channels that share a scale; where there are fewer, all of them.
        clip: share of a group's range that its levels span; None: 0.8 with 2 bits, else 1.0.
        sinks: tokens of the first prompt that stay exact, those that its end looks at most; 0: none.
        profile: file made by `kvloom calibrate`; None: the model's own folder, or the user's cache.
    """

    def code(bits: int) -> Clipped:
        return Clipped(bits, group, (0.8 if bits == 2 else 1.0) if clip is None else clip)

    def stored(orders: dict[int, Tensor] | None) -> Recipe:
        key: Codec = AcrossHeads(code(bits), heads, orders, tap="pre-rope")
        value: Codec = Rotate(code(bits if value_bits is None else value_bits), "hadamard", seed=None)
        if sinks != 0:
            key, value = Spared(key, sinks), Spared(value, sinks)
        return Recipe("rotatekv", kinds={"main": Kind(key, value)})

    def prepare(model: PreTrainedModel) -> Recipe:
        return stored(_orders(model, heads, profile))

    def calibrate(model: PreTrainedModel, ids: Tensor, path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
        return learn(model, ids, path, tell, heads)

    outline = stored(None)
    return Recipe("rotatekv", kinds=outline.kinds, prepare=prepare, sketch=lambda config: outline, calibrate=calibrate)


def _orders(model: PreTrainedModel, heads: int, path: str | None) -> dict[int, Tensor]:
    sites = managed(model)
    site = next(iter(sites.values()))
    shapes = {"heads": (1,), "order": (len(sites), site.kv_heads, site.key_dim)}
    found = profiles.find(path, model, "rotatekv", shapes)
    if int(found["heads"]) != heads:
        raise ProfileError(
            f"heads={heads}: the profile was made for heads={int(found['heads'])}. Use that, or make another with: "
            f"kvloom calibrate MODEL --cache 'rotatekv(heads={heads})' -o FILE"
        )
    return {layer: found["order"][at].clone() for at, layer in enumerate(sites)}


@torch.no_grad()
def learn(
    model: PreTrainedModel,
    ids: Tensor,
    path: Path,
    tell: Callable[[str], None],
    heads: int = 4,
    count: int = 16,
    length: int = 4096,
) -> dict[str, Tensor]:
    """Makes the profile that `rotatekv(profile=path)` reads, from a text ids [T], read once.

    The order of each layer: ascending by the sum of every turned channel over all tokens.
    """
    texts, sums = rows(model, ids, count, length), dict[int, Tensor]()
    for sample in samples(model, texts, weights=False, pre_rope=True, tell=tell):
        h, _, dim = sample.keys.shape
        turned = blocked(sample.keys.sum(1).flatten(), turned_together(h, heads) * dim)
        sums[sample.layer] = sums.get(sample.layer, torch.zeros(())) + turned.view(h, dim).double().cpu()
    order = torch.stack([x.flatten().argsort().to(torch.int16).view_as(x) for x in sums.values()])
    found = {"heads": torch.tensor([heads]), "order": order}
    profiles.save(path, model, "rotatekv", found, texts=len(texts), length=texts[0].shape[1], heads=heads)
    return found

"""XQuant: a layer's input is stored in few bits, and keys and values are made of it again when they are read."""

from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from kvloom.core.card import Card
from kvloom.core.codec import Codec, Const
from kvloom.core.project import Projection
from kvloom.core.recipe import Groups, Recipe
from kvloom.core.registry import recipe
from kvloom.core.sample import managed
from kvloom.core.segment import EXACT, Kind, Tail
from kvloom.core.site import Site
from kvloom.core.stack import neighbours
from kvloom.core.view import sites_from
from kvloom.errors import RecipeError
from kvloom.segments.delta import Delta
from kvloom.segments.differing import Differing
from kvloom.segments.minmax import MinMax
from kvloom.segments.project import Project
from kvloom.segments.ranges import ChannelScale

CARD = Card(
    name="xquant",
    title="XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization",
    year=2025,
    arxiv="2508.10395",
    code="",
    idea="Keys and values are products of one input with two weights: store the input, which is half of the two and quantizes "
    "better than keys do, and multiply again at every step. With grouped heads the input is larger than both; then what is "
    "stored is the input in the directions that the weights look at.",
    claims="7.7 times less memory than fp16 with less than 0.1 of perplexity lost; twice less even before any quantization.",
    differs="A reconstruction: there is no official code. XQuant-CL (across=True) is here for models whose inputs are no larger than "
    "keys and values, not for latents of grouped heads; it sums differences anew in each layer, in place of an accumulator that is carried "
    "from layer to layer, so layer i reads i terms, but no full-size copy is ever held; a prompt's inputs wait, exact, until the last layer "
    "has run, so while it is read the peak is that of exact inputs. Models "
    "that normalize keys after their projection are served in the first form only. Values are summed as inputs and projected "
    "once, so only keys are made again, piece by piece.",
    open="The input is that of the attention module, after its norm. Biases and a key norm are applied when keys are made. "
    "In the second form keys are frozen a group at a time and wait for that exactly, values and inputs at once. across=True: the last of "
    "the `first` layers is what later ones add to, and the layers before it stand alone; differences are of the attention modules' "
    "inputs as they are, with each layer's norm weight in them; decoded tokens and later chunks are encoded in the same way, at "
    "the end of each forward, when the last layer has run.",
    measured="Bundled model, whose input is as wide as its keys and values, one held-out Wikipedia text of 1,024 tokens, then 32 "
    "tokens one by one, in fp32; KL to the full cache in nats per token and same top token, bits per number of keys and values: "
    "bits=4: 0.030, 84 % at 4.3; 3 in all layers: 0.149, 72 % at 3.3; 2 with first=3: 1.415, 34 % at 3.3. kivi(residual=32) beside "
    "it: 4 bits 0.006 at 5.4, 3 bits 0.041 at 4.4, 2 bits 0.103 at 3.5. So it is better than kivi near 4.3 bits, worse below: "
    "with two bits a token's 128 channels share four levels. With planted outlier channels it stays the same to the last digit, for inputs "
    "have none of them, and kivi goes to 0.043 and 0.131. Decoding takes about 2.5 times kivi's time at 1,024 tokens: keys are made again "
    "by hidden x D multiplications each. across=True, mean of three texts of 1,024 tokens from a bundled book, 48 decoded: 2 bits 0.027, 86 % at "
    "3.25 bits, where stored inputs alone lose 1.092 and kivi(bits=2, residual=32) 0.076, 86 % at 3.64; 3 bits 0.012, 92 % at 3.75, where "
    "inputs lose 0.101 (4 bits of these: 0.020 at 4.25); 1 bit 0.733. From layer 2 on differences span 2 to 8 times less than inputs; between the "
    "first layers they span as much. With planted outlier channels it stays at 0.027, and kivi goes to 0.081. kivi(bits=3) is still "
    "better where 4.6 bits may be spent: 0.007. Prefill and decoding together take twice as long as without sums, three to four times kivi's.",
    bytes="inputs: per token and layer hidden*bits/8 + 4*hidden/group. Grouped heads: per token and KV head as kivi, D*bits/8 + "
    "4*D/group for keys and again for values, and 4*(H*D)^2 for each of the two bases, 4*H*D for sizes, per layer, once per model. across=True: as inputs, each layer's own difference",
)
Bases = tuple[dict[int, Const], dict[int, Const], dict[int, Const]]
_bases: WeakKeyDictionary[nn.Module, Bases] = WeakKeyDictionary()


@recipe(CARD)
def xquant(bits: int = 4, group: int = 128, first: int = 3, first_bits: int = 4, across: bool = False) -> Recipe:
    """Stores inputs of layers in the place of keys and values, wherever they are not larger.

    Args:
        bits: bits per number, 1, 2, 3, 4 or 8; 16 stores them as they are.
        group: numbers that share one scale: channels of inputs and of values (all, if there are fewer), tokens of keys.
        first: how many of the first layers take `first_bits` where that is more.
        first_bits: bits per number there.
        across: XQuant-CL: layers behind the last of the `first` store only what their input adds to what the layer before reads
            back, and are read as sums. For models whose inputs are no larger than keys and values.
    """
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise RecipeError(f"first={first!r} must be a number of layers, 0 or more.")
    for each in {bits, first_bits} - {16}:
        MinMax(each, group, "channels")  # raises
    if not isinstance(across, bool):
        raise RecipeError(f"across={across!r} must be True or False.")
    most, alone = max(bits, first_bits), max(first - 1, 0)  # the layer behind `alone` ones is what later ones add to

    def code(bits: int, width: int, along: Literal["tokens", "channels"] = "channels") -> Codec:
        """Groups of channels are whole where there are fewer."""
        return EXACT if bits == 16 else MinMax(bits, None if along == "channels" and width <= group else group, along)

    def by_layer(sites: dict[int, Site], few: Codec, many: Codec) -> Codec:
        if bits == most or not first:
            return few
        return Differing({layer: [(None, many if at < first else few)] for at, layer in enumerate(sites)})

    def inputs(sites: dict[int, Site]) -> Recipe:
        width = next(iter(sites.values())).hidden
        return Recipe(
            "xquant", kinds={"main": Kind(by_layer(sites, code(bits, width), code(most, width)), hidden=True)}
        )

    def summed(sites: dict[int, Site]) -> Recipe:
        if not _narrow(sites):
            raise RecipeError(
                "xquant: across=True adds up inputs of layers, which in this model are larger than keys and values. Use "
                "across=False, which stores them in the directions of the weights."
            )
        width = next(iter(sites.values())).hidden
        few, many = code(bits, width), code(most if first else bits, width)
        delta = Delta(many, few, max(1, len(sites) - alone))
        codec = Differing({layer: [(None, many if at < alone else delta)] for at, layer in enumerate(sites)})
        return Recipe("xquant", kinds={"main": Kind(codec, hidden=True)}, grouping=grouping)

    def grouping(sites: Sequence[Site]) -> Groups:
        return neighbours(sites, alone, max(2, len(sites) - alone), "xquant(across=True)")

    def latents(sites: dict[int, Site], tables: Bases | None) -> Recipe:
        site = next(iter(sites.values()))
        wide, tall = site.kv_heads * site.key_dim, site.kv_heads * site.value_dim
        keys, values, sizes = (None, None, None) if tables is None else tables

        def key(bits: int) -> Codec:
            return Project(code(bits, wide, "tokens"), wide, None, keys, tap="pre-rope")

        def value(bits: int) -> Codec:
            return Project(ChannelScale(code(bits, tall), sizes), tall, None, values)

        keyed, valued = (by_layer(sites, plane(bits), plane(most)) for plane in (key, value))
        return Recipe("xquant", kinds={"main": Kind(keyed, valued, Tail(every=1 if bits == 16 else group))})

    def prepare(model: PreTrainedModel) -> Recipe:
        sites = managed(model)
        if across:
            return summed(sites)
        return inputs(sites) if _narrow(sites) else latents(sites, bases(model, sites))

    def sketch(config: Any) -> Recipe:
        sites = sites_from(config, config.dtype, lambda layer: lambda: None, "the configuration")
        if across:
            return summed(sites)
        return inputs(sites) if _narrow(sites) else latents(sites, None)

    any_layer = code(bits, group)
    kind = Kind(Delta(any_layer, any_layer, 2) if across else any_layer, hidden=True)
    return Recipe("xquant", kinds={"main": kind}, prepare=prepare, sketch=sketch)


def _narrow(sites: dict[int, Site]) -> bool:
    """Whether inputs are no larger than keys and values."""
    return all(site.hidden <= site.kv_heads * (site.key_dim + site.value_dim) for site in sites.values())


def bases(model: PreTrainedModel, sites: dict[int, Site]) -> Bases:
    """Of every layer: the directions of keys, those of values, and how much of the input each of the latter stands for.

    With W = U S B^T, what is stored of an input x is x U S for keys, whose codes do not depend on a channel's size, and x U for
    values; both come from k and v, as (k - bias) B and (v - bias) B / S. Raises RecipeError where keys are normalized.
    """
    if model not in _bases:
        found: Bases = {}, {}, {}
        for layer, site in sites.items():
            made = site.projection
            assert made is not None
            if made.norm is not None:
                raise RecipeError(
                    f"xquant: layer {layer} normalizes its keys after their projection, so they are no product of its input, "
                    f"and the input ({site.hidden} numbers) is larger than keys and values. Use a recipe such as kivi."
                )
            found[0][layer], _ = _basis(made, "key")
            found[1][layer], found[2][layer] = _basis(made, "value")
        _bases[model] = found
    return _bases[model]


def _basis(made: Projection, plane: str) -> tuple[Const, Const]:
    weight, bias = (made.key, made.key_bias) if plane == "key" else (made.value, made.value_bias)
    h, dim = weight.shape[:2]
    wide = weight.flatten(0, 1).double()  # [H * D, hidden]
    squares, b = (x.flip(-1) for x in torch.linalg.eigh(wide @ wide.mT))
    size = squares.clamp_min(0).sqrt()
    const = {"basis": b.unflatten(0, (h, dim))[None].float().contiguous()}
    if bias is not None:
        const["mean"] = bias.float()[None]
    return const, {"channel": size.clamp_min(1e-6 * float(size[0])).float()[None]}

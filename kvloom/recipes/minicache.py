"""MiniCache: neighbouring layers of the deeper half share directions of keys and values; tokens that disagree stay apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from kvloom.core.card import Card
from kvloom.core.recipe import Groups, Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import EXACT, Kind
from kvloom.core.site import Site
from kvloom.core.stack import neighbours
from kvloom.core.step import Step
from kvloom.errors import RecipeError
from kvloom.policies.layers import Apart
from kvloom.policies.placements import Keep
from kvloom.segments.minmax import MinMax
from kvloom.segments.slerp import Slerp

CARD = Card(
    name="minicache",
    title="MiniCache: KV Cache Compression in Depth Dimension for Large Language Models",
    year=2024,
    arxiv="2405.14366",
    code="",
    idea="From the middle on, what neighbouring layers cache of a token points nearly the same way. A pair of layers stores one "
    "direction for both and each its own lengths; tokens on which the two disagree most stay as they are.",
    claims="LLaMA-2-7B on ShareGPT, with 4 bits: up to 5.02x smaller, about 5x the throughput, nearly lossless.",
    differs="A reconstruction: no official code was found. The tokens that stay apart are a share of the text (the paper puts a "
    "threshold between the least and the largest angle). They are chosen for keys, values and all heads together. With `bits`, "
    "the common directions are in few bits; the lower half of the layers is not.",
    open="Keys are merged after RoPE, which turns both layers alike. Prompts in chunks and later turns: a chunk is merged at "
    "its end. While decoding, `interval` tokens are merged at a time, when both layers have them; None: decoded tokens stay "
    "exact. A token that stayed apart is merged later if others disagree more. With an odd number of layers the last stays.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one, in fp32; KL to the full "
    "cache in nats per token and same top token: 0.007, 94 % at 27.1 of 32 bits per number (one pair of six layers); retain=0.5: "
    "0.003, 96 % at 29.4; the plain average of both layers instead of arcs and lengths 0.008, 95 %. The pair it merges (layers "
    "3 and 4, from 0) is alike: keys 0.23 pi apart, values 0.39; but layers 2 and 3, or 4 and 5, are at right angles, and "
    "start=0.67, which merges the last two, costs 0.29. So depth alone does not say which layers are alike. "
    "kivi(bits=4, residual=32) loses 0.003 at 5.3 bits.",
    bytes="per token, KV head and layer of a pair: ((D_k + D_v) / 2 + 2) * itemsize + 4; as they are: retain of the tokens, up to "
    "`interval` decoded ones, and all of the first layers",
)


@dataclass(frozen=True)
class _Retained:
    """How many tokens stay apart."""

    share: float

    def bind(self, recipe: Recipe, sites: list[Site]) -> "_Retained":
        return self

    def __call__(self, step: Step) -> int:
        return ceil(self.share * step.length - 1e-9)


@recipe(CARD)
def minicache(
    start: float = 0.5, t: float = 0.6, retain: float = 0.05, interval: int | None = 64, bits: int | None = None
) -> Recipe:
    """Merges pairs of layers into one direction and two lengths.

    Args:
        start: share of the layers, from the first on, that are left as they are.
        t: where between the two directions the common one lies: 0.0 the lower layer's, 1.0 the upper layer's.
        retain: share of the tokens that stay apart, those on which the layers disagree most.
        interval: while decoding, so many tokens are merged at a time; None: they stay as they are.
        bits: bits per number of the common directions; None: the model's own numbers.
    """
    for name, value in (("start", start), ("retain", retain)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise RecipeError(f"{name}={value!r} must be a share, 0.0 to 1.0.")
    if interval is not None and (isinstance(interval, bool) or not isinstance(interval, int) or interval < 1):
        raise RecipeError(f"interval={interval!r} must be a number of tokens, at least 1, or None.")

    def grouping(sites: Sequence[Site]) -> Groups:
        return neighbours(sites, int(start * len(sites)), 2, "minicache")

    def policy(every: int) -> Policy:
        return Policy(_Retained(retain), Keep(to="pair", scope="group"), Apart(), every=every)

    code = Slerp(EXACT if bits is None else MinMax(bits, None, "channels"), t)
    phases = {"prompt": policy(1)} if interval is None else {"prompt": policy(1), "decode": policy(interval)}
    return Recipe("minicache", phases, {"main": Kind(), "pair": Kind(code, code)}, grouping=grouping)

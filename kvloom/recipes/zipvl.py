"""ZipVL: how many tokens matter is read off the attention of each layer; those get more bits than the others, or stay alone."""

from kvloom.core.card import Card
from kvloom.core.codec import Codec
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Nothing
from kvloom.policies.placements import ByMass
from kvloom.policies.scorers import Probes
from kvloom.segments.chunked import Short
from kvloom.segments.minmax import MinMax
from kvloom.segments.ranges import ChannelScale, RunMinMax, TokenMinMax

CARD = Card(
    name="zipvl",
    title="ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache Compression",
    year=2024,
    arxiv="2410.08584",
    code="",
    idea="A layer whose attention is peaked needs few tokens, a flat one many: count how many of the strongest hold a share of "
    "all attention, and give so many tokens, by mean attention, more bits than the others.",
    claims="The prompt 2.6 times as fast and half of the GPU memory with LongVA-7B, 0.2 points lost on Video-MME.",
    differs="A reconstruction of the cache of both versions; there is no official code. The first is the default; with bits=None and "
    "low_bits=None it is the second, which drops what is not important and keeps the rest exact. Attention over a prompt "
    "stays whole, so it is not faster; the paper lets tokens that are not important skip it. Codes are ZipCache's, whose "
    "classes come in multiples of 32 tokens: the important ones are rounded up.",
    open="Probe rows as in ZipCache: attention is summed over them and over all heads, so a layer has one count and one set of "
    "tokens. The newest `window` tokens of a prompt are always important. While decoding, tokens are exact until `gap` have come, "
    "and are judged by the newest one's attention; those that came before are not judged again. Prompts in chunks and later turns are "
    "judged at their end, each by its own rows. Which tokens are images plays no part; text is treated alike.",
    measured="Bundled model, two held-out Wikipedia texts of 1,024 tokens, then 32 tokens one by one, in fp32; KL to the full "
    "cache in nats per token and same top token, bits per number with all constants: defaults 0.146, 80 % at 3.6 bits; mass=0.9: 0.142, "
    "78 % at 3.2. zipcache(), whose share is fixed: 0.149, 77 % at 3.4, so to let each layer decide is a little better. "
    "kivi(bits=2, residual=32): 0.083, 80 % at 3.4: its key scales serve 32 tokens, not the whole prompt. Dropping, on "
    "two pieces of the bundled book, as long: mass 0.975 keeps 73 % of the tokens, by layer 33 to 93 %: 0.010, 94 %; as many on average in "
    "snapkv 0.019, h2o 0.004, prefixkv 0.019. mass=0.9 keeps 51 %: 0.021, 95 %; snapkv 0.033, h2o 0.057, prefixkv 0.078. mass=0.8 keeps "
    "36 %: 0.069, 83 %; 0.062, 0.075, 0.119. Prefill of 8,192 tokens 1.2x the full cache: one row in ten probes. Text only; there is no bundled model that sees images.",
    bytes="dropping: share kept * T * ((D_k + D_v) * itemsize + 4) per KV head, the share by layer and text. Else as zipcache: per token and KV head D*bits/8 for keys and again for values at the bits of its class, 4 / KV heads for the "
    "value scale, 4 for the place in the text; 4*D per KV head and class for key scales, for each 32 tokens while decoding",
)


@recipe(CARD)
def zipvl(
    mass: float = 0.975,
    bits: int | None = 4,
    low_bits: int | None = 2,
    gap: int = 100,
    recent: float = 0.05,
    random: float = 0.05,
    window: int = 32,
) -> Recipe:
    """Stores as many tokens in more bits as a layer's attention asks for.

    Args:
        mass: share of all attention that the strongest tokens must hold; their count is that of the important ones.
        bits: bits per number of important tokens, 1, 2, 3, 4 or 8; None: they stay exact.
        low_bits: bits per number of the others; None: they are dropped. Both None is the second version of the paper.
        gap: while decoding, tokens are exact until so many have come.
        recent: share of a prompt's rows that probe, the last ones.
        random: share of the rows before them that probe too, drawn at random.
        window: newest tokens of a prompt that are important in any case.
    """
    if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 < mass <= 1:
        raise RecipeError(f"mass={mass!r} must be a share of all attention, above 0.0 and up to 1.0.")
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 64:
        raise RecipeError(f"gap={gap!r} must be a number of tokens, at least 64.")
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise RecipeError(f"window={window!r} must be a number of tokens, 0 or more.")
    prompt, late = Probes(recent, random), Probes(recent, random, queries=1)
    to, unit = ("high", None if low_bits is None else "low"), 1 if bits is None else 32
    policy = {
        "prompt": Policy(Nothing(), ByMass(mass, prompt, to, unit, window), prompt),
        "decode": Policy(Nothing(), ByMass(mass, late, to, unit, window if low_bits is None else 0), late, every=gap),
    }

    def kind(bits: int | None) -> Kind:
        if bits is None:
            return Kind()
        key: Codec = Short(RunMinMax(bits, 32), MinMax(bits, 32, "tokens"), gap)
        return Kind(key, ChannelScale(TokenMinMax(bits)))

    worse = {} if low_bits is None else {"low": kind(low_bits)}
    return Recipe("zipvl", policy, {"main": Kind(), "high": kind(bits), **worse})

"""GEAR: a few bits, what they lose as a product of thin matrices, and the largest numbers as they are."""

from typing import Literal

from kvloom.core.card import Card
from kvloom.core.codec import Codec
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind, Tail
from kvloom.errors import RecipeError
from kvloom.segments.chunked import Chunked
from kvloom.segments.lowrank import LowRank
from kvloom.segments.minmax import MinMax
from kvloom.segments.outliers import ChannelOutliers, TokenOutliers

CARD = Card(
    name="gear",
    title="GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM",
    year=2024,
    arxiv="2403.05527",
    code="HaoKang-Timmy/GEAR",
    idea="Codes of few bits (KIVI's) keep most of it; their error is close to a matrix of low rank, which is stored beside "
    "them head by head; the few largest and smallest numbers of each vector stay exact.",
    claims="Near-lossless at 4 bits; up to 2.38x throughput and 2.29x less peak memory.",
    differs="The share of outliers is the same for keys and values (the simulating code counts keys by another length). Factors "
    "are 16-bit, outliers the model's own numbers. The KCVT backbone (one scale for a whole channel) is left out.",
    open="Places of outliers take 2 bytes. A chunk as long as the buffer has the rank of decoding, longer ones that of the "
    "prompt; further turns are chunks of their own. Half of the share, rounded, is taken at each end.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one"
    ", in fp32; KL to the full cache in nats per token and same top token: "
    "bits=2, group=32, residual=32: 0.062, 86 % at 4.9 bits per number (6 bytes per outlier: the model is fp32); without "
    "outliers 0.095, 87 % at 4.0; bits=4: 0.002, 97 % at 6.9. kivi(group=32, residual=32) beside it: 2 bits 0.116, 87 % at 3.3; "
    "3 bits 0.019, 94 % at 4.3; 4 bits 0.003, 97 % at 5.3. So here rank and outliers mend what 2 bits lose, but one more bit "
    "mends it better: with heads of 64 channels factors of rank 4 cost as much as a bit.",
    bytes="per token and KV head, keys and values alike: D*bits/8 + 4*D/group + 2*rank + outliers*D*(itemsize + 2), and "
    "2*rank*D per chunk",
    points=("bits=2", "bits=4"),
)


@recipe(CARD)
def gear(
    bits: int = 2,
    group: int = 64,
    residual: int = 64,
    outliers: float = 0.02,
    rank: int = 4,
    late_rank: int = 2,
    loops: int = 3,
    spread: Literal["layer", "head"] = "layer",
) -> Recipe:
    """Quantizes the prompt as one chunk and later tokens in chunks of the buffer's length.

    Args:
        bits: bits per number of the codes, 1, 2, 3, 4 or 8.
        group: numbers that share one scale: tokens for keys, channels for values; must divide the head size.
        residual: length of the exact buffer, which is encoded when full; a multiple of `group`.
        outliers: share of the numbers that stay exact; 0.0 is GEAR-L.
        rank: rank of the prompt's error, per head; 0 stores none.
        late_rank: rank of the error of each chunk that was decoded.
        loops: rounds of the power iteration.
        spread: "layer": outliers of a value are sought among all heads together; "head": in each head, so that a placement
            may drop tokens head by head.
    """
    if not isinstance(residual, int) or residual < group or residual % group:
        raise RecipeError(f"residual={residual!r} must be a multiple of group={group}, for example {group}.")
    for name, given in (("rank", rank), ("late_rank", late_rank)):
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise RecipeError(f"{name}={given!r} must be a whole number, 0 or more.")
    if spread not in ("layer", "head"):
        raise RecipeError(f"spread={spread!r} must be 'layer' or 'head'.")

    def plane(code: Codec, keys: bool, rank: int, chunk: int | None) -> Codec:
        if outliers:
            code = ChannelOutliers(code, outliers, chunk) if keys else TokenOutliers(code, outliers, spread)
        return LowRank(code, rank, chunk, loops) if rank else code

    def both(code: Codec, keys: bool) -> Codec:
        if not rank and not late_rank and not (keys and outliers):
            return plane(code, keys, 0, None)
        return Chunked(plane(code, keys, rank, None), plane(code, keys, late_rank, residual), residual)

    key, value = both(MinMax(bits, group, "tokens"), True), both(MinMax(bits, group, "channels"), False)
    return Recipe("gear", kinds={"main": Kind(key, value, Tail(every=residual), Tail(every=residual))})

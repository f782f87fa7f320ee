"""xKV: one set of token vectors for the keys of several layers, one for their values; each layer keeps how to read them."""

from collections.abc import Sequence
from typing import Literal

from kvloom.core.card import Card
from kvloom.core.codec import Codec
from kvloom.core.recipe import Groups, Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind, Tail
from kvloom.core.site import Site
from kvloom.core.stack import neighbours
from kvloom.errors import RecipeError
from kvloom.segments.subspace import Subspace

CARD = Card(
    name="xkv",
    title="xKV: Cross-Layer SVD for KV-Cache Compression",
    year=2025,
    arxiv="2503.18893",
    code="abdelfattah-lab/xKV",
    idea="The strongest singular vectors of what neighbouring layers cache of a text agree, so a singular value decomposition of "
    "the layers side by side needs few of them: token vectors that all share, and a small matrix for each layer.",
    claims="Llama-3.1 and Qwen2.5 on RULER: up to 6.8x smaller than the best method across layers before it, at 2.7 % better "
    "accuracy; DeepSeek-Coder-V2, whose cache is latent: 3x without loss on coding.",
    differs="The factors are what is stored; the official code multiplies them and keeps full-size tensors. Ranks are shares of a "
    "group's channels, so that the paper's 512 and 768 of 4,096 hold for other shapes. Models with a latent cache are not served.",
    open="A prompt in chunks, or a later turn: what is exact is factored at the end of each forward of several tokens, as soon as "
    "that makes it smaller (short texts stay exact: the matrices cost as much as some thousand tokens). Decoded tokens "
    "stay exact until then, as in the official code. The last group may have fewer layers, and ranks in proportion.",
    measured="Bundled model (6 layers), three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one, in fp32; KL to "
    "the full cache in nats per token and same top token, at the paper's ranks: layers=4 0.139, 82 % at 6.4 of 32 bits per number; "
    "layers=6 0.010, 92 % at 7.5; each layer by itself 0.487, 72 % at 5.4, and with twice the ranks 0.034, 92 % at 13.0. At equal "
    "bytes (1,200 tokens of a bundled book): six layers 0.015 in 1.80 MiB, each by itself 0.019 in 1.95 MiB; the matrices weigh "
    "much in texts this short. Keys after RoPE need more rank: 0.548 in place of 0.139. kivi(bits=4, residual=32) loses 0.003 at 5.3 "
    "bits. Attention of a decoded token behind 16,384 tokens of a Llama with 2 KV heads of 64, in the compiled kernels on one core: "
    "full 7.5 ms for 4 layers, keys='post-rope' 13 to 15, the default 43 to 50, since each key is remade from its token vector, turned "
    "and forgotten; each head reads the shared token vectors anew, 320 numbers a token in place of 256. Slower than full, then.",
    bytes="per token and group of layers: (rank_k + rank_v) * itemsize; per sequence and group, (rank_k + rank_v) * layers * H * D "
    "* itemsize; decoded tokens exact",
)


@recipe(CARD)
def xkv(
    layers: int = 4,
    key_rank: int | float = 0.125,
    value_rank: int | float = 0.1875,
    keys: Literal["pre-rope", "post-rope"] = "pre-rope",
) -> Recipe:
    """Factors the keys and the values of neighbouring layers together, after the prompt.

    Args:
        layers: neighbouring layers that are factored together; 1: each layer by itself.
        key_rank: token vectors of the keys: how many numbers each has, or that as a share of the group's channels.
        value_rank: the same for the values.
        keys: "pre-rope": keys from before RoPE, of lower rank, which turn again when read; "post-rope": as they are cached, so
            that attention needs the factors alone.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise RecipeError(f"layers={layers!r} must be a number of layers, at least 1.")
    if keys not in ("pre-rope", "post-rope"):
        raise RecipeError(f"keys={keys!r} must be 'pre-rope' or 'post-rope'.")

    def grouping(sites: Sequence[Site]) -> Groups:
        return neighbours(sites, 0, layers, "xkv", least=1)

    key: Codec = Subspace(key_rank, layers, keys)
    tail = Tail(decode=False)
    return Recipe("xkv", kinds={"main": Kind(key, Subspace(value_rank, layers), tail, tail)}, grouping=grouping)

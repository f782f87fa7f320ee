"""ShadowKV's key store: the prompt's keys before RoPE as a product of two thin matrices, one of them shared by all heads."""

from kvloom.core.card import Card
from kvloom.core.codec import Exact
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind, Tail
from kvloom.errors import RecipeError
from kvloom.segments.project import Project

CARD = Card(
    name="shadowkv",
    title="ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference",
    year=2024,
    arxiv="2410.21465",
    code="bytedance/ShadowKV",
    idea="Before RoPE the keys of a prompt are of very low rank, all heads together: a singular value decomposition keeps "
    "a few coordinates of each token. Newest chunks and what is decoded stay exact.",
    claims="Up to 6x larger batches and 3x throughput on an A100 without loss on RULER, LongBench and needle tests (with "
    "values on the host and chunks picked by landmarks).",
    differs="The key store alone: values stay exact and on the device, and every key is read, made anew block by block and "
    "turned by RoPE, where the paper makes only those of picked chunks. No landmarks, no outlier chunks. The factors are kept "
    "as coordinates and orthonormal directions.",
    open="Every forward of several tokens has a decomposition of its own, over what has become old since the last, tokens decoded "
    "in between included; while decoding nothing is encoded. Keys that the factors would make larger stay exact.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one"
    ", in fp32; KL to the full cache in nats per token and same top token: "
    "rank=64 of 128: 0.004, 96 % at 24.8 of 32 bits per number (keys 17.7, values whole); rank=32: 0.021, 92 % at 20.6. "
    "think(ratio=0.5), also of keys alone, loses 0.011 at 24.2. Decoding makes every key anew: 2 * T * rank * H * D_k "
    "multiplications and additions for each token and layer, which bounds it.",
    bytes="per prompt token and layer rank * itemsize for keys of all heads and H * D_v * itemsize for values; rank * H * D_k * "
    "itemsize once per prompt forward and layer; the last local * chunk to (local + 1) * chunk - 1 tokens, and decoded ones, exact",
    points=("rank=160",),
)


@recipe(CARD)
def shadowkv(rank: int = 160, chunk: int = 8, local: int = 4) -> Recipe:
    """Stores the keys of each prompt in a few common directions.

    Args:
        rank: directions, of all KV heads of a layer together.
        chunk: tokens that are encoded together.
        local: newest chunks of the prompt whose keys stay exact.
    """
    for name, given, least in (("chunk", chunk, 1), ("local", local, 0)):
        if isinstance(given, bool) or not isinstance(given, int) or given < least:
            raise RecipeError(f"{name}={given!r} must be a whole number, at least {least}.")
    key = Project(Exact(), rank, None, own=True, tap="pre-rope")
    return Recipe("shadowkv", kinds={"main": Kind(key, key_tail=Tail(chunk, chunk * local, decode=False))})

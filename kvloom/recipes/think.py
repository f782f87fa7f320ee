"""ThinK: keys without the channels that the newest queries make least of."""

from kvloom.core.card import Card
from kvloom.core.codec import Exact
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind, Tail
from kvloom.errors import RecipeError
from kvloom.segments.prune import Prune

CARD = Card(
    name="think",
    title="ThinK: Thinner Key Cache by Query-Driven Pruning",
    year=2024,
    arxiv="2407.21018",
    code="SalesforceAIResearch/ThinK",
    idea="Few channels of a key carry most of its dot products. After the prompt each head drops those that the newest "
    "queries make least of; values, and the newest keys, stay whole.",
    claims="Over 20 % less memory than the eviction that it is added to, at equal or better accuracy, on LLaMA-3 and Mistral.",
    differs="GQA: one choice for each KV head, by the mean over its query heads (the official code repeats keys and chooses for "
    "each query head). Pruning of values, which the abstract mentions, is left out.",
    open="While decoding, a key gives up its channels, the same ones, when `recent` newer ones have come: so the authors' form "
    "with KIVI does; in their other form decoded keys stay whole. Prompts in chunks: the first chunk decides. Later turns change "
    "nothing. Composed with a placement, the choice looks at the keys that stay; 'think | kivi(bits=4)' stores the "
    "channels that stay in few bits.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one"
    ", in fp32; KL to the full cache in nats per token and same top token: "
    "ratio=0.2: 0.002, 99 % at 29.1 of 32 bits per number; 0.4: 0.006, 95 % at 25.9; 0.5: 0.011, 92 % at 24.2. Channels are a "
    "dear way to save: kivi(bits=4, residual=32) loses 0.003 at 5.3 bits, and 'think(ratio=0.4) | kivi(bits=4, residual=32)' "
    "0.011 at 4.6. Attention of one token over 16,384 (8 KV heads of 64, one core): 0.85 of the time of `full`.",
    bytes="per token and KV head (D_k - floor(ratio * D_k) + D_v) * itemsize, the newest `recent` whole; 2 * D_k per KV head",
)


@recipe(CARD)
def think(ratio: float = 0.4, recent: int = 32, window: int = 32) -> Recipe:
    """Prunes key channels after the prompt.

    Args:
        ratio: share of each head's key channels that are dropped, from 0.0 to below 1.0.
        recent: newest keys that keep all channels.
        window: newest queries of the prompt that decide which channels matter.
    """
    if isinstance(recent, bool) or not isinstance(recent, int) or recent < 0:
        raise RecipeError(f"recent={recent!r} must be a number of tokens, 0 or more.")
    return Recipe("think", kinds={"main": Kind(Prune(Exact(), ratio, window), key_tail=Tail(keep=recent))})

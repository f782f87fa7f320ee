"""GUI-KV: of screenshots, what stands out on the last one and what it does not repeat of those before."""

from kvloom.core.card import Card
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Tokens
from kvloom.policies.modality import Screens
from kvloom.policies.placements import Keep

CARD = Card(
    name="gui-kv",
    title="GUI-KV: Efficient GUI Agents via KV Cache with Spatio-Temporal Awareness",
    year=2025,
    arxiv="2510.00536",
    code="SalesforceAIResearch/GUI-KV",
    idea="An agent that reads screenshots looks at few of their tokens, in all layers alike. Rank by what the prompt's end attends to, "
    "with more for tokens of the current screenshot whose hidden states are long, and nothing for tokens of earlier ones that the "
    "current one's keys already span.",
    claims="With five screenshots, 38.9 % fewer operations while decoding and 4.1 points more accuracy per step than the full cache "
    "(AgentNetBench, UI-TARS-1.5-7B and OpenCUA-7B); close to full accuracy at modest budgets elsewhere.",
    differs="GQA: attention is averaged over the query heads of a KV head, whose slots are stored once; the official code ranks and "
    "stores for every query head. Images may end among the newest tokens; those of theirs count as text, which stays.",
    open="Hidden states are the input of the attention layer, normalized, as in the official code; the paper doesn't say. Which tokens "
    "are of images comes from `cache.tokens(...)`; without it, or without images, it is SnapKV with window=8, kernel=5 and averages. "
    "Decoded tokens stay. Prompts in chunks and later turns settle at their end: their own last tokens look; the newest image so far is the "
    "current one, and of it only tokens that came with this chunk or turn get more; what is held of earlier ones is compared "
    "with what is held of it. Where heads have no more than `rank` channels, they span all of each other's keys, and rounding chooses.",
    measured="Bundled model, which sees no images, so text told as such: a page of its book of 580 tokens shown three times as three "
    "images, one token in 20 wrong in the first two, text between, then the page goes on, 80 tokens one by one; mean of two. KL to the full "
    "cache in nats per token and same top token at 20 %: 0.051, 85 %; alpha=0: 0.093, 84 %; without images 0.109, 81 %; snapkv without "
    "interval 0.172, 77 %; at 5 % 0.299, 0.293, 0.314, 0.328. Both parts help where pages repeat. Where 1,920 tokens of the book are "
    "told as three images that repeat nothing, they harm a little: 0.222, alpha=0 0.175, without images 0.203, snapkv 0.220. "
    "Prefill of 8,192 tokens with three images 1.08x the full cache.",
    bytes="(budget + decoded) * ((D_k + D_v) * itemsize + 4) per KV head, and 8 queries per query head",
)


@recipe(CARD)
def gui_kv(
    budget: int | float | str = 0.2,
    alpha: float = 2.0,
    temperature: float = 3.5,
    window: int = 8,
    kernel: int = 5,
    rank: int = 32,
) -> Recipe:
    """Keeps what the prompt's end looks at, what stands out on the last image, and less of what it repeats.

    Args:
        budget: slots kept, the window included: tokens, a ratio of the prompt, or bytes ("64MiB").
        alpha: what all tokens of the last image get together for the norms of their hidden states; 0.0: nothing.
        temperature: the larger, the more evenly they share it.
        window: newest tokens whose attention scores the others; always kept, but for two slots of a smaller budget.
        kernel: neighbours that scores are averaged over; odd.
        rank: tokens of the last image whose keys span what it says of earlier ones.
    """
    for name, x, least in (("alpha", alpha, 0.0), ("temperature", temperature, 1e-6)):
        if isinstance(x, bool) or not isinstance(x, int | float) or not x >= least:
            raise RecipeError(f"{name}={x!r} must be a number, {least:g} or more.")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"rank={rank!r} must be a number of tokens, at least 1.")
    score = Screens(window, kernel, "avg", alpha=float(alpha), temperature=float(temperature), rank=rank)
    return Recipe("gui-kv", {"prompt": Policy(Tokens(budget, least=3), Keep(), score)})

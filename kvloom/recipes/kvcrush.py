"""KVCrush: part of the budget goes to slots that stand for those that another policy drops."""

from typing import Literal

from kvloom.core.card import Card
from kvloom.core.recipe import Recipe, Scorer
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError, unknown
from kvloom.policies.budgets import Tokens
from kvloom.policies.crush import ANCHORS, Anchor, Crushed
from kvloom.policies.phases import phases
from kvloom.policies.placements import Keep
from kvloom.policies.scorers import Accumulated, Window

CARD = Card(
    name="kvcrush",
    title="KVCrush: Key Value Cache Size-Reduction Using Similarity in Head-Behaviour",
    year=2025,
    arxiv="2503.00022",
    code="openvinotoolkit/openvino.genai",
    idea="Each token is described by bits: which heads would keep it. Next to what an eviction policy keeps, a few of the others "
    "stay, spread evenly over the Hamming distance of their bits to one anchor, which needs no clustering.",
    claims="4x smaller on LongBench with less than 1 % of accuracy lost, at less than 0.5 % of the latency.",
    differs="Bits follow the authors' company's code (the better half of the slots that may leave), by KV head; the paper's rule is not "
    "public. Slots are kept as they are, nothing is merged. SnapKV's or H2O's score is the base.",
    open="Of the budget a share of 0.25 represents (the paper's is not known). Candidates are tokens that every KV head holds and none "
    "keeps as important, so with few of them the base's next best fill up. While decoding: again after every `interval` tokens over "
    "budget. Prompts in chunks, later turns: each settles when it ends.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, kvcrush(budget=512): cache 7.1x smaller, 0 of 4 answers right, KL to the full cache 0.284 nats per token, same top token 62%; with share=0.0, which is SnapKV, 0.275 and 62%: with two KV heads there are four strings of bits, so representatives are nearly random.",
    bytes="budget * ((D_k + D_v) * itemsize + 4) per KV head, and window queries per query head; with base='h2o' 4 more per slot, and "
    "no queries",
)


@recipe(CARD)
def kvcrush(
    budget: int | float | str = 1024,
    base: Literal["snapkv", "h2o"] = "snapkv",
    share: float = 0.25,
    anchor: Anchor = "mean",
    block: int = 1,
    window: int = 32,
    kernel: int = 7,
    pool: Literal["max", "avg"] = "max",
    interval: int | None = 128,
) -> Recipe:
    """Keeps what a base policy keeps, and representatives of what it drops.

    Args:
        budget: slots kept, the window included: tokens, a ratio of the prompt, or bytes ("64MiB").
        base: "snapkv": important is what the window attends to; "h2o": what collected most attention.
        share: share of the budget for representatives; 0.0 is the base.
        anchor: bits that distances are taken to: "mean" (of all candidates), "alternating", "zeros", "ones" or "random".
        block: tokens that stay together as a representative.
        window: newest tokens, always kept; those of SnapKV score the others.
        kernel: neighbours that SnapKV's scores are pooled over; odd.
        pool: "max" or "avg".
        interval: while decoding, settle again when this many slots are over budget; None: never.
    """
    if base not in ("snapkv", "h2o"):
        raise RecipeError("base: " + unknown("value", str(base), ("snapkv", "h2o")))
    if anchor not in ANCHORS:
        raise RecipeError("anchor: " + unknown("value", str(anchor), ANCHORS))
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise RecipeError(f"share={share!r} must be a share of the budget, from 0.0 to below 1.0.")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise RecipeError(f"block={block!r} must be a number of tokens, at least 1.")
    snap = Window(window, kernel, pool)
    inner: Scorer = snap if base == "snapkv" else Accumulated()
    score = Crushed(inner, share, window, anchor, block)
    return Recipe("kvcrush", phases(Tokens(budget, least=window), Keep(newest=window), score, interval))

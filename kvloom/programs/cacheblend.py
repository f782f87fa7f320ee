"""CacheBlend: the rows whose values deviate most from what they should be are computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.card import Card
from kvloom.errors import RecipeError, unknown
from kvloom.programs.feeding import Step
from kvloom.programs.method import Method, Plan, Text, method

__all__ = ["cacheblend", "deviation"]

CARD = Card(
    name="cacheblend",
    title="CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion",
    year=2024,
    arxiv="2405.16444",
    code="YaoJiayi/CacheBlend, LMCache/LMCache",
    idea="Layers 0 and 1 are computed for all rows; the rows whose fresh values in layer 1 deviate most from the chunk's "
    "are computed in all later layers too, over the mixed cache.",
    claims="Time to first token 2.2 to 3.3 times shorter than a full prefill, throughput 2.8 to 5 times, at the same quality "
    "(Mistral-7B, Yi-34B, Llama-70B; four data sets).",
    differs="Every row sees the places up to its own; the released mask lets scattered rows see later keys. Fresh keys and "
    "values of the check layer are kept for all rows, as in the first code (LMCache keeps those of the chosen ones), since "
    "they are exact. Loading is not overlapped with computing.",
    open="The paper's schedule of gradual filtering gives no numbers: `ratio` takes one for each layer from `check` on.",
    measured="`kvloom bench rag`, random Llama of 12 layers, 10 passages of 512 tokens: first token 3.1x sooner than with prefix "
    "caching. Bundled model, facts cut in two by the passages' borders: KL to a full prefill 0.29 nats per token of the answer "
    "(naive 1.24), 7 of 10 answers right (naive 2, full prefill 10). Tables in docs/reuse.md.",
    bytes="a full cache; chunks in the store beside it",
)


@method(CARD)
def cacheblend(ratio: float | tuple[float, ...] = 0.15, check: int = 1, by: str = "value") -> Method:
    """Computes again the rows that deviate most.

    Args:
        ratio: share of the rows from chunks that goes on behind the check layer; several: behind it and each layer after it,
            chosen anew from those that are left.
        check: the layer in which deviations are measured; below it all rows are computed. 1 or more.
        by: "value", or "key" (after rotation), whose squared differences are summed over heads and channels.
    """
    ratios = tuple(ratio) if isinstance(ratio, tuple | list) else (ratio,)
    if not ratios or not all(isinstance(r, int | float) and 0 <= r <= 1 for r in ratios):
        raise RecipeError(f"ratio={ratio!r}: give a share from 0 to 1, or several of them.")
    if list(ratios) != sorted(ratios, reverse=True):
        raise RecipeError(f"ratio={ratio!r}: rows that were left out do not come back; give shares that fall.")
    if not isinstance(check, int) or check < 1:
        raise RecipeError(f"check={check!r}: layer 0 knows no context, so nothing deviates there; give 1 or more.")
    if by not in ("value", "key"):
        raise RecipeError("by: " + unknown("plane", by, ("value", "key")))

    def plan(text: Text) -> Plan:
        stale = text.stale
        count = int(stale.sum())

        def choose(step: Step) -> Tensor | None:
            at = step.layer - check
            if not 0 <= at < len(ratios):
                return None
            here = stale[step.index]
            here[-1] = False  # the last row's logits are wanted
            keep = min(round(ratios[at] * count), int(here.sum()))
            return most(deviation(step, by), here, keep)

        return Plan(text.fed(~text.exact), choose if count else None)

    return Method("", plan)


def deviation(step: Step, by: str = "value") -> Tensor:
    """[m] fp32 on the host: the squared difference of fresh and stored rows, summed over heads and channels."""
    new, old = (step.new.k, step.old.k) if by == "key" else (step.new.v, step.old.v)
    return (new.float() - old.float()).square().sum((0, 2)).cpu()


def most(score: Tensor, among: Tensor, keep: int) -> Tensor:
    """A mask [m] of the rows that go on: all that are not `among`, and of those the `keep` with the largest score."""
    best = score.masked_fill(~among, -torch.inf).topk(keep).indices
    return (~among).index_fill(0, best, True)

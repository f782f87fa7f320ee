"""When a policy settles: after a prompt at once, while decoding after every so many tokens."""

from __future__ import annotations

from kvloom.core.recipe import Allotment, Budget, Merger, Placement, Policy, Scorer
from kvloom.errors import RecipeError

__all__ = ["phases"]


def phases(
    budget: Budget,
    place: Placement,
    score: Scorer | None,
    interval: int | None,
    allot: Allotment | None = None,
    merge: Merger | None = None,
) -> dict[str, Policy]:
    """The same policy for prompts and, unless `interval` is None, while decoding whenever that many slots are over budget.

    Raises RecipeError for an interval that is no number of tokens.
    """
    if interval is not None and (not isinstance(interval, int) or interval < 1):
        raise RecipeError(f"interval={interval!r} must be a number of tokens, at least 1, or None.")
    policy = {"prompt": Policy(budget, place, score, allot=allot, merge=merge)}
    if interval is not None:
        policy["decode"] = Policy(budget, place, score, every=interval, allot=allot, merge=merge)
    return policy

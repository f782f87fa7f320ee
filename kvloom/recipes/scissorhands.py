"""Scissorhands: what recent tokens hardly look at leaves, half of the cache at a time."""

from math import ceil

from kvloom.core.card import Card
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Burst
from kvloom.policies.histories import Unimportant
from kvloom.policies.placements import Keep

CARD = Card(
    name="scissorhands",
    title="Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time",
    year=2023,
    arxiv="2305.17118",
    code="lzcemma/Scissorhands",
    idea="A token that mattered lately will matter again. When the cache is full, the tokens that most of the last rows gave "
    "less than their average weight leave, many at once.",
    claims="Up to 5x smaller without loss or finetuning, up to 20x together with 4 bits.",
    differs="The paper's form with a fixed budget, reconstructed: the authors' code is a simulation that masks tokens by a "
    "quantile and frees nothing. Rows count from the last compression on, so a window longer than the burst that leaves sees fewer. "
    "Layers get equal budgets: by how much later layers should get more is not given.",
    open="GQA: a row is the average over the query heads of a KV head. A slot is judged by rows that came after it only; of equals "
    "the older leaves. Prompts, later turns and prefill chunks: the same rule at the end of each, with its last rows as the window.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, scissorhands(budget=512): cache 15.0x smaller after the prompt, "
    "0 of 4 answers right, KL to the full cache 0.412 nats per token, same top token 70%; with drop=0.05 7.9x, 0 of 4, 0.374, 69%. "
    "h2o(budget=512) beside it: 7.5x, 0 of 4, 0.313, 66%. Prefill of 8,192 tokens 1.02x to 1.12x the full cache, on a busy machine; the score of 400 rows is 0.08x of it.",
    bytes="at most budget * ((D_k + D_v) * itemsize + 8) per KV head: 4 for the place in the text, 4 for the count",
)


@recipe(CARD)
def scissorhands(budget: int | float | str = 1024, window: int = 400, recent: int = 10, drop: float = 0.5) -> Recipe:
    """Keeps what recent rows look at, dropping a share of the budget whenever it is full.

    Args:
        budget: slots held at most: tokens, a ratio of the prompt, or bytes ("64MiB").
        window: newest rows whose attention counts.
        recent: newest tokens that are never dropped.
        drop: share of the budget that leaves at once.
    """
    for name, value in (("window", window), ("recent", recent)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"{name}={value!r} must be a number of tokens, at least 1.")
    if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop < 1:
        raise RecipeError(f"drop={drop!r} must be a share of the budget, from 0.0 to below 1.0.")
    size = Burst(budget, least=ceil((recent + 1) / (1 - drop)), drop=drop)
    policy = Policy(size, Keep(newest=recent), Unimportant(window))
    return Recipe("scissorhands", {"prompt": policy, "decode": policy})

"""Keyformer: key tokens by attention with noise, which is less sure of itself than softmax over what is left."""

from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Tokens
from kvloom.policies.histories import Noisy
from kvloom.policies.phases import phases
from kvloom.policies.placements import Keep

CARD = Card(
    name="keyformer",
    title="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
    year=2024,
    arxiv="2403.09054",
    code="d-matrix-ai/keyformer-llm",
    idea="Dropping tokens distorts the softmax over the others. So tokens are ranked by a softmax of their logits plus Gumbel "
    "noise, at a temperature that rises while decoding; it adds up over all rows. The best and the newest stay.",
    claims="2.1x less latency and 2.4x the throughput at equal accuracy on GPT-J, Cerebras-GPT and MPT.",
    differs="Tokens that leave the recent window compete with the others; in the authors' simulation for GPT-J they are lost for "
    "good, by one column in a mask. Noise of a prompt is read at random places of a million draws in place of one draw for "
    "each weight. Rows of a batch are scored apart.",
    open="GQA: summed over the query heads of a KV head. Scores and temperature go on over later turns and prefill chunks, and each "
    "settles at its end, at the ratio of the prompt so far. The score needs a second pass over the prompt's attention, like H2O's.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, keyformer(budget=512): cache 7.5x smaller, 0 of 4 answers "
    "right, KL to the full cache 0.346 nats per token, same top token 64%; h2o(budget=512) beside it 0.313 and 66%: noise does not help here. Prefill of 8,192 tokens 2.7x the full cache (h2o 1.4x): a second pass looks at every weight.",
    bytes="budget * ((D_k + D_v) * itemsize + 8) per KV head: 4 for the place in the text, 4 for the score",
)


@recipe(CARD)
def keyformer(
    budget: int | float | str = 0.6,
    window: float = 0.3,
    start: float = 1.0,
    end: float = 2.0,
    tokens: int = 100,
    noise: float = 1.0,
    seed: int = 0,
    interval: int = 1,
) -> Recipe:
    """Keeps key tokens and the newest ones, in the prompt and while decoding.

    Args:
        budget: slots kept: tokens, a ratio of the prompt, or bytes ("64MiB").
        window: share of the budget that the newest tokens take.
        start: temperature for the prompt.
        end: temperature after `tokens` decoded tokens.
        tokens: decoded tokens over which the temperature rises.
        noise: scale of the noise; 0.0 with both temperatures 1.0 is H2O.
        seed: of the noise.
        interval: while decoding, settle again when this many slots are over budget.
    """
    if isinstance(window, bool) or not isinstance(window, float) or not 0 <= window <= 1:
        raise RecipeError(f"window={window!r} must be a share of the budget, 0.0 to 1.0.")
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise RecipeError(f"{name}={value!r} must be a temperature above 0.")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise RecipeError(f"tokens={tokens!r} must be a number of tokens, at least 1.")
    if isinstance(noise, bool) or not isinstance(noise, int | float) or noise < 0:
        raise RecipeError(f"noise={noise!r} must be 0 or more.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**16:
        raise RecipeError(f"seed={seed!r} must be a whole number from 0 to 65535.")
    score = Noisy(start, end, tokens, noise, seed)
    return Recipe("keyformer", phases(Tokens(budget), Keep(newest=window), score, interval))

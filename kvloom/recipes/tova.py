"""TOVA: at every step the token that the newest one attends to least leaves, the same in all heads of a layer."""

from kvloom.core.card import Card
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep
from kvloom.policies.scorers import LastToken

CARD = Card(
    name="tova",
    title="Transformers are Multi-State RNNs",
    year=2024,
    arxiv="2401.06104",
    code="schwartz-lab-NLP/TOVA",
    idea="Seen as a recurrent network with many states, a transformer needs a rule for which state to give up: the one that "
    "the newest query attends to least, averaged over heads.",
    claims="Near the full cache with an eighth of it, better than window, sinks and H2O; up to 4.8x throughput.",
    differs="None known: the newest token may itself be dropped, as in the paper (kvpress always keeps it).",
    open="A prompt of several tokens is settled once, by its last token. Prompts in chunks: each settles when it ends.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, tova(budget=512): cache 7.5x smaller, 1 of 4 "
    "answers right, KL to the full cache 0.642 nats per token, same top token 56%. Prefill of 8,192 tokens 0.93x stock.",
    bytes="budget * ((D_k + D_v) * itemsize + 4) per KV head, and one query per query head",
)


@recipe(CARD)
def tova(budget: int | float | str = 1024) -> Recipe:
    """Keeps what the newest token attends to, in the prompt and at every decoded token.

    Args:
        budget: slots kept: tokens, a ratio of the prompt, or bytes ("64MiB").
    """
    policy = Policy(Tokens(budget), Keep(scope="layer"), LastToken())
    return Recipe("tova", {"prompt": policy, "decode": policy})

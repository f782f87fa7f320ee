"""Chelsea: neighbours with similar keys become one slot that counts as all of them."""

from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError
from kvloom.policies.absorbing import Clusters
from kvloom.policies.budgets import Tokens
from kvloom.policies.mergers import Blend
from kvloom.policies.phases import phases

CARD = Card(
    name="chelsea",
    title="Efficient Long-Context LLM Inference via KV Cache Clustering",
    year=2025,
    arxiv="2506.11418",
    code="",
    idea="Keys are alike along the text: in chunks, every second slot is matched with the most similar of the others, and the most "
    "similar pairs become their mean, which attention counts as that many tokens. No attention is looked at.",
    claims="Up to 80 % less memory at comparable quality, decoding up to 3.19x and whole answers up to 2.72x faster.",
    differs="A reconstruction: there is no official code.",
    open="Chosen here: similarity is the cosine of keys as cached, after RoPE; pairs are ranked over all chunks of a head; rounds "
    "repeat until the budget is met; `sinks` and `window` are left alone. Clusters are per KV head. While decoding, at later turns "
    "and behind chunks of a prompt the same rule runs over all that is held, whenever `interval` slots are over budget (prompts: at "
    "their end); means and counts go on by tokens.",
    measured="Bundled model, two pieces of 1,920 tokens of the bundled book and 80 more read one by one, budget=0.1: KL to the full "
    "cache 0.32 nats per token, same top token 72%; snapkv 0.33 and 78%, keydiff, which also looks at keys alone, 0.38 and 61%, h2o "
    "0.46. chunk=16: 0.38, chunk=256: 0.30. budget=0.5: 0.13; h2o 0.16."
    " Prefill of 8,000 tokens 0.9x that of the full cache.",
    bytes="budget * ((D_k + D_v) * itemsize + 8) per KV head: 4 for the place in the text, 4 for the log-weight",
)


@recipe(CARD)
def chelsea(
    budget: int | float | str = 0.25, chunk: int = 64, sinks: int = 4, window: int = 32, interval: int | None = 128
) -> Recipe:
    """Merges neighbours with similar keys.

    Args:
        budget: slots kept: tokens, a ratio of the prompt, or bytes ("64MiB").
        chunk: consecutive slots within which pairs are looked for; even.
        sinks: first tokens, never merged.
        window: newest tokens, not merged.
        interval: while decoding, merge again when this many slots are over budget; None: never.
    """
    for name, value, least in (("chunk", chunk, 2), ("sinks", sinks, 0), ("window", window, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RecipeError(f"{name}={value!r} must be a whole number, at least {least}.")
    if chunk % 2:
        raise RecipeError(f"chunk={chunk!r} must be even: one half of it is matched with the other.")
    place = Clusters(newest=window, sinks=sinks, chunk=chunk)
    size = Tokens(budget, least=sinks + window + 1)
    return Recipe("chelsea", phases(size, place, None, interval, merge=Blend("mean", count="logits")))

"""PrefixKV: every layer keeps the best tokens up to one common share of its attention, found by bisection."""

from kvloom.core.card import Card
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Tokens
from kvloom.policies.layers import FromPlace, FromPrompt, Looked, Prefixes
from kvloom.policies.placements import Keep

CARD = Card(
    name="prefixkv",
    title="PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
    year=2024,
    arxiv="2412.03409",
    code="THU-MIG/PrefixKV",
    idea="Sorted by the attention they receive, a layer's tokens have a shortest prefix that holds a given share of it. One share "
    "for all layers, searched so that together they meet the budget: layers of concentrated attention keep few tokens.",
    claims="The best trade of quality for efficiency among the methods compared, on LLaVA-1.5 7B and 13B (the abstract has no figures).",
    differs="The share is searched on the prompt at hand; the official code searches it on samples beforehand and stores, for a model "
    "and a ratio, what each layer gives up. `budget` is what stays (the paper's ratio is what goes). Kept tokens keep "
    "their true positions.",
    open="Prompts in chunks and later turns: each is searched anew at its end, by the attention of its own queries. While "
    "decoding a layer holds its share of the text so far: one slot leaves for each that is too many, always the one 25 slots "
    "before the end of what was kept of the prompt, whatever it is.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one, in fp32; KL to the full "
    "cache in nats per token and same top token, at 10 % of the slots: 0.911, 55 %; h2o(budget=0.1) beside it 0.787, 62 %, and cake 0.675. It does not "
    "win here: all heads of a layer keep the same tokens, while h2o and cake choose by head, and importance summed over all queries "
    "favours early tokens.",
    bytes="budget * ((D_k + D_v) * itemsize + 4) + 8 per KV head on average over the layers",
)


@recipe(CARD)
def prefixkv(budget: int | float | str = 0.5, start: int = 1, protect: int = 1, distance: int = 25) -> Recipe:
    """Keeps in every layer the tokens that hold one common share of its attention.

    Args:
        budget: slots kept on average over the layers: a ratio of the prompt, or tokens.
        start: first tokens that are always kept.
        protect: newest tokens that are always kept.
        distance: while decoding, the slot that leaves stands so many before the end of what was kept of the prompt.
    """
    if isinstance(budget, str):
        raise RecipeError(
            f"budget={budget!r}: prefixkv keeps a share of the text while it grows, so its bytes grow too. Give tokens or a ratio of "
            "the prompt."
        )
    for name, value, least in (("start", start, 0), ("protect", protect, 1), ("distance", distance, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RecipeError(f"{name}={value!r} must be a whole number, at least {least}.")
    place = Keep(newest=protect, sinks=start, scope="layer")
    size, spread = Tokens(budget, least=start + protect + 1, uneven=True), Prefixes(start + protect)
    prompt = Policy(size, place, Looked(), spread=spread)
    decode = Policy(FromPrompt("share"), place, FromPlace(distance))
    return Recipe("prefixkv", {"prompt": prompt, "decode": decode})

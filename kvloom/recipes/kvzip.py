"""KVzip: what the model needs to repeat its own text stays, whatever will be asked."""

from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.errors import RecipeError
from kvloom.policies.rehearsal import Rehearse, policy

CARD = Card(
    name="kvzip",
    title="KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
    year=2025,
    arxiv="2505.23416",
    code="snu-mllab/KVzip",
    idea="A cache from which the text itself can be told again serves any question. So the model reads its text a second time, behind "
    "itself, and a slot is worth the largest weight that it gets meanwhile; of all heads and layers together the worst leave.",
    claims="3 to 4 times smaller and attention about twice as fast while decoding, with next to no loss in answers, retrieval, reasoning and code, up "
    "to 170K tokens; better than query-aware methods when several questions come.",
    differs="Weights are those of the whole attention, which the second reading computes anyway; the authors normalise over a chunk, the first "
    "tokens and the repetition alone. The words that ask for the repetition are token ids in an option (`ask`), none by default: a "
    "cache has no tokenizer. The variant that scores heads once for all texts is not here.",
    open="The prompt is read twice, so prefill takes two to three times as long; on the same positions a model must have room for one chunk "
    "more. Prompts in chunks, later turns: at the end of each, what was not read again yet, decoded tokens too, is, and all compete. Nothing "
    "leaves while decoding. Rows of a batch must be equally long once something has to leave.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, kvzip(budget=512): cache 7.5x smaller, 4 of 4 answers right, two of them to "
    "questions that came after, KL to the full cache 0.081 nats per token, same top token 86%; snapkv(budget=512) beside it: 7.1x, 0 of 4, 0.275, 62%. KL does not "
    "fall evenly with the budget (0.269 at 0.3, 0.344 at 0.5), since no recent token is sure to stay: behind 1,200 tokens at budget=0.5 it is 0.479, with recent=32 "
    "0.166, with recent=128 0.035. Eight late questions behind 1,200 tokens at budget=0.5: 8 right; snapkv(budget=0.5): 2. Reading again made prefill "
    "of 3,899 tokens 3.6 times as long.",
    bytes="budget * ((D_k + D_v) * itemsize + 8) per KV head on average over heads and layers: 4 for the place in the text, 4 for the score; 8 "
    "per KV head; 4 per token that waits to be read again",
)


@recipe(CARD)
def kvzip(
    budget: int | float | str = 0.3,
    chunk: int = 2048,
    cue: int = 8,
    sinks: int = 4,
    recent: int = 0,
    ask: tuple[int, ...] | list[int] = (),
) -> Recipe:
    """Keeps what the model looks at when it repeats its text.

    Args:
        budget: slots kept on average over all heads and layers: tokens, a ratio of the prompt, or bytes ("64MiB").
        chunk: tokens that are repeated at a time.
        cue: tokens before a chunk that are given with it, but for the first.
        sinks: first tokens that all heads keep.
        recent: newest tokens that all heads keep; the paper protects none.
        ask: token ids that stand before each repetition, such as those of "Repeat the previous context exactly."
    """
    for name, value, least in (("chunk", chunk, 1), ("cue", cue, 0), ("sinks", sinks, 1), ("recent", recent, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RecipeError(f"{name}={value!r} must be a number of tokens, at least {least}.")
    if not isinstance(ask, tuple | list) or not all(
        isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in ask
    ):
        raise RecipeError(f"ask={ask!r} must be token ids, such as (35, 1062, 281).")
    return Recipe(
        "kvzip", {"probe": policy(budget, sinks, recent)}, again=Rehearse(chunk, cue, sinks, recent, tuple(ask))
    )

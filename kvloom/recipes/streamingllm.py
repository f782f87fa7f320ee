"""StreamingLLM: attention sinks and a rolling window, at positions inside the cache."""

from dataclasses import dataclass

from kvloom.core.card import Card
from kvloom.core.recipe import Policy, Recipe
from kvloom.core.registry import recipe
from kvloom.core.segment import Kind
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.errors import ModelError, RecipeError
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep

CARD = Card(
    name="streamingllm",
    title="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    arxiv="2309.17453",
    code="mit-han-lab/streaming-llm",
    idea="The first tokens soak up attention; keep them and a rolling window, and count positions by slot in the cache.",
    claims="Llama-2, MPT, Falcon and Pythia stay stable up to 4M tokens; up to 22.2x faster than a sliding window with "
    "recomputation. It does not extend the usable context.",
    differs="Keys stay rotated as they are: the query is turned back for the sinks by the number of dropped tokens, which "
    "gives every pair the distance that slot numbers give. Nothing is evicted ahead of a turn.",
    open="A prompt fed in one forward attends in full during that forward, as in the official code.",
    measured="`kvloom demo`, bundled model, 3,899 tokens, streamingllm(window=508): cache 7.6x smaller, 0 of 4 "
    "answers right, KL to the full cache 0.361 nats per token, same top token 73%. Prefill of 8,192 "
    "tokens 0.87x stock.",
    bytes="(sinks + window) * (D_k + D_v) * itemsize per KV head, and at most 4 per slot for its place in the text",
)


@dataclass(frozen=True)
class _Rest(Tokens):
    """The budget less what the sinks already hold."""

    def __call__(self, step: Step) -> int | None:
        total = super().__call__(step)
        return None if total is None else total - step.group.segments["sinks"].n


def _check(site: Site) -> None:
    if site.rope is not None and site.rope.varies:
        raise ModelError(
            f"streamingllm needs RoPE frequencies that do not change with the length of the text, but layer {site.layer} "
            f"has rope_type={site.rope.kind!r}. Use snapkv or h2o, which keep original positions."
        )


@recipe(CARD)
def streamingllm(sinks: int = 4, window: int = 512, budget: int | float | str | None = None) -> Recipe:
    """Keeps the first and the newest tokens.

    Args:
        sinks: first tokens of each sequence that are never dropped.
        window: newest tokens kept.
        budget: sinks and window together, instead of `window`: tokens, a ratio of the prompt, or bytes ("64MiB").
    """
    if not isinstance(sinks, int) or sinks < 0:
        raise RecipeError(f"sinks={sinks!r} must be a number of tokens, 0 or more.")
    if budget is None and (not isinstance(window, int) or window < 1):
        raise RecipeError(f"window={window!r} must be a number of tokens, at least 1.")

    def held(n: int) -> dict[str, int]:
        return {"main": max(0, n - sinks), "sinks": min(n, sinks)}

    size = _Rest(sinks + window if budget is None else budget, sinks + 1, held)
    policy = Policy(size, Keep(sinks=sinks, sinks_to="sinks", scope="layer"), sorts=max(1, sinks))
    kinds = {"main": Kind(), "sinks": Kind(turn=True)}
    return Recipe("streamingllm", {"prompt": policy, "decode": policy}, kinds, _check)

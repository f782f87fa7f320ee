"""CompressKV: a few heads of each layer, known to find what is asked for, choose for all; layers that suffer most keep more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core import profile as profiles
from kvloom.core.card import Card
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.view import text_config
from kvloom.errors import RecipeError
from kvloom.policies.budgets import Shares
from kvloom.policies.phases import phases
from kvloom.policies.placements import Keep
from kvloom.policies.scorers import Chosen
from kvloom.policies.semantic_heads import measure

CARD = Card(
    name="compresskv",
    title="CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation",
    year=2025,
    arxiv="2508.02401",
    code="TUDa-HWAI/CompressKV",
    idea="Most heads look at sinks and neighbours, and their votes drown those of the few that find things. So beforehand the heads "
    "are found that look at the whole of a needle while it is repeated; four of a layer choose for all its KV heads. Layers whose output a "
    "small cache distorts more get more slots.",
    claims="Better than those compared at various budgets on LongBench and needle in a haystack, for models with GQA.",
    differs="Needles are random tokens whose first eight come again, in lengths of 256 to 2,048, so that any text calibrates any model "
    "without questions; the authors ask in words. A layer's error is measured before its output projection, on that text, not on LongBench. "
    "While decoding the paper never evicts; here the same rule runs again after every `interval` tokens over budget; interval=None is the "
    "paper.",
    open="Prompts in chunks, later turns: each settles when it ends, with its own last tokens as the window.",
    measured="The document of `kvloom demo`, bundled model, 3,899 tokens, compresskv(budget=512): cache 7.4x smaller, 3 of 4 answers right, KL to the full cache 0.153 nats per token, same top token 75%; with heads=1 1 of 4, 0.298, 81%. snapkv(budget=512) beside it: 7.1x, 0 of 4, 0.275, 62%. The model has four query heads, so heads=4 is all of them: what wins is one choice for all KV heads and the layers' budgets. Of 8 late questions behind 1,200 tokens with half of the cache it answers 8, snapkv 2. Profile from the bundled book: a minute. Prefill of 8,192 tokens 1.09x the full cache.",
    bytes="budget * ((D_k + D_v) * itemsize + 4) per KV head on average over the layers, and window queries per query head",
)


@recipe(CARD)
def compresskv(
    budget: int | float | str = 1024,
    heads: int = 4,
    window: int = 8,
    kernel: int = 5,
    pool: Literal["max", "avg"] = "avg",
    base: int = 32,
    interval: int | None = 128,
    profile: str | None = None,
) -> Recipe:
    """Keeps what a few retrieval heads of each layer attend to, more in layers that need more.

    Args:
        budget: slots kept on average over the layers, the window included: tokens, a ratio of the prompt, or bytes ("64MiB").
        heads: query heads of each layer that choose.
        window: newest tokens whose attention scores the others; always kept.
        kernel: neighbours that scores are pooled over; odd.
        pool: "avg" or "max".
        base: slots that every layer is sure of.
        interval: while decoding, settle again when this many slots are over budget; None: never.
        profile: file made by `kvloom calibrate`; None: the model's own folder, or the user's cache.
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise RecipeError(f"heads={heads!r} must be a number of heads, at least 1.")
    if isinstance(base, bool) or not isinstance(base, int) or base < window:
        raise RecipeError(f"base={base!r} must be a number of tokens, at least the window of {window!r}.")

    def built(finders: tuple[tuple[int, ...], ...], weights: tuple[float, ...]) -> Recipe:
        size = Shares(budget, least=window, base=base, weights=weights)
        score = Chosen(window, kernel, pool, finders=finders)
        return Recipe("compresskv", phases(size, Keep(newest=window, scope="layer"), score, interval))

    def prepare(model: PreTrainedModel) -> Recipe:
        config = text_config(model)
        layers, count = config.num_hidden_layers, config.num_attention_heads
        found = profiles.find(profile, model, "compresskv", {"heads": (layers, count), "layers": (layers,)})
        best = found["heads"].topk(min(heads, count), -1).indices
        return built(tuple(map(tuple, best.tolist())), tuple(found["layers"].tolist()))

    def sketch(config: Any) -> Recipe:
        return built(((0,),) * config.num_hidden_layers, (1.0,) * config.num_hidden_layers)

    def calibrate(model: PreTrainedModel, ids: Tensor, path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
        found = measure(model, ids, tell)
        profiles.save(path, model, "compresskv", found, tokens=len(ids))
        return found

    return Recipe("compresskv", built((), ()).policy, prepare=prepare, sketch=sketch, calibrate=calibrate)

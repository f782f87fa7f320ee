"""A layer under a stricter recipe: what it holds is placed and encoded as that one says, and what was encoded stays as it is."""

from __future__ import annotations

import torch

from kvloom.core.attention import Logits
from kvloom.core.group import Group
from kvloom.core.layer import Layer, _Pending
from kvloom.core.recipe import Recipe
from kvloom.errors import RecipeError

__all__ = ["check", "harder"]


def check(loose: Recipe, strict: Recipe) -> None:
    """Raises RecipeError where one recipe can't go on with what the other holds."""
    why = ""
    policy = strict.policy.get("prompt")
    if loose.groups or strict.groups:
        why = "layers that settle together can't change their recipe"
    elif loose.hidden or strict.hidden:
        why = "what is made again from a layer's inputs can't change its recipe"
    elif any(name not in strict.kinds for name in loose.kinds):
        why = f"{loose.name} has classes of slots that {strict.name} does not know"
    elif any(
        not mine.exact and repr(mine) != repr(its)
        for name, kind in loose.kinds.items()
        for mine, its in ((kind.key, strict.kinds[name].key), (kind.value, strict.kinds[name].value))
    ):
        why = f"what {loose.name} has encoded would be encoded twice"
    elif strict.window > loose.window:
        why = f"{strict.name} looks at the newest {strict.window} queries, and {loose.name} keeps {loose.window}"
    elif policy is not None and policy.score is not None and policy.score.queries < 0:
        why = f"{strict.name} looks at the queries of a whole prompt, which are gone"
    if why:
        raise RecipeError(
            f"a cache of {loose.name} can't be squeezed into {strict.name}: {why}. Use the same recipe with a smaller budget, a codec "
            "after an exact recipe, or one that looks at no queries, such as streamingllm or keydiff."
        )


@torch.no_grad()
def harder(layer: Layer, recipe: Recipe, logits: Logits) -> Layer:
    """The layer's slots under a recipe that `check` lets pass, settled by its policy for prompts. The old layer is used up.

    `logits`: how the model attends in this layer.
    """
    layer.resolve()
    site = layer.site
    twin = Layer(site, recipe)
    for name in ("length", "prompt", "dropped_at", "recent", "unread", "read", "tokens"):
        setattr(twin, name, getattr(layer, name))
    if len(twin.groups) == 1 and twin.groups[0].heads is None:
        twin.groups = [_taken(group, layer, recipe) for group in layer.groups]
    else:
        raise RecipeError(f"{recipe.name} stores heads unlike one another, which a cache that exists can't take up.")
    parts = site.kv_heads, site.group, 0, site.key_dim
    first = next(segment for group in twin.groups for segment in group)
    q = first._store.new_empty(parts, dtype=site.dtype)
    twin._settle(_Pending(q, q[..., 0].float(), layer.length, "prompt", logits, None, 0))
    return twin


def _taken(group: Group, layer: Layer, recipe: Recipe) -> Group:
    heads = None if group.heads is None else tuple(group.heads.tolist())
    found = Group({name: kind.at(layer.site, heads) for name, kind in recipe.kinds.items()}, group.heads)
    found.state = dict(group.state)
    for name, held in group.segments.items():
        segment = found.segments[name]
        if not held.n:
            continue
        held._catch_up()
        segment.n, segment.start, segment.cols = held.n, held.start, held.cols
        for mine, its in ((held.key, segment.key), (held.value, segment.value)):
            its.runs = mine.runs
            if not mine.codec.exact:  # the same codec, by the same numbers
                its.codec, its.const, its.fitted, its.tap = mine.codec, mine.const, mine.fitted, mine.tap
    return found

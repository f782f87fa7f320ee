"""MatryoshkaKV: each head's keys and values in trained directions, of which any first few serve; as many as each head needs."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.core import profile as profiles
from kvloom.core.card import Card
from kvloom.core.codec import Codec, Const, Exact, Plane
from kvloom.core.recipe import Recipe
from kvloom.core.registry import recipe
from kvloom.core.sample import managed, rows
from kvloom.core.segment import Kind
from kvloom.errors import RecipeError
from kvloom.policies.subspaces import LEVELS, Bases, damages, orthonormal, principal, rates, train
from kvloom.segments.differing import Differing
from kvloom.segments.project import Project

CARD = Card(
    name="matryoshkakv",
    title="MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection",
    year=2024,
    arxiv="2410.14731",
    code="The-kamisato/MatryoshkaKV-cache",
    idea="A trained rotation of each head's keys and values puts what matters into the first coordinates, for every number of "
    "them at once; each layer, head and plane then stores as many as it needs.",
    claims="Over 90 % of the performance at 60 % average compression, up to 75 % in some cases, on LLaMA2-7B and Mistral-7B.",
    differs="GQA: one rotation for each KV head (the official code has one for each query head, after repeating). Ranks are "
    "eighths of a head, as in training; they are the best by a sum of damages measured one by one, found by dynamic "
    "programming, where the paper searches greedily. Queries meet the mean of the keys in every logit, since the newest token is "
    "exact. The calibration text is one and the same for the start, the training and the ranks.",
    open="A token sees itself exactly and is stored in coordinates on arrival, in prompts, later turns and while decoding alike. "
    "Heads of a layer with different ranks are groups apart. Bases are re-orthonormalized when they are read from 16 bits.",
    measured="Bundled model, three held-out Wikipedia texts of 1,536 tokens, then 48 tokens one by one"
    ", in fp32; KL to the full cache in nats per token and same top token: "
    "keep=0.75: 0.002, 95 % at 24 of 32 bits per number; 0.5: 0.021, 90 % at 16; 0.4: 0.036, 89 % at 12.7; 0.25: 0.120, 82 % at 8. "
    "The same rank everywhere: 0.093 at keep=0.5, and 0.137 with principal directions in place of trained ones; with searched ranks "
    "these lose 0.012 at 0.5 and 0.140 at 0.25, so training pays at low ranks, the search everywhere. The bundled profile was "
    "trained with teacher=1.0 on 44 stretches of 2,048 tokens of Wikipedia and novels. With the paper's loss, on 512 stretches of 512 "
    "tokens of one book, it was worse than no training (1.99 against 0.38 at keep=0.5 alike): it fits that text and its short places. "
    "Attention of one token over 16,384 (8 KV heads of 64, one core): 0.90 of the time of `full` at half the coordinates, 0.70 at a quarter.",
    points=("keep=0.4", "keep=0.5", "keep=0.25"),
    bytes="per token: (r_K + r_V) * itemsize summed over KV heads, keep * (D_k + D_v) * itemsize of each on average; once per "
    "model, (D_k * r_K + D_v * r_V + D_k + D_v) * 4 per KV head and layer",
)


@recipe(CARD)
def matryoshkakv(
    keep: float = 0.5, search: bool = True, steps: int = 128, teacher: float = 0.25, profile: str | None = None
) -> Recipe:
    """Stores every token in the first coordinates of its heads' trained bases.

    Args:
        keep: share of the coordinates that are stored, 0.125 to 1.0.
        search: each layer, head and plane has its own rank; False: all have the same.
        steps: texts to train on when a profile is made; 0: the principal directions as they are.
        teacher: share of the training's loss that is KL to the model; the rest is that of the next token.
        profile: file made by `kvloom calibrate`; None: the model's own folder, or the user's cache.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 1 / LEVELS <= keep <= 1:
        raise RecipeError(f"keep={keep!r} must be a share of the coordinates, {1 / LEVELS} to 1.0.")
    if not isinstance(search, bool):
        raise RecipeError(f"search={search!r} must be True or False.")
    if isinstance(teacher, bool) or not isinstance(teacher, int | float) or not 0 <= teacher <= 1:
        raise RecipeError(f"teacher={teacher!r} must be a share of the loss, 0.0 to 1.0.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise RecipeError(f"steps={steps!r} must be a number of texts, 0 or more.")

    def plain(dims: tuple[int, int]) -> Recipe:
        """The same rank everywhere."""
        key, value = (Project(Exact(), max(1, int(keep * dim + 1e-9))) for dim in dims)
        return Recipe("matryoshkakv", kinds={"main": Kind(key, value)})

    def sketch(config: Any) -> Recipe:
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return plain((dim, dim))

    def prepare(model: PreTrainedModel) -> Recipe:
        bases, damage = _read(model, profile)
        ranks = _ranks(bases, damage, keep, search)
        key, value = _planes(model, bases, ranks)
        return Recipe("matryoshkakv", kinds={"main": Kind(key, value)})

    def calibrate(model: PreTrainedModel, ids: Tensor, path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
        return learn(model, ids, path, tell, steps, teacher=teacher)

    outline = Kind(Project(Exact(), 1), Project(Exact(), 1))
    return Recipe("matryoshkakv", kinds={"main": outline}, prepare=prepare, sketch=sketch, calibrate=calibrate)


def _ranks(bases: Bases, damage: dict[Plane, Tensor], keep: float, search: bool) -> dict[Plane, Tensor]:
    """Ranks of keys and of values, [layers, H] each."""
    shape, dims = damage["key"].shape[:2], {plane: basis.shape[-1] for plane, (basis, _) in bases.items()}
    if not search:
        return {plane: torch.full(shape, max(1, int(keep * dim + 1e-9))) for plane, dim in dims.items()}
    found = rates(torch.cat([damage["key"].flatten(0, 1), damage["value"].flatten(0, 1)]), keep).chunk(2)
    planes: tuple[Plane, Plane] = ("key", "value")
    return {plane: x.view(shape) * dims[plane] // LEVELS for plane, x in zip(planes, found, strict=True)}


def _planes(model: PreTrainedModel, bases: Bases, ranks: dict[Plane, Tensor]) -> tuple[Codec, Codec]:
    """Codecs of keys and values: in each layer one for the heads that have the same two ranks."""
    tables: dict[Plane, dict[int, list[tuple[tuple[int, ...] | None, Codec]]]] = {"key": {}, "value": {}}
    for at, layer in enumerate(managed(model)):
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for head, pair in enumerate(zip(ranks["key"][at].tolist(), ranks["value"][at].tolist(), strict=True)):
            alike[pair].append(head)
        for plane, table in tables.items():
            basis, mean = bases[plane]
            table[layer] = []
            for pair, heads in alike.items():
                rank = pair[plane == "value"]
                const: Const = {
                    "basis": basis[at, heads, :, :rank][:, None].contiguous(),
                    "mean": mean[at, heads][:, None].contiguous(),
                }
                part = tuple(heads) if len(alike) > 1 else None
                table[layer].append((part, Project(Exact(), rank, profile={layer: const})))
    return Differing(tables["key"]), Differing(tables["value"])


def _read(model: PreTrainedModel, profile: str | None) -> tuple[Bases, dict[Plane, Tensor]]:
    sites = managed(model)
    site, count = next(iter(sites.values())), len(sites)
    shapes: dict[str, tuple[int, ...]] = {}
    planes: tuple[Plane, Plane] = ("key", "value")
    for plane, dim in zip(planes, (site.key_dim, site.value_dim), strict=True):
        shapes[f"{plane}.basis"] = (count, site.kv_heads, dim, dim)
        shapes[f"{plane}.mean"] = (count, site.kv_heads, dim)
        shapes[f"{plane}.damage"] = (count, site.kv_heads, LEVELS)
    found = profiles.find(profile, model, "matryoshkakv", shapes)
    bases: Bases = {p: (orthonormal(found[f"{p}.basis"]), found[f"{p}.mean"].float()) for p in planes}
    return bases, {plane: found[f"{plane}.damage"].float() for plane in planes}


@torch.no_grad()
def learn(
    model: PreTrainedModel,
    ids: Tensor,
    path: Path,
    tell: Callable[[str], None],
    steps: int = 128,
    length: int = 2048,
    teacher: float = 0.25,
) -> dict[str, Tensor]:
    """Makes the profile from a text ids [T]: principal directions, their training, and what cutting each head costs."""
    start = principal(model, rows(model, ids, 16, 1024), tell)
    bases, losses = (
        train(model, start, rows(model, ids, steps, length), tell, teacher=teacher) if steps else (start, [])
    )
    return write(model, path, bases, damages(model, bases, rows(model, ids, 1, length), tell), losses)


def write(
    model: PreTrainedModel, path: Path, bases: Bases, damage: dict[Plane, Tensor], losses: list[float]
) -> dict[str, Tensor]:
    """Saves what `learn` found."""
    found = {f"{plane}.basis": basis.half() for plane, (basis, _) in bases.items()}
    found |= {f"{plane}.mean": mean.half() for plane, (_, mean) in bases.items()}
    found |= {f"{plane}.damage": x for plane, x in damage.items()}
    profiles.save(path, model, "matryoshkakv", found, steps=len(losses), loss=losses[-20:])
    return found

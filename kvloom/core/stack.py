"""Layers of one sequence that settle together: their codecs encode them jointly, or they share one budget.

Each layer first settles alone, as far as it can; then its group, in the order of the layers. What a group's layers hold in
common are the same buffers in a run of each of them, so the ledger counts it once, and attention reads it in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvloom.core import settle as alone
from kvloom.core.attention import Logits
from kvloom.core.codec import Block
from kvloom.core.group import Table
from kvloom.core.layer import Layer
from kvloom.core.plane import Plane
from kvloom.core.recipe import Groups, Phase, Policy
from kvloom.core.run import Buffer, Run
from kvloom.core.segment import Segment
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.errors import RecipeError

__all__ = ["neighbours", "settle", "share"]


def neighbours(sites: Sequence[Site], first: int, size: int, name: str, least: int = 2) -> Groups:
    """The managed layers from the `first` of them on, `size` at a time; the last group may be smaller, but has `least`.

    Raises RecipeError if there are not enough layers for a group, if a layer that the recipe leaves alone lies inside a group, or if
    layers of a group differ in shape.
    """
    rest = [site for site in sites[first:]]
    groups = [rest[i : i + size] for i in range(0, len(rest), size)]
    groups = [group for group in groups if len(group) >= least]
    if not groups:
        raise RecipeError(
            f"{name} stores {size} layers together, but of this model's layers {len(rest)} can be: the others keep a cache of "
            "their own, or the recipe leaves them as they are. Use a recipe for single layers, such as kivi."
        )
    for group in groups:
        low, high = group[0].layer, group[-1].layer
        if high - low != len(group) - 1:
            raise RecipeError(
                f"{name} would store layers {low} and {high} together, but a layer between them keeps a cache of its own "
                "(sliding window, linear attention), so they are no neighbours. Use a recipe for single layers, such as kivi."
            )
        if len({(site.kv_heads, site.key_dim, site.value_dim, site.dtype) for site in group}) > 1:
            raise RecipeError(
                f"{name} would store layers {low} to {high} together, but their KV heads differ in shape."
            )
    return tuple(tuple(site.layer for site in group) for group in groups)


@torch.no_grad()
def settle(layers: Sequence[Layer], of: int) -> None:
    """Settles the first layers of a group of `of`, all of which have settled alone, as far as these can."""
    phase = layers[-1].due
    if phase is None or any(layer.due is None for layer in layers):
        return
    policy, whole = layers[-1].policy.get(phase), len(layers) == of
    joint = policy is not None and policy.joint
    if policy is not None and joint and (whole or (policy.spread is not None and policy.spread.early)):
        _place(layers, policy, phase, of)
    if whole:
        for layer in layers if joint else ():
            layer.freeze(phase)
        _freeze(layers, phase)
        for layer in layers:
            layer.due = None


def _steps(layer: Layer, phase: Phase) -> list[Step]:
    found = []
    for group in layer.groups:
        held = next(iter(group)).key.runs[0].fields.values()
        shape = (group.heads_of(layer.site), layer.site.group, 0, layer.site.key_dim)
        q = next(iter(held)).data.new_empty(shape, dtype=layer.site.dtype)
        n, classes = layer.length, layer.recipe.classes
        found.append(
            layer.step(layer.site, phase, group, classes, q, q[..., 0], n, n, layer.prompt, Logits(1.0))
        )  # fmt: skip
    return found


def _place(layers: Sequence[Layer], policy: Policy, phase: Phase, of: int) -> None:
    """All are scored before the first gives up a slot."""
    steps = [_steps(layer, phase) for layer in layers]
    if any(not each for each in steps):
        return
    tables = [[Table(step.group, policy.over, step.q.device) for step in each] for each in steps]
    if policy.spread is None:
        for each in steps:
            for step in each:
                step.mates = [other[0] for other in steps]
        sizes = [policy.budget(each[0]) for each in steps]
    else:
        budget = policy.budget(steps[0][0])
        fits = budget is None or layers[0].length <= budget
        sizes = [None] * len(steps) if fits else list(policy.spread(steps, budget or 0, of))
    every = policy.every - 1
    due = [
        [size is not None and table.n > size + every for table in each]
        for size, each in zip(sizes, tables, strict=True)
    ]
    scores = [
        [_scores(step, table, policy) if now else None for step, table, now in zip(*each, strict=True)]
        for each in zip(steps, tables, due, strict=True)
    ]
    for layer, size, *each in zip(layers, sizes, steps, tables, due, scores, strict=True):
        before = [group.n for group in layer.groups]
        after = [
            alone.apply(step, table, score, size or 0, policy) if now else [step.group]
            for step, table, now, score in zip(*each, strict=True)
        ]
        if len(layers) == of:
            for group in (group for found in after for group in found):
                for name in policy.over:
                    group.segments[name].cols.pop("score", None)
        layer.placed(each[0], before, after)


def _scores(step: Step, table: Table, policy: Policy) -> torch.Tensor | None:
    if policy.spread is not None:
        return table.column("score", step.heads)
    return None if policy.score is None else policy.score(step, table)


def _freeze(layers: Sequence[Layer], phase: Phase) -> None:
    """Encodes together what is due in the planes whose codecs say so."""
    for segments in zip(*(layer.groups[0].segments.values() for layer in layers), strict=True):
        if segments[0].n and (segments[0].kind.key.joint or segments[0].kind.value.joint):
            for which in ("key", "value"):
                _join(segments, [getattr(segment, which) for segment in segments], phase == "decode")


def _join(segments: Sequence[Segment], planes: Sequence[Plane], decoding: bool) -> None:
    lead = planes[0]
    codec, done = lead.codec, lead.frozen
    due = lead.rule.due(lead.n - done, decoding) if codec.joint else 0
    if not due:
        return
    rows, places = [], []
    for segment, plane in zip(segments, planes, strict=True):
        at = 0 if plane.tap is None else segment.places(done, done + due)
        where = at if isinstance(at, torch.Tensor) else torch.arange(at, at + due)[None]
        x = plane.oldest(due)
        rows.append(x if plane.tap is None else plane.tap.off(x, where.to(x.device)))
        places.append(at)
    if not codec.pays(rows):
        return
    blocks = codec.encode_together(rows, [plane.const for plane in planes])
    grown = [plane.growing(codec) for plane in planes]
    for i, (plane, block, at, run) in reversed(list(enumerate(zip(planes, blocks, places, grown, strict=True)))):
        if run is None:
            plane.insert(codec, block, at)
        else:  # the last layer first, so that a run counts its slots before what it shares has grown
            run.append(_own(block, run, grown[:i]), at)
        plane.freed(due)
    _alike(planes)


def _own(block: Block, run: Run, before: Sequence[Run | None]) -> Block:
    """A block without what goes to buffers that the run has in common with earlier layers."""
    theirs = {id(buffer) for other in before if other is not None for buffer in other.fields.values()}
    return {name: x for name, x in block.items() if id(run.fields[name]) not in theirs}


def share(layers: Sequence[Layer]) -> None:
    """Makes what a group's layers hold in common the same buffers again, after each of them has made copies."""
    for segments in zip(*(layer.groups[0].segments.values() for layer in layers), strict=True):
        _alike([segment.key for segment in segments])
        _alike([segment.value for segment in segments])


def _alike(planes: Sequence[Plane]) -> None:
    for runs in zip(*(plane.runs for plane in planes), strict=True):
        held: dict[str, Buffer] = {}
        for run in runs:
            for name in run.codec.shared & run.fields.keys():
                run.fields[name] = held.setdefault(name, run.fields[name])

"""A recipe: how slots are placed (policies) and how each class of slots is stored (kinds), and how two recipes compose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from kvloom.core.codec import SCOPES, Codec, Scope
from kvloom.core.kind import Kind, Tail
from kvloom.core.tap import inputs_of, tap_of
from kvloom.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvloom.core.cache import KVCache
    from kvloom.core.group import Table
    from kvloom.core.layer import Layer
    from kvloom.core.rows import Rows
    from kvloom.core.site import Site
    from kvloom.core.step import Step

__all__ = [
    "DROP",
    "Again",
    "Allotment",
    "Away",
    "Budget",
    "Merger",
    "Phase",
    "Placement",
    "Policy",
    "Recipe",
    "Scorer",
    "Spread",
]

Phase = Literal["prompt", "decode", "probe"]
Groups = tuple[tuple[int, ...], ...]
DROP = -1


class Scorer(Protocol):
    """Importance of every slot of a table: [h, n] fp32, larger is kept longer.

    `queries`: how many of the newest queries it looks at (0: none, -1: all of this forward). One that looks at all of this forward
    and at some of those before says how many with `recent`; one that reads `step.hidden`, the layer's inputs, has a true `hidden`.
    """

    @property
    def queries(self) -> int: ...

    def __call__(self, step: Step, table: Table) -> Tensor: ...


class Budget(Protocol):
    """How many slots each head of a layer may keep. It does not shrink from one decoded token to the next."""

    def __call__(self, step: Step) -> int | None: ...

    def bind(self, recipe: Recipe, sites: list[Site]) -> Budget:
        """The same budget in tokens, where it was given in bytes of a whole sequence."""


@dataclass(frozen=True)
class Away:
    """What leaves a table of one class with one run of keys and one of values: slots [h, r], ascending; `to`: as in routes.

    Every head gives up equally many, so nothing is counted on the device, and the host does not wait for it. `into` [h, r]:
    the slot of the table that absorbs each, one that stays; -1 where none does. The policy's merger does it.
    """

    slots: Tensor
    to: int
    into: Tensor | None = None


class Placement(Protocol):
    """Scores and budget -> the class of every slot: long [h, n], an index into `step.classes`, or DROP.

    Or just a number: so many slots of a table that has a `front` are dropped from there. Or, where it knows without
    looking, what is `Away`.

    `scope`: what must leave together ("head": each head drops its own slots; "layer": all heads drop the same).
    `moves`: classes that slots are moved to. `least`: slots that are always kept.
    """

    @property
    def scope(self) -> Scope: ...

    @property
    def moves(self) -> tuple[str, ...]: ...

    @property
    def least(self) -> int: ...

    def __call__(self, step: Step, table: Table, scores: Tensor | None, budget: int) -> Tensor | Away | int: ...


class Merger(Protocol):
    """Slots that absorb others, the others, and which of the first each goes into (long [h, r], -1: none) -> the first, changed.

    Columns too. Slots that absorb nothing must come back as they were: some are there to make heads even. `columns`: how many
    4-byte columns it adds to every slot of the class.
    """

    @property
    def columns(self) -> int: ...

    def __call__(self, kept: Rows, gone: Rows, into: Tensor) -> Rows: ...


class Allotment(Protocol):
    """How many slots each head may keep, where a layer's heads share one budget of `budget` slots each on average.

    Gets the step, table and scores [h, n] of every group of the layer; gives long [h] for every group.
    """

    def __call__(self, steps: list[Step], tables: list[Table], scores: list[Tensor], budget: int) -> list[Tensor]: ...


class Spread(Protocol):
    """How many slots each head of each layer may keep, where layers share one budget of `budget` slots on average.

    A layer's scores are taken when it has run, and stay with its slots until all layers are settled. With `early`, the layers
    that have run so far are asked, `steps` by layer and group of heads, after each of them: what earlier ones keep only
    shrinks. Else all of them, after the last. `layers`: how many there are in all.
    """

    @property
    def early(self) -> bool: ...

    def __call__(self, steps: list[list[Step]], budget: int, layers: int) -> list[int]: ...


@dataclass(frozen=True)
class Policy:
    """What happens to the slots of the classes `over` when a layer settles.

    `every`: wait until that many are over budget. `sorts`: also, whatever the budget, after a forward that
    begins at a place in the text before that many. `allot`: divides the layer's budget among its heads by their scores.
    `merge`: what becomes of slots that absorb others; its classes must be exact.
    `spread`: divides one budget among layers.
    """

    budget: Budget
    place: Placement
    score: Scorer | None = None
    over: tuple[str, ...] = ("main",)
    every: int = 1
    sorts: int = 0
    allot: Allotment | None = None
    merge: Merger | None = None
    spread: Spread | None = None

    @property
    def joint(self) -> bool:
        """Whether layers settle together."""
        return self.spread is not None or self.place.scope in ("group", "model")


class Again(Protocol):
    """Reads the text a second time: called after every forward that brings a prompt, or part of one.

    What was fed since it last cleared `Layer.unread` of a row's first layer is found there; `KVCache.probe` reads it again.
    `foretell`: what that leaves in the `carry` of a layer of a forecast, for its probe's policy; None: it would not be called for.
    """

    def __call__(self, model: PreTrainedModel, cache: KVCache) -> None: ...

    def foretell(self, layer: Layer) -> dict[str, Any] | None: ...


def _main() -> dict[str, Kind]:
    return {"main": Kind()}


@dataclass(frozen=True)
class Recipe:
    """A named composition. New tokens enter the class "main"; `policy` moves or drops slots, `kinds` says how each is stored.
    Policies are by phase: "prompt", "decode", and "probe" for what `KVCache.probe` asks.

    `check(site)` raises where a layer can't be served. `prepare(model)` gives the recipe what it needs of a model, such as a profile;
    `sketch(config)` guesses on the safe side where there is only a configuration, as in `kvloom plan`. `grouping(sites)` says which
    layers settle together, or raises; after `bind` they are the `groups`. Budgets that layers share put all of them into one.
    `calibrate(model, ids, path, tell)` makes a profile from a text ids [T] and writes it. `again` reads the text a second time.
    """

    name: str
    policy: Mapping[str, Policy] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=_main)
    check: Callable[[Site], None] | None = None
    prepare: Callable[[PreTrainedModel], Recipe] | None = None
    sketch: Callable[[Any], Recipe] | None = None
    calibrate: Callable[[PreTrainedModel, Tensor, Path, Callable[[str], None]], dict[str, Tensor]] | None = None
    grouping: Callable[[Sequence[Site]], Groups] | None = None
    groups: Groups = ()
    again: Again | None = None

    def __or__(self, other: Recipe) -> Recipe:
        return compose(self, other)

    def __str__(self) -> str:
        return self.name

    @property
    def hidden(self) -> bool:
        """Whether a class stores the layers' inputs, or a scorer reads them, so that they have to be listened to."""
        parts = (*self.kinds.values(), *(policy.score for policy in self.policy.values()))
        return any(getattr(part, "hidden", False) for part in parts)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    @property
    def drops(self) -> bool:
        """Whether some slots are given up."""
        return bool(self.policy)

    def ready(self, model: PreTrainedModel) -> Recipe:
        """The recipe with what it needs of a model; its name stays."""
        ready = self.prepare(model) if self.prepare else None
        return self if ready is None else replace(ready, name=self.name, prepare=None, calibrate=self.calibrate)

    def sketched(self, config: Any) -> Recipe:
        """`ready` for a model of which only the configuration is known. RecipeError where that can't be."""
        if self.prepare is None:
            return self
        if self.sketch is None:
            raise RecipeError(f"{self.name} measures a model's weights first, so a configuration alone is not enough.")
        return replace(self.sketch(config), name=self.name, prepare=None, sketch=None)

    def bind(self, sites: list[Site]) -> Recipe:
        """Checks every layer and turns budgets in bytes into tokens. Raises RecipeError or ModelError."""
        for site in sites:
            if self.check:
                self.check(site)
            for kind in self.kinds.values():
                held = replace(site, kv_heads=1, key_dim=site.hidden) if kind.hidden else site
                kind.key.check(held, "key")
                kind.value.check(held, "value")
                if kind.key.tap == "pre-rope":
                    tap_of(site, self.name)
                if kind.hidden:
                    inputs_of(site, self.name)
        self._check_selectors()
        policy = {phase: replace(p, budget=p.budget.bind(self, sites)) for phase, p in self.policy.items()}
        groups = self.groups
        if not groups and self.grouping is not None:
            groups = self.grouping(sites)
        elif not groups and any(p.spread for p in policy.values()):
            groups = (tuple(site.layer for site in sites),)
        return replace(self, policy=policy, groups=groups)

    def mates(self, layer: int) -> tuple[int, ...]:
        """The layers that settle together with a layer, itself among them; none if it settles alone."""
        return next((group for group in self.groups if layer in group), ())

    @property
    def early(self) -> bool:
        """Whether some layers settle before the last one of their group."""
        return any(policy.spread is not None and policy.spread.early for policy in self.policy.values())

    def policies(self, layer: int) -> Mapping[str, Policy]:
        """The policies of a layer: those for groups are none of one that settles alone."""
        return self.policy if self.mates(layer) else {phase: p for phase, p in self.policy.items() if not p.joint}

    def _check_selectors(self) -> None:
        """Raises RecipeError where reading a selection only would leave somebody without what he needs."""
        decode = self.policy.get("decode")
        if all(kind.select is None for kind in self.kinds.values()):
            return
        if decode is not None and decode.score is not None and decode.score.queries < 0:
            raise RecipeError(
                f"{self.name}: decoded tokens read only a selection of slots, but eviction while decoding counts the attention "
                "that all slots receive. Use a placement that looks at its newest queries, such as snapkv."
            )
        if any(kind.turn or kind.hidden for kind in self.kinds.values()):
            raise RecipeError(f"{self.name}: a selector can't read layer inputs, or slots with a turn. Use one alone.")

    def nbytes(self, site: Site, held: Mapping[str, int]) -> int:
        """Bytes of one sequence in one layer that holds `held[class]` slots of each head, without empty room.

        Columns: a place in the text (4 bytes) for each slot of a class that slots leave, and 4 bytes for each number
        that a scorer keeps.
        """
        total = 0
        for name, n in held.items():
            kind = self.kinds[name]
            for parts, tail, (all_heads, dim) in (
                (kind.key.at(site, "key"), kind.key_tail, kind.shape(site, "key")),
                (kind.value.at(site, "value"), kind.value_tail, kind.shape(site, "value")),
            ):
                for some, codec in parts:
                    heads = all_heads if some is None else len(some)
                    frozen = 0 if codec.exact else tail.due(n)
                    total += (
                        codec.nbytes(frozen, heads, dim, site.itemsize) + (n - frozen) * heads * dim * site.itemsize
                    )
            if kind.select is not None:
                units = max(0, n - 1) // kind.select.unit
                total += units * site.kv_heads * kind.select.width(site.key_dim) * site.itemsize
            total += 4 * n * self.columns(name) * site.kv_heads
        return total

    @property
    def window(self) -> int:
        """How many of the newest queries a scorer of any phase looks at."""
        scores = [p.score for p in self.policy.values() if p.score is not None]
        return max([0, *(max(score.queries, getattr(score, "recent", 0)) for score in scores)])

    def state(self, site: Site) -> int:
        """Bytes of the newest queries that scorers ask for, in one layer."""
        return self.window * site.q_heads * site.key_dim * site.itemsize

    def columns(self, name: str) -> int:
        """How many 4-byte columns each slot of the class carries once slots have left."""
        if not self.policy:
            return 0
        here = [p for p in self.policy.values() if name in p.over]
        kept = max((getattr(p.score, "columns", 0) for p in here), default=0)
        counts = max((p.merge.columns for p in here if p.merge is not None), default=0)
        return 1 + kept + counts + self.kinds[name].fold


def stacked(a: Kind, b: Kind) -> Kind | None:
    """One kind that stores as both do, where in each plane only one encodes, or one takes the other inside (left first)."""
    if a.hidden or b.hidden:
        return (b if a.exact else a) if a.exact or b.exact else None
    planes: list[tuple[Codec, Tail]] = []
    for (x, rule), (y, other) in (
        ((a.key, a.key_tail), (b.key, b.key_tail)),
        ((a.value, a.value_tail), (b.value, b.value_tail)),
    ):
        if x.exact or y.exact:
            planes.append((y, other) if x.exact else (x, rule))
            continue
        codec = x.around(y) or y.around(x)
        if codec is None:
            return None
        planes.append((codec, Tail(lcm(rule.every, other.every), max(rule.keep, other.keep))))
    (key, key_tail), (value, value_tail) = planes
    return replace(a, key=key, value=value, key_tail=key_tail, value_tail=value_tail)


def compose(a: Recipe, b: Recipe) -> Recipe:
    """`a | b`: what one leaves open, the other fills. Raises RecipeError where both claim the same thing."""
    name = f"{a.name} | {b.name}"
    if a.policy and b.policy:
        raise RecipeError(
            f"{name}: both {a.name} and {b.name} decide which tokens to keep. "
            "Compose one placement with one codec, for example 'snapkv(budget=1024) | kivi(bits=4)'."
        )
    placed, stored = (b, a) if b.policy or (not a.policy and len(b.kinds) > 1) else (a, b)
    mine, its = placed.kinds["main"], stored.kinds["main"]
    both = stacked(a.kinds["main"], b.kinds["main"])
    if both is None:
        raise RecipeError(f"{name}: both {a.name} and {b.name} decide how kept tokens are stored. Keep one of them.")
    main = mine if its.exact else replace(its if mine.exact else both, turn=mine.turn)
    main = replace(main, select=mine.select or its.select)
    kinds = {**stored.kinds, **placed.kinds, "main": main}
    for phase, policy in placed.policy.items():
        wide = main.scope
        if SCOPES.index(policy.place.scope) < SCOPES.index(wide):
            raise RecipeError(
                f"{name}: {placed.name} drops tokens per {policy.place.scope}, but {stored.name} encodes a whole "
                f"{wide} together. Use a codec that encodes per {policy.place.scope}, or a placement for whole {wide}s."
            )
        if policy.merge is not None and phase == "decode" and not main.exact:
            raise RecipeError(
                f"{name}: {placed.name} merges slots into others while decoding, but {stored.name} has encoded those by "
                f"then, and nothing is encoded twice. Let {placed.name} merge prompts only, if it can (interval=None), or use "
                "it alone."
            )
        coded = [to for to in policy.place.moves if not kinds[to].exact]
        if coded and not main.exact:
            raise RecipeError(
                f"{name}: in the {phase} phase {placed.name} would encode a second time what {stored.name} has "
                f"already encoded (class {coded[0]!r}). Use {placed.name} alone, or {stored.name} alone."
            )
    checks = [r.check for r in (a, b) if r.check]

    def check(site: Site) -> None:
        for each in checks:
            each(site)

    def prepare(model: PreTrainedModel) -> Recipe:
        return a.ready(model) | b.ready(model)

    def sketch(config: Any) -> Recipe:
        return a.sketched(config) | b.sketched(config)

    found = Recipe(name, placed.policy, kinds, check, grouping=a.grouping or b.grouping, again=placed.again)
    return replace(found, prepare=prepare, sketch=sketch) if a.prepare or b.prepare else found

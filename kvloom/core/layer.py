"""One layer of one sequence: groups of KV heads, what they hold, and one forward of new rows through them."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvloom.core import settle
from kvloom.core.attention import Logits, Visible, as_bias, attend, job, joined, many_rows
from kvloom.core.group import Group, groups_of
from kvloom.core.recipe import Phase, Recipe
from kvloom.core.rows import Rows
from kvloom.core.run import Buffer
from kvloom.core.select import narrowed
from kvloom.core.site import Site
from kvloom.core.step import Step
from kvloom.core.tap import Inputs
from kvloom.core.together import Steps
from kvloom.errors import CacheError
from kvloom.kernels import dispatch, reference

__all__ = ["Layer"]

DRAFT = 64  # newest tokens that may be taken back without losing older queries that a scorer looks at


def _folded(x: Tensor, like: Tensor) -> Tensor:
    """[Hq, ...] -> [H, g, ...] for as many KV heads as `like` has."""
    h = like.shape[0]
    return x.view(h, x.shape[0] // h, *x.shape[1:])


@dataclass
class _Pending:
    """The last m rows: stored but not yet settled. q [H, g, m, D], lse [H, g, m], hidden [m, hidden], or what of it is needed."""

    q: Tensor
    lse: Tensor
    first: int
    phase: Phase
    logits: Logits
    seen: list[dict[str, Tensor]] | None
    m: int
    hidden: Tensor | None = None

    def cut(self, rows: int) -> None:
        """Forgets the newest rows."""
        self.m = max(0, self.m - rows)
        self.q = self.q[:, :, : max(0, self.q.shape[2] - rows)]
        self.lse = self.lse[:, :, : max(0, self.lse.shape[2] - rows)]
        self.hidden = None if self.hidden is None else self.hidden[: self.m]


class Layer:
    """What one sequence holds in one layer.

    `length`: tokens seen; `prompt`: how many of them were prompt; `dropped_at`: the length when a slot was last given up;
    `defer`: drafts are pending, so nothing lossy happens before the next `truncate` or forward. `probing`: the next rows are
    questions only, see `probed`. `unread`, `read`: in a sequence's first layer, tokens [1, t] that a recipe which reads the text
    again has not read yet, and how many came before them.
    """

    step: ClassVar[type[Step]] = Step

    def __init__(self, site: Site, recipe: Recipe) -> None:
        self.site, self.recipe = site, recipe
        self.groups = groups_of(recipe.kinds, site)
        self.length = self.prompt = self.dropped_at = 0
        self.recent: Buffer | None = None  # the newest queries [Hq, w, D]
        self.tokens: dict[str, Tensor] | None = None  # what the user told of the text's tokens, [T] each
        self.defer = self.probing = False
        self.unread: Buffer | None = None
        self.read = 0
        self.carry: dict[str, Any] = {}  # one for all layers of a sequence
        own = (
            site.layer if recipe.groups else -1
        )  # else layers of one shape are alike, and a forecast tells one for all
        self.mates, self.policy = recipe.mates(own), recipe.policies(own)
        self.due: Phase | None = None  # what is left to settle together with other layers
        self._pending: _Pending | None = None
        self._calm: float = 0  # up to this length, a decoded token needs no placement
        kinds = recipe.kinds.values()
        self._window, self._lossy = recipe.window, not all(kind.exact and kind.select is None for kind in kinds)
        self._fitting = any(kind.key.fits or kind.value.fits for kind in kinds)
        self._selects = any(kind.select is not None for kind in kinds)
        planes = [plane for kind in kinds for plane in ((kind.key, kind.key_tail), (kind.value, kind.value_tail))]
        self._joint = bool(self.mates) and any(codec.joint and tail.decode for codec, tail in planes)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Logits,
        visible: Visible | None,
        sinks: Tensor | None,
        hidden: Tensor | None = None,
    ) -> Steps:
        """Attends new rows to themselves, exactly, and to all that is stored; stores them; settles unless deferred.

        q [Hq, m, D], k [H, m, D], v [H, m, Dv], post-RoPE. `visible`: the mask where it is more than causal, asked with
        the text index of slots. `sinks` [Hq]: logits that take part in the softmax without a value.
        `hidden` [1, m, hidden]: the layer's input, where it is stored or a scorer reads it. Returns [Hq, m, Dv].
        For `together`, which computes the jobs that it yields.
        """
        self.resolve()
        m, first = q.shape[1], self.length
        if hidden is not None and first == 0:
            self._prove(k, v, hidden)
        phase: Phase = "prompt" if first == 0 or (m > 1 and not self.defer) else "decode"
        phase = "probe" if self.probing else phase
        policy = self.policy.get(phase)
        queries = 0 if policy is None or policy.score is None else policy.score.queries
        emit = phase == "decode" and queries < 0 and m == 1 and first > 0 and visible is None and not self.defer
        out, lse, seen = yield from self._attend(q, Rows(k, v, first, hidden=hidden), logits, visible, emit)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.float()[:, None])
            out, lse = out.float() * (lse - total).exp_()[..., None], total
        self.length += m
        self.prompt += m if phase == "prompt" else 0
        if emit:
            for group, logs in zip(self.groups, seen, strict=True):
                for s in logs.values():
                    reference.exp_(s.sub_(group.pick(_folded(lse, k))))
        if m == 1 and self.length <= self._calm and not (self.defer or self.probing):
            with torch.no_grad():
                self._remember(q.detach())
                self.freeze("decode")
            self.due = "decode" if self._joint else None
        elif policy is not None or self.defer or self._lossy:
            newest = min(m, self._window + (DRAFT if self.defer else 0)) if self._window else 0
            rows, held = _folded(q.detach(), k), _folded(lse.detach(), k)  # what is kept holds no graph
            rows = rows if (queries < 0 and not emit) or self._fits or self.probing else rows[:, :, m - newest :]
            held = held if queries < 0 else held[:, :, :0]
            inputs = hidden[0] if hidden is not None and policy and getattr(policy.score, "hidden", False) else None
            self._pending = _Pending(rows, held, first, phase, logits, seen if emit else None, m, inputs)
            if not (self.defer or self.probing):
                self.resolve()
        return out.to(q.dtype)

    def _prove(self, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """That this layer's keys and values are indeed made of its input as its taps have it."""
        for kind in self.groups[0].kinds():
            for tap, x in ((kind.tap, k), (kind.value_tap, v)):
                if isinstance(tap, Inputs):
                    tap.check(x[:, :4], hidden[:, :4].detach(), self.site.layer)

    @property
    def _fits(self) -> bool:
        """Whether a codec still has to take its constants from the rows at hand."""
        return (
            self._fitting
            and self.length == self.prompt
            and any(
                plane.unfit
                for group in self.groups
                for segment in group.segments.values()
                for plane in (segment.key, segment.value)
            )
        )

    def _attend(
        self, q: Tensor, rows: Rows, logits: Logits, visible: Visible | None, emit: bool
    ) -> Generator[list[dispatch.Job], None, tuple[Tensor, Tensor, list[dict[str, Tensor]]]]:
        """out [Hq, m, Dv], lse [Hq, m] fp32, and with `emit` the logits of each group's classes, [h, g, n]."""
        m, past = q.shape[1], any(group.n for group in self.groups)
        alone = m == 1 and visible is None
        fresh = None
        if not alone or not past:
            fresh = self._itself(q, rows, logits, visible)
        if fresh is None or not past:
            self._append(rows)
            if fresh is not None:
                return (*fresh, [])
        length, value_dim, folded = self.length + alone, rows.v.shape[-1], _folded(q, rows.k)
        queries, groups = [group.pick(folded) for group in self.groups], self.groups
        if self._selects and alone and past:
            groups = [narrowed(group, x[:, :, 0], self.site) for group, x in zip(groups, queries, strict=True)]
        jobs = [
            [(merge, job(x, value_dim, group, logits, length, visible, emit, merge)) for merge in group.merges]
            for x, group in zip(queries, groups, strict=True)
        ]
        waiting = [each[0] for found in jobs for _, each in found if each is not None]
        if waiting:
            yield waiting
        done, seen = [], []
        for x, group, found in zip(queries, groups, jobs, strict=True):
            parts: list[tuple[Tensor, Tensor]] = []
            logs: dict[str, Tensor] = {}
            for merge, each in found:
                if each is None:
                    some, emitted = attend(x, group, logits, length, visible, emit, merge)
                else:
                    some, emitted = joined([(each[0].out, each[0].lse)], merge), each[1]
                parts += some
                logs |= emitted
            if fresh is not None:
                own, own_lse = (group.pick(_folded(each, rows.k)).flatten(1, 2) for each in fresh)
                parts.append((own, own_lse))
            done.append(reference.merge(parts))
            seen.append(logs)
        if fresh is not None:
            self._append(rows)
        out, lse = self._gather([x for x, _ in done]), self._gather([x for _, x in done])
        return out.reshape(*q.shape[:2], -1), lse.reshape(q.shape[:2]), seen

    def _itself(self, q: Tensor, rows: Rows, logits: Logits, visible: Visible | None) -> tuple[Tensor, Tensor]:
        """Attention of the new rows among themselves."""
        if visible is None:
            return many_rows(q, rows.k, rows.v, logits, causal=True)
        g, m = self.site.group, q.shape[1]
        bias = as_bias(visible(rows.where, Group({})), g)  # [h or 1, g * m, n]
        bias = bias.unflatten(1, (g, m)).expand(rows.k.shape[0], -1, -1, -1).flatten(0, 1)
        return reference.blocked(q, rows.k, rows.v, logits.scale, False, bias, logits.softcap)

    def _gather(self, parts: list[Tensor]) -> Tensor:
        """Results by group -> [H, ...] in the layer's order of heads."""
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([group.heads for group in self.groups if group.heads is not None])
        return torch.cat(parts)[order.argsort()]

    def _append(self, rows: Rows) -> None:
        rows = Rows(rows.k.detach(), rows.v.detach(), rows.index, hidden=rows.hidden)
        for group in self.groups:
            group.segments["main"].append(rows if group.heads is None else rows.heads(group.heads))

    @property
    def quiet(self) -> float:
        """How many single tokens can be added with nothing to do but attend and store them, as far as policies are concerned."""
        policy = self.policy.get("decode")
        if self.waits or self.defer or self.probing or self._selects or self.mates or self._window or not self.length:
            return 0
        if policy is None:
            return math.inf
        return 0 if policy.score is not None and policy.score.queries < 0 else self._calm - self.length

    @property
    def waits(self) -> bool:
        """Whether rows have still to settle."""
        return self._pending is not None

    def resolve(self) -> None:
        """Settles the rows of the last forward."""
        rows, self._pending = self._pending, None
        if rows is not None:
            self._settle(rows)

    def probed(self) -> None:
        """Forgets the rows of the last forward, which were a probe, and lets what they asked settle what is stored."""
        rows, self._pending, self.probing = self._pending, None, False
        if rows is not None:
            self.length = rows.first
            for group in self.groups:
                for segment in group:
                    segment.truncate(self.length)
            self._settle(rows)

    @torch.no_grad()
    def _settle(self, rows: _Pending) -> None:
        policy = self.policy.get(rows.phase)
        if rows.phase != "probe":
            self._remember(rows.q.flatten(0, 1))
        recent = None if self.recent is None else _folded(self.recent.view, rows.q)
        steps = [
            self.step(
                self.site, rows.phase, group, self.recipe.classes, group.pick(rows.q), group.pick(rows.lse), rows.first,
                self.length, self.prompt, rows.logits, None if recent is None else group.pick(recent),
                rows.seen[i] if rows.seen else None, carry=self.carry, tokens=self.tokens, hidden=rows.hidden,
            )
            for i, group in enumerate(self.groups)
        ]  # fmt: skip
        if self._fitting:
            for step in steps:
                settle.fit(step)
        held = [group.n for group in self.groups]
        if policy is None:
            after = [[group] for group in self.groups]
        elif policy.joint:
            after = settle.note(steps, policy)
        else:
            after = settle.place(steps, policy)
        self.placed(steps, held, after)
        self.due = rows.phase if self.mates else None
        if policy is None or not policy.joint:  # else slots may still leave, and what is encoded is not encoded twice
            self.freeze(rows.phase)

    def placed(self, steps: list[Step], before: list[int], after: list[list[Group]]) -> None:
        """Takes what each group of heads, which held so many slots, has become."""
        if any(each.n < n for n, found in zip(before, after, strict=True) for each in found):
            self.dropped_at = self.length
        self.groups = [each for found in after for each in found]
        later = [settle.of_group(step, each) for step, found in zip(steps, after, strict=True) for each in found]
        if self._fitting:
            for step in later:
                settle.fit(step, kept=True)
        self._calm = self.length + settle.slack(later, self.policy.get("decode"))

    def _remember(self, q: Tensor) -> None:
        """Keeps the newest queries [Hq, m, D] that scorers will look at."""
        if not self._window:
            return
        q = q if q.shape[1] <= self._window else q[:, -self._window :]
        if self.recent is None:
            self.recent = Buffer(q)
        else:
            self.recent.append(q)
            self.recent.drop_front(max(0, self.recent.n - self._window))

    def freeze(self, phase: Phase) -> None:
        """Encodes what is due."""
        if self._lossy:
            for group in self.groups:
                settle.freeze(group, phase == "decode")

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on, then settles what had been deferred.

        Raises CacheError if slots were given up since: what is left would not be what a shorter text leaves.
        """
        if length < self.length:
            if length < self.dropped_at:
                raise CacheError(
                    f"cannot crop to {length} tokens: {self.recipe.name} has dropped tokens at length {self.dropped_at}. "
                    "Keep a copy.deepcopy of the cache from before, or crop less."
                )
            late = 0 if self._pending is None else self._pending.m  # tokens that `recent` does not know yet
            gone = self.length - length
            self.groups = [each for group in self.groups for each in group.truncate(length)]
            if self.recent is not None:
                self.recent.cut(max(0, self.recent.n - max(0, gone - late)))
            self.length, self.prompt, self._calm = length, min(self.prompt, length), 0
            self.read = min(self.read, length)
            if self.unread is not None:
                self.unread.cut(length - self.read)
            if self._pending is not None:
                self._pending.cut(gone)
        self.resolve()

    def fed(self, ids: Tensor) -> None:
        """Told the tokens of a forward [m]; notes those that it does not know yet."""
        late = self.length - self.read - (0 if self.unread is None else self.unread.n)
        if late > 0:
            new = ids[None, len(ids) - late :].int()
            if self.unread is None:
                self.unread = Buffer(new)
            else:
                self.unread.append(new)

    def fork(self) -> Layer:
        """A layer that shares the stored slots until one of the two writes."""
        self.resolve()
        twin = Layer(self.site, self.recipe)
        twin.groups = [group.fork() for group in self.groups]
        twin.length, twin.prompt, twin.dropped_at = self.length, self.prompt, self.dropped_at
        twin.recent, twin.defer = self.recent and Buffer(self.recent.view), self.defer
        twin.unread, twin.read = self.unread and Buffer(self.unread.view), self.read
        twin.tokens = self.tokens
        return twin

    def tensors(self) -> Iterator[tuple[str, str, str, Tensor, int]]:
        """(class, plane, field, storage tensor, bytes in use) of everything held."""
        for group in self.groups:
            if group.heads is not None:
                yield "heads", "", "index", group.heads, group.heads.nbytes
            for name, x in group.state.items():
                yield "", "state", name, x, x.nbytes
            for name, segment in group.segments.items():
                for which, plane in (("key", segment.key), ("value", segment.value)):
                    for run in plane.runs:
                        for part, buffer in run.stored.items():
                            label = "exact" if run.codec.exact else part
                            yield name, which, label, buffer.data, buffer.used
                    for part, x in plane.const.items():
                        yield name, "constant", part, x, x.nbytes
                for column, buffer in segment.cols.items():
                    yield name, "column", column, buffer.data, buffer.used
                if segment.digest is not None and segment.digest.buffer is not None:
                    yield name, "digest", "units", segment.digest.buffer.data, segment.digest.buffer.used
        if self.recent is not None:
            yield "", "state", "queries", self.recent.data, self.recent.used
        if self.unread is not None:
            yield "", "state", "text", self.unread.data, self.unread.used
        if self._pending is not None:
            held = (self._pending.q, self._pending.lse, self._pending.hidden)
            yield from (("", "state", "pending", x, x.nbytes) for x in held if x is not None)

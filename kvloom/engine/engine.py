"""The engine: a loop that plans a step, runs it, and hands out what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from kvloom.core.harder import check
from kvloom.core.view import text_config
from kvloom.engine.adapters import Adapters
from kvloom.engine.live import Live
from kvloom.engine.memory import Memory
from kvloom.engine.packed import Packed, Part
from kvloom.engine.pool import Pool
from kvloom.engine.prefix import Prefix
from kvloom.engine.request import Finish, Output, Request
from kvloom.engine.sampling import choose
from kvloom.engine.scheduler import Plan, Sarathi, Scheduler
from kvloom.engine.sequence import Outline, Sequence
from kvloom.engine.swap import Swap
from kvloom.errors import Full, KvloomError, RequestError, StoreError

if TYPE_CHECKING:
    from kvloom.engine.shelf import Shelf
    from kvloom.store import Store

__all__ = ["Engine"]

log = logging.getLogger("kvloom.engine")


class Engine(Memory):
    """Answers many requests at once, each over its own cache under a recipe.

    Args:
        model: a decoder of transformers. It is set to kvloom's attention (undo with `kvloom.detach`).
        recipe: how caches are held, unless a request asks for another one.
        memory: bytes for all caches together, kept beginnings of prompts included.
        context: longest text, prompt and answer; None: what the model was made for.
        part: prompts are cut at multiples of so many tokens, and kept there.
        scheduler: who goes next; None: `Sarathi`.
        allowed: recipes that requests may ask for.
        keep: whether beginnings of prompts are kept for those that begin alike.
        queue: requests that may wait.
        adapters: folders of LoRA adapters by the names that requests ask for them by. Those in use are part of `memory`.
        store: where beginnings are looked for that are not in memory, and written when they are kept. It stays the caller's to close.
        deadline: seconds that a request waits for it.
        swap: where caches wait that a scheduler swaps out; None: they are given up and fed again.
        squeeze: a stricter recipe for those that a scheduler squeezes; "": none are.

    Not for several threads: one thread calls it. Raises ModelError and RecipeError for what packed steps can't serve, RequestError
    for a memory too small for one part of a prompt, StoreError for caches that can't be stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: str = "full",
        *,
        memory: int = 1 << 30,
        context: int | None = None,
        part: int = 256,
        scheduler: Scheduler | None = None,
        allowed: Collection[str] = (),
        keep: bool = True,
        queue: int = 4096,
        adapters: Mapping[str, str | Path] | None = None,
        store: Store | None = None,
        deadline: float = 2.0,
        swap: Swap | None = None,
        squeeze: str = "",
    ) -> None:
        config = text_config(model)
        self.model, self.recipe, self.part = model, recipe, part
        longest = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.context = longest if context is None else min(context, longest)
        self.vocabulary = int(config.vocab_size)
        self._outlines: dict[str, Outline] = {}
        for name in (recipe, *allowed):
            self._outlines[name] = Outline(model, name, self.context, part)
        self.pool = Pool(memory)
        self.adapters = Adapters(model, self.pool, adapters)
        self.packed = Packed(model)
        self.prefix = Prefix(part, self.pool) if keep else None
        self.shelf: Shelf | None = None
        if store is not None:
            from kvloom.engine.shelf import Shelf

            if not keep:
                raise StoreError("keep=False: a store holds the beginnings that are kept. Leave one of the two out.")
            self.shelf = Shelf(store, model, self._outlines, part, deadline, self.pool)
        self.scheduler = scheduler or Sarathi()
        self.scheduler.prefix = self.prefix
        self.queue, self.swap, self.usual = queue, swap, self._outlines[recipe]
        self.harder = Outline(model, squeeze, self.context, part) if squeeze else None
        if self.harder is not None:
            check(self.usual.recipe, self.harder.recipe)
        self.live: dict[str, Live] = {}
        self._ready: list[Output] = []
        self._seconds = 0.0  # that a row of the last step took
        self._counts = dict.fromkeys(
            (
                "preempted",
                "swapped",
                "squeezed",
                "prefix_queries",
                "prefix_hits",
                "prompt_tokens",
                "generated_tokens",
                "steps",
                "failed",
                "store_hits",
            ),
            0,
        )

    def outline(self, recipe: str) -> Outline:
        """How a recipe's sequences are stored. Raises RequestError for one that requests may not ask for."""
        found = self._outlines.get(recipe or self.recipe)
        if found is None:
            raise RequestError(
                f"cache={recipe!r} is not served here. Available: {', '.join(map(repr, self._outlines))}."
            )
        return found

    def check(self, request: Request) -> int:
        """Raises RequestError for what can't be served. Returns how many tokens the answer may have."""
        n, asked = len(request.tokens), request.sampling.max_tokens
        if not n:
            raise RequestError("the prompt is empty; give at least one token.")
        wrong = next((x for x in request.tokens if not 0 <= x < self.vocabulary), None)
        if wrong is not None:
            raise RequestError(f"token {wrong} is none of this model's: 0 to {self.vocabulary - 1}.")
        outline = self.outline(request.recipe)
        if request.id in self.live:
            raise RequestError(f"id={request.id!r} is that of a request that runs already. Give another one.")
        if n + (asked or 1) > self.context:
            wanted = f"{n} tokens of prompt" + (f" and {asked} of answer" if asked else "")
            raise RequestError(f"{wanted} are more than this model's context of {self.context}. Send less.")
        limit = self.context - n if asked is None else asked
        there = self.pool.limit
        if request.adapter:
            there -= self.adapters.find(request.adapter).nbytes
            if outline.recipe.hidden:
                raise RequestError(
                    f"adapter={request.adapter!r}: {outline.recipe.name} makes keys and values of layer inputs with the model's own "
                    "weights. Ask for a recipe that stores them, such as kivi."
                )
        spare = there - (0 if self.prefix is None else outline.copied(n))
        needs = outline.more(0, n + (asked or 1))
        if needs > spare:
            raise RequestError(
                f"{n} tokens of prompt need {needs:,} bytes of KV memory, more than all there is ({spare:,}). "
                "Send less, or serve with more memory or a recipe that keeps less."
            )
        while asked is None and limit > 1 and outline.more(0, n + limit) > spare:
            limit //= 2
        return limit

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError for what can't be served, Full if too many wait."""
        limit = self.check(request)
        if sum(r.waiting for r in self.live.values()) >= self.queue:
            raise Full(f"{self.queue} requests wait already. Try again later.")
        self.live[request.id] = Live(request, self.outline(request.recipe), limit, self.part)

    def abort(self, id: str) -> None:
        """Ends a request, if it runs still, and frees its memory."""
        r = self.live.get(id)
        if r is not None:
            self._ready.append(self._end(r, "abort"))

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self.live or self._ready)

    def step(self) -> list[Output]:
        """Plans and runs one step. A step that fails ends the requests in it, with the reason, and no others."""
        found, self._ready = self._ready, []
        plan = self.plan()
        if not plan.granted:
            if self.shelf is not None and self.shelf.jobs and not (found or self._ready):
                self.shelf.wait(0.05)
            return found
        self._counts["steps"] += 1
        begun = time.perf_counter()
        try:
            found += self._run(plan)
            self.scheduler.ran(plan, time.perf_counter() - begun)
            return found
        except Exception as error:  # whatever it is: the others go on
            log.exception("a step of %d requests failed", len(plan.granted))
            self._counts["failed"] += len(plan.granted)
            why = str(error) if isinstance(error, KvloomError) else f"{type(error).__name__}: {error}"
            return found + [self._end(r, "error", error=why) for r in plan.granted if r.request.id in self.live]

    def plan(self) -> Plan:
        """Who goes in the next step. Requests begin here, and give up their sequences for others."""
        if self.shelf is not None:
            for r, length, sequence in self.shelf.collect():
                self._came(r, length, sequence)
        plan = Plan(running=sum(not r.waiting for r in self.live.values()))
        full = False
        for r in sorted(self.live.values(), key=self.scheduler.key):
            if r.request.id not in self.live or r in plan.out or (r.waiting and full) or r.loading is not None:
                continue
            if r.waiting and self.shelf is not None and self.shelf.coming(r):
                continue
            rows = self.scheduler.want(r, plan)
            if rows > 0 and r.waiting and not self._begin(r, plan):
                full = r.request.id in self.live  # nobody who waits behind it may overtake it
            elif rows > 0 and r.loading is None and self._room(r, rows, plan):
                rows = min(rows, self.scheduler.want(r, plan))
                if rows:
                    plan.grant(r, rows)
        if (
            not (plan.granted or plan.running or self._ready or (self.shelf and self.shelf.jobs)) and self.live
        ):  # with all memory free, who is first does not fit
            r = min(self.live.values(), key=self.scheduler.key)
            self._ready.append(self._end(r, "error", f"out of KV memory: {r.needs:,} of {self.pool.limit:,} bytes."))
        return plan

    def _came(self, r: Live, length: int, sequence: Sequence) -> None:
        """A request goes on from what the store had of it."""
        assert self.prefix is not None
        if not r.preempted:
            self._counts["store_hits"] += length - (r.cached or 0)
            r.cached = length
        r.sequence = sequence
        self.prefix.keep(r.space, r.tokens[:length], sequence)
        r.shares = True
        self.pool.hold(r, sequence.storages(), r.growth(length, r.covered))

    def _run(self, plan: Plan) -> list[Output]:
        parts, ends = [], []
        for r, rows in plan.granted.items():
            assert r.sequence is not None
            n = r.length
            ends.append(n + rows == len(r.tokens))
            parts.append(Part(r.sequence, r.tokens[n : n + rows], ends[-1]))
        with self.adapters.applied((r.request.adapter, rows) for r, rows in plan.granted.items()):
            start = time.perf_counter()
            logits = self.packed.run(parts)
            self._seconds = (time.perf_counter() - start) / sum(plan.granted.values())
        for r in plan.granted:
            self._keep(r)
        last = [r for r, end in zip(plan.granted, ends, strict=True) if end]
        tokens, told = choose(logits, [r.sampler for r in last]) if last else ([], [])
        out = []
        for r, token, line in zip(last, tokens, told, strict=True):
            if not r.answered:
                self._counts["prompt_tokens"] += r.prompt
            self._counts["generated_tokens"] += 1
            r.tokens.append(token)
            logprob, top = line or (None, ())
            finish = self._finish(r, token)
            if finish is not None:
                self._end(r, finish)
            out.append(Output(r.request.id, token, logprob, top, finish, r.cached or 0, squeezed=r.squeezed))
        return out

    def _finish(self, r: Live, token: int) -> Finish | None:
        s = r.request.sampling
        if (token in s.stop and r.answered > s.min_tokens) or r.sampler.done:
            return "stop"
        return "length" if r.answered >= r.limit else None

    def _keep(self, r: Live) -> None:
        """Keeps what was fed, at borders, and reports what a prompt takes so far."""
        assert r.sequence is not None
        n = r.length
        r.shares = False
        if n % self.part and n != r.prompt:
            return
        answer = n > r.prompt and r.outline.free and not self.scheduler.offline
        if not r.squeezed and self.prefix is not None and n % self.part == 0 and (n in r.marks or answer):
            kept = self.prefix.keep(r.space, r.tokens[:n], r.sequence)
            r.shares = True
            if self.shelf is not None and kept is not None:
                self.shelf.save(r, kept, self._seconds)
        if n <= r.prompt or r.shares:
            self.pool.hold(r, r.sequence.storages(), r.growth(n, r.covered))

    def _end(self, r: Live, finish: Finish, error: str = "") -> Output:
        del self.live[r.request.id]
        if self.shelf is not None:
            self.shelf.leave(r)
        self.pool.drop(r)
        r.sequence = r.parked = None
        done = self.scheduler.ended(r)
        if done and self.prefix is not None:
            self.prefix.forget(r.space, r.tokens[:done])
        return Output(r.request.id, finish=finish, cached=r.cached or 0, error=error, squeezed=r.squeezed)

    def close(self) -> None:
        """Writes what is still to be written to the store."""
        if self.shelf is not None:
            self.shelf.close()

    def stats(self) -> dict[str, Any]:
        """Numbers of now, and totals since the start."""
        waiting = sum(r.waiting for r in self.live.values())
        return {
            "running": len(self.live) - waiting, "waiting": waiting, "kv_bytes": self.pool.used, "kv_limit": self.pool.limit,
            "kept": len(self.prefix) if self.prefix is not None else 0, "adapters": len(self.adapters.resident),
            "bytes_by_kind": self.pool.kinds(), "swap_bytes": self.swap.used if self.swap is not None else 0, **self._counts,
        }  # fmt: skip

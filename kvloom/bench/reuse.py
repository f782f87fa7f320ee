"""Text reused beyond the prefix: messages between agents (KVCOMM), edits of a file (PIE), parallel contexts (APE)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import kvloom.core
from kvloom.bench import models, show
from kvloom.bench.timing import Tell, silent
from kvloom.core.cache import KVCache
from kvloom.lab.measure import load_model
from kvloom.lab.tasks.base import SHIPPED
from kvloom.programs.ape import ParallelContexts
from kvloom.programs.chunk import Chunk, compute
from kvloom.programs.diff import Edit
from kvloom.programs.kvcomm import AgentTeam
from kvloom.programs.partial import feed
from kvloom.programs.pie import CodeSession
from kvloom.programs.place import place

__all__ = ["Found", "Row", "agents", "contexts", "edits", "run", "steps"]

AGENTS, AHEAD = 5, 16  # AHEAD: tokens read behind the prompt, over which predictions are compared
FULL = "full prefill"


@dataclass(frozen=True)
class Row:
    """Medians over the requests of one part ("agents", "edits", "contexts").

    `tokens` of the prompt; `reused`: share of them that was not computed; `seconds` to the logits behind it, `faster`: a full
    prefill's over them, of the same request; `kl`: nats per token of the full prefill's predictions, mean.
    """

    part: str
    case: str
    method: str
    requests: int
    tokens: int
    reused: float
    seconds: float
    faster: float
    kl: float


@dataclass(frozen=True)
class Found:
    """All rows."""

    model: str
    rows: list[Row]

    def table(self) -> Table:
        """One table of all parts."""
        columns = ("workload", "case", "method", "requests", "tokens", "reused", "ms", "faster", "KL, nats")
        cells = [
            (r.part, r.case, r.method, str(r.requests), f"{r.tokens:,}", f"{r.reused:.0%}",
             f"{1000 * r.seconds:.1f}", f"{r.faster:.1f}x", f"{r.kl:.4f}")
            for r in self.rows
        ]  # fmt: skip
        return show.table(f"Text reused beyond the prefix, {self.model}", columns, cells, text=3, group=2)

    def notes(self) -> list[str]:
        """What the columns mean."""
        return [
            "ms: to the logits of the first token; faster: a full prefill's time over the row's, for the same prompt.",
            f"reused: tokens that were not computed; KL: of predictions over {AHEAD} tokens of text behind the prompt.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


Ready = tuple[KVCache, Tensor, float, float]  # cache, logits [1, V], share reused, seconds


class _Rows:
    """Collects one part's requests: every way against a full prefill of the same prompt, in turns."""

    def __init__(self, model: PreTrainedModel, part: str, tell: Tell) -> None:
        self.model, self.part, self.tell = model, part, tell
        self.found: dict[tuple[str, str], list[tuple[int, float, float, float, float]]] = {}

    def add(self, case: str, tokens: Sequence[int], behind: Tensor, ways: Mapping[str, Callable[[], Ready]]) -> None:
        """`behind` [AHEAD]: the text that is read on."""
        self.tell(f"{self.part}: {case}")
        cache, start = KVCache(self.model), perf_counter()
        logits = feed(self.model, cache, tokens, range(len(tokens))).logits
        assert logits is not None
        base = perf_counter() - start
        want = self._ahead(cache, logits, behind)
        self._note(case, FULL, len(tokens), 0.0, base, 1.0, 0.0)
        for name, way in ways.items():
            cache, logits, reused, seconds = way()
            kl = float((want.exp() * (want - self._ahead(cache, logits, behind))).sum(-1).mean())
            self._note(case, name, len(tokens), reused, seconds, base / seconds, kl)

    def _note(self, case: str, name: str, *numbers: Any) -> None:
        self.found.setdefault((case, name), []).append(numbers)

    @torch.no_grad()
    def _ahead(self, cache: KVCache, logits: Tensor, behind: Tensor) -> Tensor:
        more = self.model(behind[None, :-1], past_key_values=copy.deepcopy(cache)).logits[0]
        return torch.cat([logits, more]).double().log_softmax(-1)

    def rows(self) -> list[Row]:
        out = []
        for (case, name), found in self.found.items():
            tokens, reused, seconds, faster, kl = zip(*found, strict=True)
            row = (len(found), int(median(tokens)), mean(reused), median(seconds), median(faster), mean(kl))
            out.append(Row(self.part, case, name, *row))
        return out


def steps(requests: int) -> int:
    """How often `run` tells of a step."""
    return (AGENTS + 4) * requests


def run(model: str, requests: int, tokens: int, tell: Tell = silent) -> Found:
    """All three: prompts of about `tokens` tokens."""
    network = models.load(model)
    _, tokenizer = load_model("nano")
    limit = network.config.get_text_config(decoder=True).vocab_size
    book = torch.tensor(tokenizer.encode(SHIPPED.read_text(encoding="utf-8")[: 40 * tokens]), dtype=torch.long) % limit
    code = torch.tensor(tokenizer.encode(_sources()), dtype=torch.long) % limit
    rows = agents(network, book, requests, tokens, tell)
    rows += edits(network, code, requests, tokens, tell)
    return Found(model, rows + contexts(network, book, requests, tokens, tell))


def _sources() -> str:
    return "\n".join(
        path.read_text(encoding="utf-8") for path in sorted(Path(kvloom.core.__file__).parent.glob("*.py"))
    )


def agents(model: PreTrainedModel, text: Tensor, requests: int, tokens: int, tell: Tell = silent) -> list[Row]:
    """Five agents, each with instructions of its own, read a question and what the others before them wrote.

    Instructions and messages are pieces of text. "prefilled": there were too few anchors, as for the first two questions, or
    none was near; "corrected": all was reused.
    """
    size = max(8, tokens // (2 * AGENTS))  # instructions and each message
    cut = _Cutter(text)
    team, templates = AgentTeam(model), []
    for i in range(AGENTS):
        names = ["question", *(f"answer {j}" for j in range(i))]
        template: list[str | list[int]] = [cut(size).tolist()]
        for name in names:
            template += [name, cut(8).tolist()]
        templates.append(template)
        team.add(f"agent {i}", template)
    out = _Rows(model, "agents", tell)
    for request in range(requests):
        said = {"question": cut(size - 2 * request).tolist()}  # the first are the longest: anchors for the others
        for i, template in enumerate(templates):
            heard = dict(said)
            prompt = [t for part in template for t in (heard[part] if isinstance(part, str) else part)]
            done = team.read(f"agent {i}", heard)
            ready: Ready = done.cache, done.logits, done.reused / len(done.tokens), done.seconds
            rotated = partial(_rotated, model, team, template, heard)
            case = "prefilled" if done.why else "corrected"
            out.add(case, prompt, cut(AHEAD), {"kvcomm": partial(_given, ready), "rotated only": rotated})
            said[f"answer {i}"] = cut(size - 2 * request).tolist()
    return out.rows()


def _given(ready: Ready) -> Ready:
    return ready


def _rotated(
    model: PreTrainedModel, team: AgentTeam, template: list[str | list[int]], messages: dict[str, list[int]]
) -> Ready:
    """The same messages and instructions at their places, without corrections. Instructions are computed beforehand."""
    whole, at = compute(model, [t for part in template if not isinstance(part, str) for t in part]), 0
    shared = {name: team.share(message) for name, message in messages.items()}
    start, chunks = perf_counter(), []
    for part in template:
        chunks.append(shared[part] if isinstance(part, str) else whole.part(at, at + len(part)))
        at += 0 if isinstance(part, str) else len(part)
    places = [sum(len(c) for c in chunks[:i]) for i in range(len(chunks))]
    last, cache = places[-1] + len(chunks[-1]) - 1, KVCache(model)
    place(cache, chunks, places)
    logits = feed(model, cache, chunks[-1].tokens[-1:], [last]).logits
    assert logits is not None
    return cache, logits, last / (last + 1), perf_counter() - start


class _Unrotated(CodeSession):
    """PIE without its rotation: keys behind an edit stay as they were computed."""

    @classmethod
    def of(cls, session: CodeSession) -> _Unrotated:
        twin = cls.__new__(cls)
        twin.__dict__.update(session.__dict__)
        return twin

    def _parts(self, start: int, stop: int, to: int) -> list[tuple[int, Chunk, int]]:
        found = super()._parts(start, stop, to)
        return [
            (at, replace(c, base=at, rows=tuple(replace(rows, index=at) for rows in c.rows)), was)
            for at, c, was in found
        ]


def edits(model: PreTrainedModel, text: Tensor, requests: int, tokens: int, tell: Tell = silent) -> list[Row]:
    """A source file is edited: 16 tokens are put in, taken out, and three places are changed."""
    cut, out = _Cutter(text), _Rows(model, "edits", tell)
    for request in range(requests):
        source, new = cut(tokens, request * 64).tolist(), cut(16, 7 * tokens + request * 64).tolist()
        quarter = tokens // 4
        cases = {
            "insertion": [Edit(quarter, quarter, tuple(new))],
            "deletion": [Edit(quarter, quarter + 16)],
            "three places": [Edit(i * quarter, i * quarter + 4, tuple(new[: 4 + i])) for i in (1, 2, 3)],
        }
        first = CodeSession(model, source)
        sessions = {"pie": first, "pie(refresh=64)": copy.copy(first), "not rotated": _Unrotated.of(first)}
        sessions["pie(refresh=64)"].refresh = 64
        for case, changes in cases.items():
            twins = {name: copy.copy(session) for name, session in sessions.items()}  # an edit makes a new cache
            text_now = list(source)
            for change in reversed(changes):
                text_now[change.start : change.stop] = change.tokens
            behind = cut(AHEAD, tokens + request * 64)
            ways = {name: partial(_edited, twin, changes) for name, twin in twins.items()}
            out.add(case, text_now, behind, ways)
    return out.rows()


def _edited(session: CodeSession, changes: Sequence[Edit]) -> Ready:
    done = session.edit(changes)
    return session.cache, session.logits, 1 - done.encoded / len(session.tokens), done.seconds


def contexts(model: PreTrainedModel, text: Tensor, requests: int, tokens: int, tell: Tell = silent) -> list[Row]:
    """Eight contexts behind a prefix: encoded in this request, and beforehand; against all of them one after the other."""
    cut, out = _Cutter(text), _Rows(model, "contexts", tell)
    prefix, size = cut(32).tolist(), tokens // 8
    options = {"ape(temperature=1, scale=1)": (1.0, 1.0), "ape": (0.9, 0.9)}
    teams = {name: ParallelContexts(model, prefix, temperature=t, scale=s) for name, (t, s) in options.items()}
    for _ in range(requests):
        passages, query = [cut(size).tolist() for _ in range(8)], cut(32).tolist()
        prompt = [*prefix, *(t for passage in passages for t in passage), *query]
        ready = [next(iter(teams.values())).encode(passage) for passage in passages]  # the prefix is the same for both
        ways: dict[str, Callable[[], Ready]] = {name: partial(_asked, ape, ready, query) for name, ape in teams.items()}
        ways["ape, contexts new"] = partial(_asked, teams["ape"], passages, query)
        out.add("8 contexts", prompt, cut(AHEAD), ways)
    return out.rows()


@torch.no_grad()
def _asked(ape: ParallelContexts, passages: Sequence[Chunk | list[int]], query: list[int]) -> Ready:
    start = perf_counter()
    chunks = [passage if isinstance(passage, Chunk) else ape.encode(passage) for passage in passages]
    cache, ids = ape.prompt(chunks, query)
    logits = ape.model(ids[:, -len(query) :], past_key_values=cache, logits_to_keep=1).logits[0]
    total = len(ape.prefix) + sum(len(c) for c in chunks) + len(query)
    new = sum(len(c) for c, passage in zip(chunks, passages, strict=True) if c is not passage)
    return cache, logits, 1 - (new + len(query)) / total, perf_counter() - start


class _Cutter:
    """Pieces of a text, one behind the other, from its start again at its end."""

    def __init__(self, text: Tensor) -> None:
        self.text, self.at = text, 0

    def __call__(self, size: int, at: int | None = None) -> Tensor:
        first = self.at if at is None else at
        self.at = first + size
        return self.text[torch.arange(first, first + size) % len(self.text)]

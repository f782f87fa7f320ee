"""Passages reused wherever they stand: time to the first token against prefix caching, and what it does to answers."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvloom.bench import show
from kvloom.bench.timing import Tell, silent
from kvloom.core.cache import KVCache
from kvloom.lab.chat import first_turn, stops_of
from kvloom.lab.measure import load_model
from kvloom.lab.tasks.base import SHIPPED
from kvloom.models.training.evaluate import holds
from kvloom.models.training.recall import Haystack, Sample, make_sample
from kvloom.models.training.tokenizer import DOCUMENT_END
from kvloom.programs.blend import Blend, Prefilled, Report
from kvloom.store import Store

__all__ = ["METHODS", "Case", "Quality", "Rag", "Speed", "cases", "measure", "quality", "run", "speed", "steps"]

METHODS = ("cacheblend(ratio=0.15)", "epic(k=16)", "naive")
QUALITY = ("naive", "epic(k=16)", "cacheblend(ratio=0.05)", "cacheblend(ratio=0.15)", "cacheblend(ratio=0.5)")
PREFIX, FULL = "prefix", "DynamicCache"
BAR, OF, TOKENS, PASSAGES = 2.5, "cacheblend(ratio=0.15)", 512, 10  # what the bar is about
POOL, WARM = 16, 1
LENGTH = 700  # tokens of a question about planted facts


@dataclass(frozen=True)
class Speed:
    """One way to the first token: median seconds, and the median over the requests of prefix caching's time over its own.

    `share`: rows through layers of those of a full prefill; `hits`: tokens that came from the store, both means.
    """

    method: str
    seconds: float
    faster: float
    share: float
    hits: float
    loading: float
    bar: float | None
    met: bool | None


@dataclass(frozen=True)
class Quality:
    """One method on the bundled model: nats per token of the right answer to a full prefill, and the share of right answers.

    `cut`: the facts asked for begin in one passage and end in the next. `behind`: passages were computed behind the head.
    """

    method: str
    cut: bool
    behind: bool
    kl: float
    recall: float


@dataclass(frozen=True)
class Rag:
    """Both halves."""

    passages: int
    tokens: int
    requests: int
    samples: int
    speeds: list[Speed]
    qualities: list[Quality]

    def tables(self) -> list[Table]:
        """One of times, one of answers."""
        out = []
        if self.speeds:
            rows = [
                (s.method, f"{s.seconds:.2f}", f"{s.loading:.2f}", f"{s.hits:.0%}", f"{s.share:.0%}", f"{s.faster:.2f}x",
                 "" if s.bar is None else f">= {s.bar:.1f}x", {None: "", True: "yes", False: "NO"}[s.met])
                for s in self.speeds
            ]  # fmt: skip
            title = f"{self.passages} passages of {self.tokens}, random Llama of 12 layers, {self.requests} requests"
            heads = ("method", "seconds", "loading", "hits", "computed", "faster", "bar", "met")
            out.append(show.table(title, heads, rows))
        if self.qualities:
            answers = [
                ("cut in two" if q.cut else "whole", q.method, "head" if q.behind else "nothing", f"{q.kl:.4f}", f"{q.recall:.0%}")
                for q in self.qualities
            ]  # fmt: skip
            title = f"Answers about planted facts, nano, {self.samples} documents"
            out.append(show.table(title, ("facts", "method", "behind", "KL, nats", "recall"), answers, text=3, group=1))
        return out

    def notes(self) -> list[str]:
        """What the columns mean."""
        return [
            "faster: prefix caching's time to the first token over the row's, on the same request; hits: tokens from the store.",
            "computed: rows through layers, of those of a full prefill. Prefix caching knows every passage behind the system prompt.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return show.about() | asdict(self)


def steps(methods: int, requests: int, samples: int) -> int:
    """How often `run` tells of a step."""
    return (methods + 2) * (WARM + requests) * bool(requests) + 2 * samples


def run(methods: Sequence[str], passages: int, tokens: int, requests: int, samples: int, tell: Tell = silent) -> Rag:
    """Times, then answers; none of either with 0 requests or samples."""
    speeds = speed(methods, passages, tokens, requests, tell) if requests else []
    return Rag(passages, tokens, requests, samples, speeds, quality(samples, tell) if samples else [])


def _llama(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 15, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def speed(methods: Sequence[str], passages: int, tokens: int, requests: int, tell: Tell = silent) -> list[Speed]:
    """Requests that draw passages by Zipf's law; every contender takes each request in turn.

    Every passage of the pool was seen once before, behind the system prompt: for prefix caching, too.
    """
    transformers.logging.set_verbosity_error()  # the book is longer than the tokenizer thinks a text should be
    _, tokenizer = load_model("nano")
    model = _llama(len(tokenizer))
    text = SHIPPED.read_text(encoding="utf-8")[: 8 * tokens * (POOL + 1)]
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    pool = [ids[i * tokens : (i + 1) * tokens] for i in range(max(POOL, passages))]
    head, tail = ids[-96:-32], ids[-32:]
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, len(pool) + 1)
    draws = [torch.multinomial(weights, passages, generator=generator).tolist() for _ in range(WARM + requests)]
    names = list(dict.fromkeys((PREFIX, *methods)))
    reports: dict[str, list[Report]] = {name: [] for name in names}
    stock: list[float] = []
    room = "memory://?max=4GiB"
    with Store.open(room) as exact, Store.open(room) as apart:
        rags = {name: Blend(model, None, exact if name == PREFIX else apart, name) for name in names}
        for rag in (rags[PREFIX], *(list(rags.values())[1:2])):
            for passage in pool:
                rag.prefill(head, [passage], tail)
        for i, draw in enumerate(draws):
            for name, rag in rags.items():
                tell(name)
                done = rag.prefill(head, [pool[j] for j in draw], tail)
                if i >= WARM:
                    reports[name].append(done.report)
            tell(FULL)
            seconds = _stock(model, done)
            if i >= WARM:
                stock.append(seconds)
    base = [report.seconds for report in reports[PREFIX]]
    rows = [Speed(FULL, median(stock), _faster(base, stock), 1.0, 0.0, 0.0, None, None)]
    for name, found in reports.items():
        times = [report.seconds for report in found]
        faster = _faster(base, times)
        bar = BAR if (name, tokens) == (OF, TOKENS) and passages >= PASSAGES else None
        hits = mean(sum(part.tokens for part in r.parts if part.hit) / r.tokens for r in found)
        loading = median(r.loading + r.placing for r in found)
        share = mean(r.recomputed for r in found)
        rows.append(
            Speed(name, median(times), faster, share, hits, loading, bar, None if bar is None else faster >= bar)
        )
    return rows


def _faster(base: list[float], times: list[float]) -> float:
    return median(theirs / mine for theirs, mine in zip(base, times, strict=True))


@torch.no_grad()
def _stock(model: PreTrainedModel, done: Prefilled) -> float:
    ids = torch.tensor([done.tokens])
    start = perf_counter()
    model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    return perf_counter() - start


@dataclass(frozen=True)
class Case:
    """A document cut into passages, what stands around it, and the right answer's ids."""

    sample: Sample
    head: list[int]
    passages: list[list[int]]
    tail: list[int]
    answer: list[int]


def cases(tokenizer: Any, count: int, cut: bool = True, length: int = LENGTH) -> list[Case]:
    """Questions about one of several facts in a book's pages. `cut`: a new passage begins inside of every fact, between
    its key and its number, so that no passage alone says what the answer is; otherwise in front of every fact."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found

    text = SHIPPED.read_text(encoding="utf-8")[:250_000].replace(DOCUMENT_END, "\n")
    haystack = Haystack(text, lambda piece: len(ids(piece)))
    found = []
    for seed in range(count):
        sample = make_sample("multi-key", length, seed, haystack, lambda piece: len(ids(piece)))
        prompt = first_turn(tokenizer, sample.messages[0]["content"])
        before, _, after = prompt.partition(sample.document)
        passages = [ids(sample.document[a:b]) for a, b in pairwise(_cuts(sample, cut)) if a < b]
        answer = ids(f" {sample.answer}{tokenizer.eos_token}")
        found.append(Case(sample, ids(before), passages, ids(after), answer))
    return found


def _cuts(sample: Sample, inside: bool) -> list[int]:
    """Where passages begin, always at a space: behind the key of every fact, or halfway between one fact and the next."""
    text, cuts, last = sample.document, [0], 0
    for start, stop in sorted(sample.spans):
        fact = next(f for f in sample.facts if text[start:stop] in f.needles)
        at = start + text[start:stop].index(fact.key) + len(fact.key) if inside else (last + start) // 2
        space = text.find(" ", at, stop)
        cuts += [space] if inside or last < space < start else []
        last = stop
    return sorted({*cuts, len(text)})


def quality(samples: int, tell: Tell = silent, methods: Sequence[str] = QUALITY) -> list[Quality]:
    """Every method on facts in one passage and on facts cut in two, with passages computed alone, and behind the head."""
    model, tokenizer = load_model("nano")
    rows = []
    for cut in (False, True):
        ways = [(method, behind) for behind in (False, True) for method in methods]
        kls: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
        right: dict[tuple[str, bool], list[bool]] = {way: [] for way in ways}
        whole: list[bool] = []
        with Store.open("memory://?max=1GiB") as store:
            rags = {way: Blend(model, tokenizer, store, way[0], behind=way[1]) for way in ways}
            for case in cases(tokenizer, samples, cut):
                tell("quality")
                want, ok = measure(rags[ways[0]], case, full=True)
                whole.append(ok)
                for way, rag in rags.items():
                    got, ok = measure(rag, case)
                    kls[way].append(float((want.exp() * (want - got)).sum(-1).mean()))
                    right[way].append(ok)
        rows.append(Quality("full prefill", cut, False, 0.0, mean(whole)))
        rows += [
            Quality(method, cut, behind, mean(kls[method, behind]), mean(right[method, behind]))
            for method, behind in ways
        ]
    return rows


@torch.no_grad()
def measure(rag: Blend, case: Case, full: bool = False) -> tuple[Tensor, bool]:
    """Log-probabilities [answer, V] in fp64 along the right answer, and whether the greedy answer is right."""
    if full:
        tokens = torch.tensor([[*case.head, *(t for passage in case.passages for t in passage), *case.tail]])
        cache = KVCache(rag.model)
        first = rag.model(tokens, past_key_values=cache, logits_to_keep=1).logits[0]
    else:
        done = rag.prefill(case.head, case.passages, case.tail)
        cache, first = done.cache, done.logits
    forced = rag.model(torch.tensor([case.answer[:-1]]), past_key_values=deepcopy(cache)).logits[0]
    logits = torch.cat([first, forced]).double().log_softmax(-1)
    said, stops = [int(first.argmax())], stops_of(rag.model, rag.tokenizer)
    while said[-1] not in stops and len(said) < len(case.answer) + 8:
        said.append(int(rag.model(torch.tensor([said[-1:]]), past_key_values=cache).logits[0, -1].argmax()))
    text = rag.tokenizer.decode(said, skip_special_tokens=True)
    return logits, holds(text, case.sample.questions[0], case.sample.facts)

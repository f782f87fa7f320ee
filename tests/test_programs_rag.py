"""Methods of reuse on the bundled model and on random ones: their limits, and what has to grow and fall."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom import KVCache
from kvloom.errors import CacheError, RecipeError
from kvloom.lab.measure import load_model
from kvloom.programs import Step, compute, context_of, feed, place
from kvloom.programs.cacheblend import deviation, most
from kvloom.programs.method import METHODS, Method, Plan, Span, Text, methods, parse_method
from tests.families import build, pristine, prompt, subject

pytest.importorskip("msgspec")

from kvloom.bench.rag import Case, cases, measure
from kvloom.programs.blend import Blend
from kvloom.store import Store

TOLERANCE = 3e-4
PIECE, PIECES = 40, 5


@cache
def nano() -> tuple[PreTrainedModel, object]:
    return load_model("nano")


@cache
def passages() -> tuple[tuple[int, ...], ...]:
    """Pieces of a book, and a last one that stands for the question."""
    from kvloom.lab.tasks.base import SHIPPED

    text = SHIPPED.read_text(encoding="utf-8")[20_000:24_000]
    ids = nano()[1].encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    return tuple(tuple(ids[i * PIECE * 3 : i * PIECE * 3 + PIECE]) for i in range(PIECES + 1))


def laid(model: PreTrainedModel, pieces: tuple[tuple[int, ...], ...]) -> tuple[Text, KVCache]:
    """All pieces but the last from chunks of their own, the first of which is exact."""
    tokens = tuple(t for piece in pieces for t in piece)
    spans = []
    for i, piece in enumerate(pieces[:-1]):
        at = sum(map(len, pieces[:i]))
        spans.append(Span(at, at + len(piece), compute(model, piece), i == 0))
    held = KVCache(model)
    place(held, [span.chunk for span in spans], [span.start for span in spans])
    return Text(tokens, tuple(spans)), held


def full(model: PreTrainedModel, tokens: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.tensor([tokens]), past_key_values=KVCache(model), logits_to_keep=1).logits[0]
    return out


def run(model: PreTrainedModel, method: str, text: Text, held: KVCache):  # type: ignore[no-untyped-def]
    rows, choose = parse_method(method).plan(text)
    return feed(model, deepcopy(held), torch.tensor(text.tokens)[rows], rows, choose)


@pytest.mark.parametrize("method", ["cacheblend(ratio=1.0)", "cacheblend(ratio=1.0, by='key')", "epic(k=40)", "prefix"])
def test_recomputing_everything_is_a_full_prefill(method: str) -> None:
    model, _ = nano()
    text, held = laid(model, passages())
    assert float((run(model, method, text, held).logits - full(model, text.tokens)).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("method", ["cacheblend(ratio=0.0)", "cacheblend(ratio=0.3)", "epic(k=0)", "naive", "prefix"])
def test_one_chunk_and_a_question_is_prefix_caching(method: str) -> None:
    model, _ = nano()
    text, held = laid(model, (passages()[0], passages()[-1]))
    got = run(model, method, text, held)
    assert float((got.logits - full(model, text.tokens)).abs().max()) <= TOLERANCE
    assert set(got.rows) == {PIECE}


def test_cacheblend_without_a_ratio_has_two_fresh_layers() -> None:
    model, _ = nano()
    text, held = laid(model, passages())
    got = run(model, "cacheblend(ratio=0.0)", text, held)
    rows, suffix = PIECE * PIECES, PIECE
    assert got.rows == (rows, rows, *[suffix] * (len(got.rows) - 2))
    # the same by hand: layers 0 and 1 of all rows, then the suffix over what is stored
    again = deepcopy(held)
    want = feed(
        model,
        again,
        text.tokens[PIECE:],
        range(PIECE, len(text.tokens)),
        lambda s: ~text.stale[s.index] if s.layer == 1 else None,
    )
    assert torch.equal(got.logits, want.logits)


def test_rows_of_cacheblend_are_counted() -> None:
    model, _ = nano()
    text, held = laid(model, passages())
    stale, suffix, layers = PIECE * (PIECES - 1), PIECE, len(list(held.managed()))
    got = run(model, "cacheblend(ratio=0.15)", text, held)
    chosen = round(0.15 * stale) + suffix
    assert sum(got.rows) == 2 * (stale + suffix) + (layers - 2) * chosen
    falling = run(model, "cacheblend(ratio=(0.5, 0.25, 0.1))", text, held)
    assert falling.rows[1:5] == (stale + suffix, *(round(r * stale) + suffix for r in (0.5, 0.25, 0.1)))


def test_the_first_chunk_is_never_computed_again() -> None:
    model, _ = nano()
    text, held = laid(model, passages())
    for method in ("cacheblend(ratio=0.5)", "epic(k=8)", "naive", "prefix"):
        assert int(parse_method(method).plan(text).rows[0]) >= PIECE


def test_epic_computes_a_fixed_number_of_rows() -> None:
    text, _ = laid(nano()[0], passages())
    for k in (0, 1, 8, 1000):
        rows = parse_method(f"epic(k={k})").plan(text).rows
        assert len(rows) == min(k, PIECE) * (PIECES - 1) + PIECE


@cache
def cut() -> list[tuple[Case, Tensor]]:
    """Questions about facts that are cut in two by their passages, and a full prefill's predictions along the answers."""
    model, tokenizer = nano()
    rag = Blend(model, tokenizer)
    return [(case, measure(rag, case, full=True)[0]) for case in cases(tokenizer, 2)]


def lost(method: str | Method) -> float:
    """Nats per token to a full prefill."""
    rag = Blend(*nano(), method=method, store=shelf())
    return sum(float((want.exp() * (want - measure(rag, case)[0])).sum(-1).mean()) for case, want in cut()) / len(cut())


@cache
def shelf() -> Store:
    return Store.open("memory://?max=256MiB")


def test_more_rows_come_closer() -> None:
    naive, few, some, many = (lost(m) for m in ("naive", *(f"cacheblend(ratio={r})" for r in (0.05, 0.15, 0.5))))
    assert naive > few > some > many
    assert naive > lost("epic(k=1)") > lost("epic(k=16)")


def test_the_largest_deviation_beats_chance() -> None:
    generator = torch.Generator().manual_seed(0)

    def plan(text: Text) -> Plan:
        stale = text.stale

        def choose(step: Step) -> Tensor | None:
            here = stale[step.index]
            score = torch.rand(len(here), generator=generator)
            return most(score, here, round(0.15 * int(stale.sum()))) if step.layer == 1 else None

        return Plan(text.fed(~text.exact), choose)

    assert lost("cacheblend(ratio=0.15)") < lost(Method("chance", plan))


def test_deviation_is_that_of_the_right_rows() -> None:
    model, ids = subject("llama"), prompt(60)[0].tolist()
    held = KVCache(model)
    place(held, [compute(model, ids[:20]), compute(model, ids[20:40])], [0, 20])
    seen: dict[int, Tensor] = {}
    feed(model, held, ids, range(60), lambda s: seen.update({s.layer: deviation(s)}))  # type: ignore[func-returns-value]
    assert float(seen[0][:40].max()) < 1e-8  # the first layer's values know no context
    assert float(seen[1][:20].max()) < 1e-8 < float(seen[1][20:40].min())  # the first chunk is exact


def test_reuse_without_repair_is_a_prefill_in_blocks() -> None:
    """Chunks moved to their places give what one forward gives in which every chunk sees itself alone."""
    model, ids = build("llama"), prompt(90)[0].tolist()
    text, held = laid(model, (tuple(ids[:25]), tuple(ids[25:60]), tuple(ids[60:])))
    got = run(model, "naive", text, held).logits
    block = torch.tensor([0] * 25 + [1] * 35 + [2] * 30)
    sees = torch.ones(90, 90).tril().bool() & ((block[:, None] == block) | (block[:, None] == 2))
    with torch.no_grad():
        want = pristine("llama")(torch.tensor([ids]), attention_mask=sees[None, None]).logits[0, -1:]
    assert float((got - want).abs().max()) <= TOLERANCE


def test_names() -> None:
    assert {"cacheblend", "epic", "naive", "prefix"} <= set(methods())
    assert str(parse_method("cacheblend(ratio=0.2)")) == "cacheblend(ratio=0.2)"
    with pytest.raises(RecipeError, match="Did you mean 'cacheblend'"):
        parse_method("cachebland")
    for wrong in (
        "cacheblend(ratio=2)",
        "cacheblend(check=0)",
        "cacheblend(by='query')",
        "cacheblend(ratio=(0.1, 0.5))",
        "epic(k=-1)",
    ):
        with pytest.raises(RecipeError):
            parse_method(wrong)


def test_blend() -> None:
    model, tokenizer = nano()
    head, *bodies, tail = passages()
    with Store.open("memory://?max=256MiB") as store:
        rag = Blend(model, tokenizer, store, "cacheblend(ratio=1.0)")
        first = rag.prefill(head, bodies, tail)
        assert [part.hit for part in first.report.parts] == [False] * (len(bodies) + 2)
        second = rag.prefill(head, bodies[::-1], tail)
        assert [part.hit for part in second.report.parts] == [True] * (len(bodies) + 1) + [False]
        assert [part.exact for part in second.report.parts] == [True, True] + [False] * (len(bodies) - 1) + [True]
        for done in (first, second):
            assert float((done.logits - full(model, done.tokens)).abs().max()) <= TOLERANCE
            assert done.cache.get_seq_length() == len(done.tokens) == done.report.tokens
        assert "passages from the store" in str(second.report)
        alone = Blend(model, tokenizer, store, "naive", behind=False).prefill(head, bodies, tail)
        assert [part.hit for part in alone.report.parts] == [True] + [False] * (len(bodies) + 1)
        other = Blend(model, tokenizer, store, tenant="other").prefill(head, bodies, tail)
        assert not any(part.hit for part in other.report.parts)
        with pytest.raises(CacheError, match="question"):
            rag.prefill(head, bodies, "")
        with pytest.raises(CacheError, match="no tokenizer"):
            Blend(model, None, store).prefill("text", [], [1])


def test_blend_as_prefix_cache() -> None:
    model, tokenizer = nano()
    head, *bodies, tail = passages()
    with Store.open("memory://?max=256MiB") as store:
        rag = Blend(model, tokenizer, store, "prefix")
        rag.prefill(head, bodies, tail)
        for order, hits in ((bodies, len(bodies) + 1), ([*bodies[:2], bodies[3], bodies[2]], 3)):
            done = rag.prefill(head, order, tail)
            assert sum(part.hit for part in done.report.parts) == hits
            assert float((done.logits - full(model, done.tokens)).abs().max()) <= TOLERANCE


def test_blend_answers_as_generate_does() -> None:
    model, tokenizer = nano()
    rag = Blend(model, tokenizer, method="cacheblend(ratio=1.0)")
    head, *bodies, tail = passages()
    got, _ = rag.answer(head, bodies, tail, max_new_tokens=8, do_sample=False)
    ids = torch.tensor([[t for piece in (head, *bodies, tail) for t in piece]])
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=KVCache(model), max_new_tokens=8, do_sample=False
    )
    assert got == tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
    assert context_of(()) == ""


def test_the_page_about_reuse_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_docs import ROOT, run_blocks

    monkeypatch.setattr(METHODS, "factories", dict(METHODS.factories))
    assert "from the store" in str(run_blocks(ROOT / "docs" / "reuse.md")["again"].report)


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.bench import rag
    from kvloom.cli import main

    monkeypatch.setattr(rag, "POOL", 3)

    sizes = ["--requests", "1", "--samples", "0", "--tokens", "24", "--passages", "2", "--json"]
    main(["bench", "rag", "--method", "cacheblend(ratio=0.5)", *sizes])
    found = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in found["speeds"]}
    assert set(rows) == {"DynamicCache", "prefix", "cacheblend(ratio=0.5)"} and not found["qualities"]
    assert rows["prefix"]["faster"] == 1.0 and 0 < rows["cacheblend(ratio=0.5)"]["share"] < rows["prefix"]["share"] < 1
    with pytest.raises(SystemExit):
        main(["bench", "rag", "--requests", "0", "--samples", "0"])
    main(["methods", "cacheblend", "--json"])
    assert json.loads(capsys.readouterr().out)["arxiv"] == "2405.16444"

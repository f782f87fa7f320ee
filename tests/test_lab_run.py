"""Runs of the lab: what a session does to a cache, resuming after a kill, records, the commands."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom import KVCache, parse
from kvloom.cli import main
from kvloom.errors import KvloomError, LabError, RecipeError
from kvloom.lab import custom, fidelity, session
from kvloom.lab.chat import encode
from kvloom.lab.measure import load_model
from kvloom.lab.records import Record, Results, load, made_with
from kvloom.lab.run import Run, stages
from kvloom.lab.suites import SUITES, Suite, choose
from kvloom.lab.tables import summarize
from kvloom.lab.tasks import TASKS, Example, Kit, Turn
from tests.test_lab_records import made

TIMES = ("prefill_seconds", "decode_ms", "peak")
TURNS = tuple(Turn(f"What is the code for {k}?", (v,), 12) for k, v in (("amber", "4821"), ("cedar", "9057")))
EXAMPLE = Example(
    "x",
    "The code for amber is 4821. " + "It rained all day in the old town. " * 20 + "The code for cedar is 9057.",
    TURNS,
)


def timeless(records: list[Record]) -> list[Record]:
    return sorted((replace(r, **dict.fromkeys(TIMES)) for r in records), key=lambda r: str(r.key))


def test_a_context_has_the_same_tokens_for_every_question(nano: tuple[Any, Any]) -> None:
    heads = {EXAMPLE.parts(nano[1], i)[0] for i in range(2)}
    assert len(heads) == 1 and heads.pop().endswith(EXAMPLE.context)
    with pytest.raises(LabError, match="context"):
        replace(EXAMPLE, frame="{question} {context}").parts(nano[1])


@torch.no_grad()
def test_multi_request_answers_as_a_fresh_run_does(nano: tuple[Any, Any]) -> None:
    model, tokenizer = nano
    out, _ = session.run(model, tokenizer, parse("full"), EXAMPLE, "multi-request")
    for i, reply in enumerate(out.replies):
        head, tail = EXAMPLE.parts(tokenizer, i)
        ids = torch.cat([encode(tokenizer, head), encode(tokenizer, tail)], 1)
        stock = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert reply.prediction == tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def test_a_question_leaves_the_context_as_it_was(nano: tuple[Any, Any]) -> None:
    model, tokenizer = nano
    held = session.Session(model, tokenizer, parse("snapkv(budget=64) | kivi(bits=4)"))
    head, tail = EXAMPLE.parts(tokenizer)
    held.read(held.cache, encode(tokenizer, head))

    def content(cache: KVCache) -> list[torch.Tensor]:
        rows = [row.layer for layer in cache.managed() for row in layer.rows]
        return [x.contiguous().view(torch.uint8).clone() for row in rows for *_, x, used in row.tensors() if used]

    before, report = content(held.cache), held.cache.report().to_dict()
    probe = copy.deepcopy(held.cache)
    held.answer(held.read(probe, encode(tokenizer, tail)), TURNS[0], probe)
    assert held.cache.report().to_dict() == report
    assert all(torch.equal(a, b) for a, b in zip(before, content(held.cache), strict=True))


@torch.no_grad()
def test_later_turns_come_behind_right_answers(nano: tuple[Any, Any]) -> None:
    """Multi-turn with golden answers equals reading the whole dialogue afresh."""
    model, tokenizer = nano
    out, _ = session.run(model, tokenizer, parse("full"), EXAMPLE, "multi-turn")
    chat = [
        {"role": "user", "content": f"{EXAMPLE.context}\n\n{TURNS[0].question}"},
        {"role": "assistant", "content": "4821"},
        {"role": "user", "content": TURNS[1].question},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    head, _ = EXAMPLE.parts(tokenizer)
    assert text.startswith(head)
    ids = torch.cat([encode(tokenizer, head), encode(tokenizer, text[len(head) :])], 1)
    stock = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert out.replies[1].prediction == tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_prefix_is_part_of_the_prompt_and_of_the_answer_before(nano: tuple[Any, Any]) -> None:
    tokenizer = nano[1]
    turns = tuple(replace(turn, prefix=" The code is") for turn in TURNS)
    example = replace(EXAMPLE, turns=turns)
    assert example.parts(tokenizer)[1].endswith("<|assistant|> The code is")
    assert session.between(tokenizer, turns[0], "Q?", True) == " 4821<|end|><|user|>Q?<|end|><|assistant|>"


def test_bits_are_those_of_the_stock_model(nano: tuple[Any, Any]) -> None:
    model, tokenizer = nano
    words = "It was the best of times, it was the worst of times, it was the age of wisdom"
    example = Example(
        "b",
        words,
        (Turn("", (", it was the age of foolishness",), 12, "bits_per_byte"),),
        "{context}{question}",
        chat=False,
    )
    out, _ = session.run(model, tokenizer, parse("full"), example)
    head, tail = encode(tokenizer, tokenizer.bos_token + words), encode(tokenizer, example.turns[0].answers[0])
    ids = torch.cat([head, tail], 1)
    with torch.no_grad():
        logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
    nats = -logp[head.shape[1] - 1 : -1].gather(1, tail[0][:, None]).sum().item()
    assert out.replies[0].score == pytest.approx(nats / 0.6931472 / len(example.turns[0].answers[0]), rel=1e-4)
    assert out.perplexity == pytest.approx(2.7182818 ** (nats / tail.shape[1]), rel=1e-4)


def test_fidelity_of_a_cache_that_loses_nothing_and_of_one_that_does(nano: tuple[Any, Any]) -> None:
    model, tokenizer = nano
    example = next(TASKS["text/fidelity"].examples(Kit(tokenizer), 256, 1))
    _, reference = session.run(model, tokenizer, parse("full"), example)
    assert reference is not None
    same, _ = session.run(model, tokenizer, parse("snapkv(budget=1000)"), example, reference=reference)
    lossy, _ = session.run(model, tokenizer, parse("snapkv(budget=48, interval=None)"), example, reference=reference)
    a, b = same.fidelity, lossy.fidelity
    assert a is not None and b is not None
    assert a["kl"] < 1e-5 and a["top1"] == a["top5"] == 1 and a["diverges"] is None
    assert max(x for layer in a["error"] for x in layer) < 1e-3
    assert all(x == 1 for layer in a["mass"] for x in layer)
    assert b["kl"] > a["kl"] and b["top5"] >= b["top1"]
    assert all(0 < x < 1 for layer in b["mass"] for x in layer)
    assert len(b["error"]) == 6 and len(b["error"][0]) == model.config.num_attention_heads
    assert len(b["mass"][0]) == model.config.num_key_value_heads


def test_mass_is_what_a_stock_model_attends_to(nano: tuple[Any, Any]) -> None:
    """The share of attention on kept slots, from the attention weights of the eager implementation."""
    from transformers import AutoModelForCausalLM

    from kvloom.lab.measure import NANO

    model, tokenizer = nano
    example = next(TASKS["text/fidelity"].examples(Kit(tokenizer), 200, 1))
    _, full = session.run(model, tokenizer, parse("full"), example)
    cut, own = session.run(model, tokenizer, parse("streamingllm(sinks=4, window=40)"), example, reference=full)
    assert full is not None and own is not None and cut.fidelity is not None
    eager = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32, attn_implementation="eager").eval()
    head = encode(tokenizer, "".join(example.parts(tokenizer)))
    n = head.shape[1]
    with torch.no_grad():
        weights = eager(torch.cat([head, torch.tensor([full.tokens])], 1), output_attentions=True).attentions
    kept = fidelity.kept_slots(own.cache, 3, 2, n)
    assert kept[0].nonzero()[:, 0].tolist() == [*range(4), *range(n - 40, n)]
    share = weights[3][0, :, n:, :n]
    share = (share * kept[0]).sum(-1) / share.sum(-1)
    heads = share.view(len(cut.fidelity["mass"][3]), -1).mean(-1)
    assert cut.fidelity["mass"][3] == pytest.approx(heads.tolist(), abs=1e-4)


COMMAND = ("lab", "run", "text/fidelity", "--lengths", "128", "--examples", "3", "--cache", "kivi(bits=2)")


def start(*folders: Path) -> subprocess.Popen[bytes]:
    """A process that runs the command, once for each folder."""
    outs = [str(folder) for folder in folders]
    code = f"from kvloom.cli import main\nfor out in {outs!r}:\n    main([*{COMMAND!r}, '--out', out])"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_killed_run_goes_on_and_equals_one_that_was_not(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    first = start(torn)
    path = torn / "results.jsonl"
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    finished = path.read_bytes().rpartition(b"\n")[0]
    assert finished.count(b"\n") < 5
    assert start(torn, whole).wait(300) == 0
    assert path.read_bytes().startswith(finished + b"\n"), "what was finished is not run again"
    assert len(path.read_bytes().splitlines()) == 6
    assert timeless(load([torn])) == timeless(load([whole]))
    assert (torn / "report.html").stat().st_size > 1000 and "kivi(bits=2)" in (torn / "report.md").read_text()


def test_workers_find_what_one_process_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, more in (("one", []), ("two", ["--workers", "2"])):
        main([*COMMAND, *more, "--out", str(tmp_path / folder), "--json"])
    one, two = ([replace(r, made=made()) for r in timeless(load([tmp_path / folder]))] for folder in ("one", "two"))
    assert one == two and len(one) == 6
    with pytest.raises(SystemExit):
        main([*COMMAND, "--workers", "0"])


def test_a_run_in_python(nano: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = nano
    kit = Kit(tokenizer)
    recipes = {name: parse(name) for name in ("full", "h2o(budget=64)")}
    suite = Suite("own", "", ("text/fidelity",), (192,), 1)
    told: list[str] = []
    with Results(tmp_path) as results:
        job = Run("nano", model, tokenizer, recipes, suite, made_with(model, kit.text, 0), kit)
        assert job.left(results) == 2
        job.go(results, told.append)
        assert job.left(results) == 0 and len(told) == 2
    rows = load([tmp_path])
    assert [r.recipe for r in rows] == ["full", "h2o(budget=64)"] and rows[1].fidelity is not None
    assert rows[0].used > rows[1].used > 0 and rows[0].tokens <= 192
    assert summarize(rows)[0].row("h2o(budget=64)").kl is not None


SMALL = Path(os.environ.get("KVLOOM_DATA", "nowhere")) / "models"


@pytest.mark.parametrize(("name", "length"), [("stories260K", 384), ("babyllama-tok105", 256)])
def test_small_real_models_with_odd_heads(name: str, length: int, tmp_path: Path) -> None:
    if not (SMALL / name).is_dir():
        pytest.skip(f"no model {name} under KVLOOM_DATA")
    model, tokenizer = load_model(str(SMALL / name))
    kit = Kit(tokenizer)
    recipes = {
        r: parse(r) for r in ("full", "snapkv(budget=96)", "kivi(bits=4, group=8, residual=32)", "h2o(budget=96)")
    }
    suite = replace(SUITES["small"], lengths=(length,), examples=1)
    with Results(tmp_path) as results:
        Run(name, model, tokenizer, recipes, suite, made_with(model, kit.text, 0), kit).go(results)
    records = load([tmp_path])
    assert len(records) == 6 * len(recipes)
    ran = {r.task for r in records if not r.error}
    assert "text/fidelity" in ran and all("too short" in r.error or r.score is not None for r in records)
    full = [r for r in records if r.recipe == "full" and not r.error]
    assert all(
        r.used > s.used
        for r in full
        for s in records
        if (s.task, s.recipe) == (r.task, "kivi(bits=4, group=8, residual=32)")
    )


def test_lengths_beyond_the_model_are_refused_before_work(nano: tuple[Any, Any]) -> None:
    model, tokenizer = nano
    kit = Kit(tokenizer)
    with pytest.raises(LabError, match="8192 positions"):
        Run("nano", model, tokenizer, {}, Suite("own", "", ("text/fidelity",), (9000,)), made(), kit)


def test_a_suite_leaves_out_lengths_beyond_a_model(nano: tuple[Any, Any]) -> None:
    assert SUITES["ruler"].within(nano[0].config).lengths == (4096, 8192)
    assert Suite("own", "", (), (9000,)).within(nano[0].config).lengths == (9000,)


def test_what_cannot_run_is_recorded_with_its_reason(nano: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = nano
    suite = replace(choose("text/fidelity"), lengths=(65,), examples=1)
    with Results(tmp_path) as results:
        Run("nano", model, tokenizer, {"full": parse("full")}, suite, made(), Kit(tokenizer)).go(results)
    (only,) = load([tmp_path])
    assert "too short" in only.error and only.score is None


def test_stages_name_what_a_recipe_lacks() -> None:
    assert stages(parse("full"))["compression"] == stages(parse("full"))["retrieval"] == "not applicable"
    assert stages(parse("snapkv | kivi(bits=4)"))["compression"] == "places slots and encodes"


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_tasks_that_exist(name: str) -> None:
    assert SUITES[name].names


def test_choices_are_checked() -> None:
    assert choose("text/*").names == choose("text").names
    for arguments, message in (
        (("nothing",), "unknown suite"), (("ruler/nothing",), "unknown task"), (("smoke", [10]), "--lengths"),
        (("smoke", None, 0), "--examples"), (("smoke", None, None, ["both"]), "unknown mode"),
    ):  # fmt: skip
        with pytest.raises(LabError, match=message):
            choose(*arguments)


METHOD = '''
from kvloom.core.recipe import Policy, Recipe
from kvloom.policies.budgets import Tokens
from kvloom.policies.placements import Keep
from kvloom.policies.scorers import Window

def mine(budget: int = 64):
    """Keeps what the last token looks at.

    Args:
        budget: slots.
    """
    return Recipe("mine", {"prompt": Policy(Tokens(budget, least=1), Keep(newest=1), Window(1, 1, "max"))})
'''


def test_a_recipe_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvloom.core import registry

    monkeypatch.setattr(registry.RECIPES, "factories", dict(registry.RECIPES.factories))
    monkeypatch.chdir(tmp_path)
    Path("my_method.py").write_text(METHOD)
    assert custom.parse("my_method.py:mine(budget=32) | kivi(bits=4)").name == "mine(budget=32) | kivi(bits=4)"
    main(
        [
            "lab",
            "run",
            "text/fidelity",
            "--lengths",
            "128",
            "--examples",
            "1",
            "--cache",
            "my_method.py:mine(budget=32)",
            "--out",
            "r",
            "--json",
        ]
    )
    shown = json.loads(capsys.readouterr().out)
    rows = {row["recipe"]: row for row in shown["models"][0]["recipes"]}
    assert rows["my_method.py:mine(budget=32)"]["smaller"] > 1.5
    with pytest.raises(RecipeError, match="does not exist"):
        custom.parse("other.py:mine")
    with pytest.raises(RecipeError, match="Did you mean 'mine'"):
        custom.parse("my_method.py:mime")


def test_commands_list_and_refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["lab", "suites", "--json"])
    assert {suite["name"] for suite in json.loads(capsys.readouterr().out)} == set(SUITES)
    main(["lab", "tasks", "--json"])
    assert len(json.loads(capsys.readouterr().out)) == len(TASKS)
    main(["lab", "tasks", "text/fidelity"])
    assert "fidelity" in capsys.readouterr().out
    for command in (
        ["lab", "run", "nothing"],
        ["lab", "report", str(tmp_path)],
        ["lab", "tasks", "nothing"],
        ["lab", "run", "smoke", "--text", str(tmp_path / "no")],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_errors_are_kvlooms_own() -> None:
    assert issubclass(LabError, KvloomError)

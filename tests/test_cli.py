"""The command line, run in this process with the bundled model on short texts."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from kvloom.cli import main
from kvloom.kernels import gpu, native
from kvloom.lab.demo import demo_task
from kvloom.lab.measure import load_model
from kvloom.lab.page import pareto

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Balanced(HTMLParser):
    """Counts tags and checks that each end tag closes what was opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_recipes_lists_all_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"full", "h2o", "kivi", "mikv", "razorattention", "snapkv", "streamingllm"} <= set(found)
    main(["recipes", "snapkv"])
    assert "2404.14469" in capsys.readouterr().out
    main(["recipes"])
    assert "snapkv" in capsys.readouterr().out


def test_doctor_names_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == (native.ISA or "torch")
    served = torch.cuda.is_available() and gpu.runs_on(torch.device("cuda", 0))
    assert ("triton" in found["GPU kernels"]) == served and found["GPU why"]
    assert (found["GPU"] == "none") == (not torch.cuda.is_available())
    main(["doctor"])
    assert "kernels" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "compare", "generate", "recipes", "check", "doctor", "calibrate", "load"])
def test_help_explains(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    assert "--json" in capsys.readouterr().out


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    words = "The house stood on a hill above the river. " * 20
    args = ["generate", "nano", "--cache", "snapkv(budget=64)", "--prompt", words, "--max-new-tokens", "4", "--json"]
    main(args)
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] > 100
    layers, heads, dim = 6, 2, 64
    assert found["cache"]["used"] < layers * heads * found["prompt_tokens"] * 2 * dim * 4


def test_compare_writes_table_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, page = tmp_path / "text.txt", tmp_path / "out" / "page.html"
    document.write_text("The magic number for <Anna> is 4711. She went home & slept. " * 25, encoding="utf-8")
    args = ["compare", "nano", "--cache", "streamingllm(window=60)", "--cache", "kivi(bits=2, residual=32)"]
    args += ["--document", str(document), "--question", "What is the magic number for <Anna>?", "--answer", "4711"]
    args += ["--question", "And <Anna>?", "--answer", "4711", "--max-new-tokens", "4", "--continuation", "8"]
    main([*args, "--out", str(page), "--json"])
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert [row["recipe"] for row in rows] == ["full", "streamingllm(window=60)", "kivi(bits=2, residual=32)"]
    assert rows[0]["kl"] == 0 and rows[0]["agreement"] == 1 and rows[0]["smaller"] == 1
    assert rows[1]["smaller"] > 2 and rows[2]["smaller"] > 2
    assert all(row["asked"] == 2 and row["used"] <= row["nbytes"] for row in rows)
    assert [a["turn"] for a in rows[1]["answers"]] == [1, 2]
    text = page.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and parser.seen.count("svg") == 1 and parser.seen.count("circle") == 3
    assert "prefers-color-scheme:dark" in text and "src=" not in text and "http" not in text
    assert "&lt;Anna&gt;" in text and "<Anna>" not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "nano", "--cache", "snapk", "--prompt", "x"], "snapkv"),
        (["generate", "nano"], "--prompt"),
        (["generate", "no/such folder", "--prompt", "x"], "no/such folder"),
        (["recipes", "nothing"], "Available"),
        (["calibrate", "nano", "--recipe", "kivi", "-o", "x"], "razorattention"),
    ],
)
def test_an_error_is_one_line_and_code_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert says in captured.err and captured.err.count("\n") == 1


def test_check_says_exact_lossy_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "nano", "--cache", "full", "--cache", "streamingllm(sinks=2, window=12)", "--json"])
    found = json.loads(capsys.readouterr().out)
    results = {recipe: {v["result"] for v in found if v["recipe"] == recipe} for recipe in {v["recipe"] for v in found}}
    assert results == {"full": {"exact"}, "streamingllm(sinks=2, window=12)": {"lossy"}}


def test_the_demo_document_holds_its_facts() -> None:
    _, tokenizer = load_model("nano")
    task = demo_task(tokenizer, tokens=700, seed=3, continuation=16)
    length = len(tokenizer.encode(task.document, add_special_tokens=False))
    assert 560 <= length <= 720
    for question in (*task.first, *task.later):
        key = question.text.removeprefix("What is the magic number for ").removesuffix("?")
        assert task.document.count(f"The magic number for {key} is {question.answer}.") == 1
    assert demo_task(tokenizer, tokens=700, seed=3, continuation=16) == task


def test_pareto_keeps_what_no_other_beats() -> None:
    from kvloom.lab.measure import Measured

    def row(name: str, used: int, kl: float) -> Measured:
        return Measured(name, 1, used, used, 1.0, 0.0, 0.0, 0, 0, kl, 1.0)

    rows = [row("full", 100, 0.0), row("good", 50, 0.1), row("bad", 60, 0.2), row("small", 10, 0.5)]
    assert [r.recipe for r in pareto(rows)] == ["small", "good", "full"]

"""`kvloom bench` with tiny sizes, in this process: every command runs, its JSON holds its rows, bad options are refused.

Nothing here looks at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvloom.bench import attention, caches, commands, decode, gpu, models, rooflines
from kvloom.cli import main
from kvloom.kernels import native
from tests.refusal import check


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small rooflines; of QuantizedCache only what needs no other package."""
    monkeypatch.setattr(rooflines, "VECTOR", 1 << 20)
    monkeypatch.setattr(rooflines, "SIDE", 64)
    for name in caches.PACKAGES:
        monkeypatch.delitem(caches.BACKENDS, name)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every progress bar: the steps that were announced, and those that came."""
    bars = []

    @contextlib.contextmanager
    def progress(total: int, live: bool = True) -> Iterator[Callable[[str], None]]:
        came: list[str] = []
        yield came.append
        bars.append((total, len(came)))

    monkeypatch.setattr(commands, "progress", progress)
    return bars


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    main(["bench", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_kernels(told: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "kernels", "--slots", "64,128", "--shape", "1x2x32", "--threads", "1", "--rounds", "2")
    assert found["kernels"] == (native.ISA or "torch") and found["rooflines"][0]["bandwidth"] > 0
    rows = [row for row in found["rows"] if row["slots"] == 64]
    assert len(found["rows"]) == 2 * len(rows) and {row["shape"] for row in rows} == {"1x2x32"}
    assert {"SDPA", "SDPA rows", "matmul", "fp8", "int4pack"} <= {row["way"] for row in rows}
    assert ("kvloom" in {row["way"] for row in rows}) == (native.ISA is not None)
    assert all(row["ms"] > 0 and row["of_roofline"] > 0 and row["ratio"] > 0 for row in rows)
    for row in rows:
        if f"{row['way']}, {row['stored']}" == row["against"]:
            assert row["ratio"] == 1
    assert all(total == came for total, came in told) and len(told) == 1


def test_kernels_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "kernels", "--slots", "64", "--shape", "1x2x32", "--threads", "1", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "int4pack" in out and "multiply-adds/s" in out and "torch" in out and "left out: int4" not in out


def test_all_ways_attend_to_the_same() -> None:
    shape, n = attention.Shape(2, 4, 64), 96
    with torch.inference_mode():
        found, _ = attention.ways(shape, n)
        outputs = {str(way): way.run().float() for way in found}
    right = outputs.pop("SDPA, fp32")
    assert outputs.pop("int4pack, 4 bit keys").shape == (shape.heads, shape.queries, n)
    allowed = {"fp32": 1e-5, "bf16": 0.02, "8 bits": 0.1, "4 bits": 0.2, "3 bits": 0.5, "2 bits": 1.0, "1 bit": 3.0}
    for name, out in outputs.items():
        assert (out - right).abs().max() <= allowed[name.rpartition(", ")[2]], name
    sizes = {str(way): way.nbytes for way in found}
    assert sizes["SDPA, fp32"] == 2 * 2 * n * 64 * 4
    if native.ISA is not None:
        numbers = 2 * 2 * n * 64
        assert sizes["kvloom, 4 bits"] == numbers // 2 + 2 * 2 * numbers // attention.GROUP


def test_int4pack_multiplies_the_keys() -> None:
    q, k = torch.randn(2, 4, 64), torch.randn(2, 96, 64)
    way = attention._int4pack(q, k)
    wanted = q @ k.transpose(1, 2) / 8
    assert (way.run().float() - wanted).abs().mean() < 0.1


def test_decode(told: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["random", "--tokens", "48", "64", "--cache", "full", "--cache", "kivi(bits=2, residual=32)"]
    arguments += ["--against", "StaticCache", "--against", "fp8", "--rounds", "1"]
    rows = run(capsys, "decode", *arguments)["rows"]
    names = ["DynamicCache", "full", "kivi(bits=2, residual=32)", "StaticCache", "QuantizedCache(fp8)"]
    assert [(row["tokens"], row["cache"]) for row in rows] == [(n, name) for n in (48, 64) for name in names]
    by = {row["cache"]: row for row in rows if row["tokens"] == 64}
    stock = 4 * 2 * 2 * 64 * 64 * 4 / 2**20
    assert by["DynamicCache"]["mib"] == stock and by["DynamicCache"]["ratio"] == 1
    assert stock / 4 <= by["QuantizedCache(fp8)"]["mib"] < stock < by["StaticCache"]["mib"]
    assert all(row["fastest"] <= row["ms"] <= row["slowest"] and row["bar"] is None for row in rows)
    assert all(total == came for total, came in told) and len(told) == 1


def test_decode_shows_bars_and_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError

    monkeypatch.setattr(models, "TOKENS", 32)
    monkeypatch.setitem(caches.BACKENDS, "hqq", {})
    monkeypatch.setattr(caches, "QuantizedCache", missing)
    main(["bench", "decode", "random", "--tokens", "32", "--cache", "full", "--against", "hqq", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "<= 1.10x" in out and "left out: hqq: not installed (pip install hqq)" in out


def test_decode_of_codecs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a recipe learns of a random model is made on the spot; those that can't take part are named."""
    names = caches.codecs(models.load("random"))
    assert {"kivi", "think", "xquant", "million", "cskv"} < set(names) and "snapkv" not in names
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(caches, "codecs", lambda model: ["think", "cskv", "xquant(across=True)"])
    monkeypatch.setattr(decode, "FAR", 64)
    found = run(capsys, "decode", "random", "--tokens", "64", "--codecs", "--rounds", "1")
    assert [row["cache"] for row in found["rows"]] == ["DynamicCache", "full", "think", "cskv"]
    assert [row["bar"] for row in found["rows"]] == [None, None, 1.0, 1.0]
    assert found["rows"][1]["full"] == 1 and found["left_out"][0].startswith("xquant(across=True): ")


def test_a_copied_cache_is_read_as_the_one_it_was_copied_from() -> None:
    model = models.load("random")
    ids, one = models.prompt(model, 40), models.prompt(model, 1, seed=2)
    source = DynamicCache(config=model.config)
    models.prefill(model, source, ids)
    with torch.inference_mode():
        copy = caches.copied(source, model, "StaticCache", room=48)
        logits = [model(one, past_key_values=cache).logits for cache in (source, copy)]
    torch.testing.assert_close(logits[1], logits[0])


def test_prefill(told: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "prefill", "random", "--tokens", "48", "--cache", "full", "--rounds", "1")
    assert (
        found["model"] == "random"
        and found["tokens"] == 48
        and [row["cache"] for row in found["rows"]] == ["DynamicCache", "full"]
    )
    assert all(row["seconds"] > 0 and row["bar"] is None for row in found["rows"])
    assert told == [(4, 4)]


@pytest.mark.parametrize(
    ("model", "cache", "tokens", "bar"),
    [("nano", "snapkv", 8192, 1.10), ("random", "snapkv", 8192, 1.05), ("random", "h2o(budget=0.1)", 8192, 1.60),
     ("random", "mikv", 8192, 1.60), ("random", "DynamicCache", 8192, None), ("random", "full", 4096, None),
     ("another", "full", 8192, None)],
)  # fmt: skip
def test_prefill_bars(model: str, cache: str, tokens: int, bar: float | None) -> None:
    from kvloom.bench.prefill import _bar

    assert _bar(model, cache, tokens) == bar


def test_memory(
    told: list[tuple[int, int]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvloom.bench import memory

    once = memory.peak("full", 48)  # the one process that is started here
    monkeypatch.setattr(memory, "peak", lambda name, tokens: once)
    found = run(capsys, "memory", "--tokens", "48", "--cache", "full")
    assert [row["cache"] for row in found["rows"]] == ["DynamicCache", "full"]
    assert all(row["peak"] >= row["before"] > 100 and row["ratio"] == 1 for row in found["rows"])
    assert told == [(2, 2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_gpu_says_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "gpu", "--slots", "64", "--batch", "1"])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    check(captured.err.splitlines()[-1], "GPU", torch.__version__, "kvloom bench kernels")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu(told: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "gpu", "--slots", "64,128", "--batch", "1,2", "--rounds", "2")
    assert len(found["rows"]) == 2 * 2 * 4 and found["device"] and found["copy"] > 0
    assert all(row["ms"] > 0 and row["of_copy"] > 0 and row["ratio"] > 0 for row in found["rows"])
    assert {row["way"] for row in found["rows"]} == {"SDPA, bf16", "kvloom, bf16", "kvloom, 4 bits", "kvloom, 2 bits"}
    assert all(row["ratio"] == 1 for row in found["rows"] if row["way"] == "SDPA, bf16")
    assert all(total == came for total, came in told) and len(told) == 1


def test_the_table_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows as a GPU would give them, shown; what did not fit is named."""
    rows = [
        gpu.Row(32, 131072, way, 2.0, 1e12, 0.5, ratio) for way, ratio in (("SDPA, bf16", 1.0), ("kvloom, 4 bits", 3.0))
    ]
    found = gpu.Gpu(rows, "a GPU", 2e12, ["batch 64, 131,072 slots: too little memory"])
    commands._show(found, found.notes(), False)
    out = capsys.readouterr().out
    assert "a GPU" in out and "131,072" in out and "3.00x" in out and "50%" in out and "1,000" in out
    assert "left out: batch 64" in out and "2,000 GB/s" in out


@pytest.mark.parametrize("command", ["kernels", "decode", "prefill", "memory", "gpu"])
def test_help_explains(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", command, "--help"])
    out = capsys.readouterr().out
    assert "--json" in out and "Example: kvloom bench" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["kernels", "--slots", "100"], ["--slots", "'100'", "multiple of 32"]),
        (["kernels", "--slots", ","], ["--slots", "','"]),
        (["kernels", "--slots", "8k"], ["--slots", "'8k'"]),
        (["kernels", "--shape", "2x4"], ["--shape", "'2x4'", "2x4x64"]),
        (["kernels", "--shape", "2x4x40"], ["--shape", "'2x4x40'", "multiple of 32"]),
        (["kernels", "--threads", "some"], ["--threads", "'some'", "'all'"]),
        (["kernels", "--rounds", "0"], ["--rounds", "0"]),
        (["decode", "random", "--tokens", "-1"], ["--tokens", "'-1'"]),
        (["decode", "random", "--tokens", "999999"], ["--tokens", "999999", "'random'"]),
        (["decode", "random", "--cache", "snapk"], ["'snapk'", "snapkv"]),
        (["decode", "random", "--against", "static"], ["--against", "'static'", "StaticCache"]),
        (["decode", "no/such folder"], ["'no/such folder'"]),
        (["prefill", "--tokens", "0"], ["--tokens", "0"]),
        (["memory", "--cache", "nothing"], ["'nothing'"]),
        (["gpu", "--slots", "100"], ["--slots", "'100'", "multiple of 32"]),
        (["gpu", "--batch", "none"], ["--batch", "'none'"]),
        (["gpu", "--rounds", "0"], ["--rounds", "0"]),
    ],
)
def test_a_bad_option_is_one_line_and_code_2(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    lines = captured.err.splitlines()
    check(lines[-1], *named)

"""`kvloom load` against a server whose delays are known; what it asks, and what it makes of traces."""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvloom.cli import main
from kvloom.engine.load import report, traces, work
from kvloom.engine.load.client import Client, Record
from kvloom.engine.load.http import Malformed, _chunks
from kvloom.engine.load.prompts import Prompts, words_of
from kvloom.engine.load.run import closed_loop, open_loop
from kvloom.engine.load.work import Ask, Lengths
from kvloom.errors import KvloomError
from tests.pages import parsed
from tests.servers import Server

NANO = Path(__file__).parents[1] / "kvloom" / "models" / "nano"
START = Callable[..., str]


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1) as found:
            return bool(found.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def start() -> Iterator[START]:
    """Starts a server with these options and gives its address; one process for each set of options."""
    up: dict[tuple[str, ...], Server] = {}

    def started(*options: str) -> str:
        if options not in up:
            command = [sys.executable, "-m", "tests.openai_like"]
            up[options] = Server(lambda port: [*command, str(port), *options], _answers)
            up[options].start()
        return f"http://127.0.0.1:{up[options].port}"

    yield started
    for server in up.values():
        server.kill()


def run(url: str, *options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["load", url, *options, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_times_are_the_servers(start: START, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = start("--first", "0.2", "--gap", "0.05", "--limit", "4096")
    page, rows = tmp_path / "new" / "load.html", tmp_path / "load.json"
    slo = ["--slo-ttft", "2000", "--slo-itl", "1000"]
    args = ["--concurrency", "4", "--requests", "12", "--output-tokens", "9", *slo, "-o", str(rows), "--out", str(page)]
    found = run(url, *args, capsys=capsys)
    assert found["completed"] == 12 and not found["errors"] and not found["short"]
    # never earlier than the server sends; later by what a busy machine adds
    for name, least in (("ttft_ms", 200), ("itl_ms", 50), ("e2e_ms", 200 + 8 * 50)):
        assert least * 0.9 < found[name]["p50"] < least * 2.5, (name, found[name])
        assert found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"] <= found[name]["max"]
    assert found["output_tokens"] == 12 * 9 and found["prompt_tokens"] == 12 * 512
    assert found["cached_tokens"] == 12 * 256 and found["tokens_an_arrival"] == 1
    assert found["goodput"]["met"] == 12 and found["goodput"]["slo_ms"] == {"ttft": 2000, "itl": 1000}
    each = json.loads(rows.read_text())["each"]
    assert len(each) == 12 and all(len(row["arrivals"]) == 9 and row["cached"] == 256 for row in each)
    html = parsed(page.read_text())
    assert html.charts == 3 and not html.outside and not html.open


def test_the_table_says_what_happened(start: START, capsys: pytest.CaptureFixture[str]) -> None:
    url = start("--first", "0.01", "--gap", "0.001", "--faults", "busy")
    main(["load", url, "--requests", "9", "--output-tokens", "4", "--concurrency", "1", "--slo-ttft", "9999"])
    out = capsys.readouterr().out
    assert (
        "first token" in out and "6 of 9 requests" in out and "3 failed: HTTP 429" in out and "too many requests" in out
    )
    assert "goodput" in out and "66.7% of requests" in out


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("cut", "cut short", "without saying so"),
        ("inside", "error in the stream", "out of memory"),
        ("plain", "no stream", "application/json"),
        ("hangs", "timeout", "0.5 s"),
    ],
)
def test_failures_are_told_apart(
    fault: str, kind: str, says: str, start: START, capsys: pytest.CaptureFixture[str]
) -> None:
    url = start("--first", "0.01", "--gap", "0.001", "--faults", fault)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "load",
                url,
                "--requests",
                "3",
                "--output-tokens",
                "8",
                "--timeout",
                "0.5" if fault == "hangs" else "60",
                "--json",
            ]
        )
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1 and found["completed"] == 0 and found["ttft_ms"] is None
    assert found["errors"][kind]["count"] == 3 and says in found["errors"][kind]["first"]


def test_events_in_halves_and_in_pairs(start: START, capsys: pytest.CaptureFixture[str]) -> None:
    halves = start("--first", "0.01", "--gap", "0.002", "--faults", "halves")
    assert run(halves, "--requests", "2", "--output-tokens", "8", capsys=capsys)["completed"] == 2
    pairs = start("--first", "0.01", "--gap", "0.002", "--faults", "pairs")
    found = run(pairs, "--requests", "2", "--output-tokens", "8", capsys=capsys)
    assert found["tokens_an_arrival"] == 2 and found["output_tokens"] == 16


def test_a_server_gets_what_it_takes(start: START, capsys: pytest.CaptureFixture[str]) -> None:
    url = start("--first", "0.01", "--gap", "0.001", "--faults", "text", "strict")
    found = run(
        url,
        "--requests",
        "2",
        "--tokenizer",
        str(NANO),
        "--output-tokens",
        "2",
        "--body",
        '{"top_k": 3, "temperature": null}',
        capsys=capsys,
    )
    assert found["completed"] == 2 and found["prompts"] == "text" and "ignore_eos" in found["notes"][0]
    with urllib.request.urlopen(f"{url}/seen") as answer:
        seen = json.load(answer)
    assert len(seen) == 2 and all(len(body["prompt"].split()) == 512 for body in seen)
    assert all(body["top_k"] == 3 and "temperature" not in body and "ignore_eos" not in body for body in seen)
    main(["load", url, "--requests", "2", "--output-tokens", "2"])
    assert "--tokenizer" in capsys.readouterr().out


def test_requests_are_sent_when_due(start: START) -> None:
    """An open loop doesn't wait for answers, a closed one does."""
    url = start("--first", "0.2", "--gap", "0.05", "--limit", "4096")
    drawn = Prompts(0, range(256, 512))

    async def both() -> tuple[list[Record], list[Record]]:
        async with Client(url) as client:
            await client.look([[5, 6]])
            asks = [Ask((work.own(i, 8),), 3, at=0.05 * i) for i in range(8)]
            return await open_loop(client, asks, drawn.tokens), await closed_loop(client, asks, drawn.tokens, 2)

    opened, closed = asyncio.run(both())
    starts = sorted(r.at for r in opened)
    assert all(at >= 0.05 * i - 0.001 and not r.error for i, (at, r) in enumerate(zip(starts, opened)))
    assert max(report.running(opened, [0.3])) > 3 and all(r.late < 0.5 for r in opened)
    times = np.linspace(0, max(r.at + r.took for r in closed), 50).tolist()
    assert len(closed) == 8 and 1 <= max(report.running(closed, times)) <= 2


def test_an_interrupted_run_keeps_what_it_has(start: START) -> None:
    url = start("--first", "0.2", "--gap", "0.05", "--limit", "4096")
    drawn = Prompts(0, range(256, 512))

    async def half(opened: bool) -> list[Record]:
        async with Client(url) as client:
            await client.look([[5, 6]])
            asks = [Ask((work.own(i, 8),), 2, at=0.3 * i) for i in range(50)]
            work_of = open_loop(client, asks, drawn.tokens) if opened else closed_loop(client, asks, drawn.tokens, 1)
            task = asyncio.create_task(work_of)
            await asyncio.sleep(1.5)
            task.cancel()
            return await task

    assert all(0 < len(asyncio.run(half(opened))) < 20 for opened in (True, False))


def test_seeds() -> None:
    def drawn(seed: int) -> tuple[list[Ask], list[list[int]]]:
        asks = work.synthetic(20, Lengths(10, 60), Lengths(5, 9), share=0.5, prefixes=2, seed=seed)
        asks = work.poisson(asks, 3.0, seed)
        prompts = Prompts(seed, range(100, 999))
        return asks, [prompts.tokens(ask) for ask in asks]

    assert drawn(7) == drawn(7)
    assert drawn(7)[0] != drawn(8)[0] and drawn(7)[1] != drawn(8)[1]
    asks, prompts = drawn(7)
    assert all(len(p) == a.prompt and 10 <= a.prompt <= 60 and 5 <= a.output <= 9 for a, p in zip(asks, prompts))
    gaps = np.diff([0.0, *(a.at for a in work.poisson(asks * 200, 3.0, 0))])
    assert abs(gaps.mean() * 3 - 1) < 0.06 and abs(gaps.std() * 3 - 1) < 0.08  # exponential: as much spread as mean
    for a, b in ((0, 2), (1, 3)):  # the same prefix as far as both go, then something else
        common = min(asks[a].spans[0][1], asks[b].spans[0][1])
        assert prompts[a][:common] == prompts[b][:common] and prompts[a][common:] != prompts[b][common:]
    assert prompts[0][:5] != prompts[1][:5]


def test_users_ask_again_over_their_contexts() -> None:
    asks = work.synthetic(64, Lengths(100, 100), Lengths(4, 4), share=0.9, users=32)
    prompts = [Prompts(0, range(1000)).tokens(ask) for ask in asks]
    assert len({tuple(p[:90]) for p in prompts}) == 32 and len({tuple(p) for p in prompts}) == 64
    assert prompts[3][:90] == prompts[35][:90]
    begins = work.warming(asks)
    assert [ask.spans for ask in begins] == [(ask.spans[0],) for ask in asks[:32]] and {
        ask.output for ask in begins
    } == {1}
    assert work.warming(work.synthetic(4, Lengths(9, 9), Lengths(1, 1))) == []


def test_text_and_token_ids_are_the_same_prompt() -> None:
    from tokenizers import Tokenizer

    ids, words = words_of(NANO)
    prompts, tokenizer = Prompts(3, ids, words), Tokenizer.from_file(str(NANO / "tokenizer.json"))
    for ask in work.synthetic(5, Lengths(300, 400), Lengths(1, 1), share=0.3):
        assert tokenizer.encode(prompts.text(ask), add_special_tokens=False).ids == prompts.tokens(ask)


def _trace(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def _row(**changed: Any) -> dict[str, Any]:
    return {"timestamp": 3000, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]} | changed


def test_a_trace_keeps_its_shared_blocks(tmp_path: Path) -> None:
    rows = (
        _row(timestamp=5000, input_length=1500, hash_ids=[0, 1, 7]),
        _row(),
        _row(timestamp=4000.5, hash_ids=[9, 1, 2]),
    )
    trace = traces.read(_trace(tmp_path / "t", *rows, "\n"))
    assert [row.at for row in trace.rows] == pytest.approx([0, 1.0005, 2]) and trace.timed
    asks, factor, left = traces.fit(trace, None)
    assert factor == 1 and not left and [a.prompt for a in asks] == [1100, 1100, 1500] and asks[0].output == 50
    first, other, last = (Prompts(0, range(5000)).tokens(ask) for ask in asks)
    assert first[:1024] == last[:1024] and first[1024:1100] != last[1024:1100]
    assert first[:512] != other[:512] and first[512:] == other[512:]
    asks, factor, left = traces.fit(trace, 400)
    assert factor == int(512 * 398 / 1550) / 512 and not left
    assert max(a.prompt + a.output for a in asks) <= 400
    assert all(
        abs(a.prompt - row.input * factor) < 1 and a.output == int(50 * factor) for a, row in zip(asks, trace.rows)
    )
    first, _, last = (Prompts(0, range(5000)).tokens(ask) for ask in asks)
    shared = 2 * round(512 * factor)
    assert first[:shared] == last[:shared] and first[shared:] != last[shared : len(first)]
    asks, factor, left = traces.fit(trace, 800, 0.5)
    assert factor == 0.5 and left == 0
    assert traces.fit(trace, 700, 0.5)[2] == 1
    for limit, scale, says in ((3, None, "--scale"), (100, 1.0, "smaller")):
        with pytest.raises(KvloomError, match=says):
            traces.fit(trace, limit, scale)


def test_lengths_alone_are_a_trace(tmp_path: Path) -> None:
    csv = _trace(
        tmp_path / "t.csv", "num_prefill_tokens,num_decode_tokens,pd_ratio\n", "74,918,0.08\n", "1402,711,1.9\n"
    )
    trace = traces.read(csv)
    assert not trace.timed and [(r.input, r.output) for r in trace.rows] == [(74, 918), (1402, 711)]
    asks, factor, _ = traces.fit(trace, 1024)
    assert factor == (1024 - 2) / 2113 and [a.prompt for a in asks] == [int(74 * factor), int(1402 * factor)]
    lines = _trace(tmp_path / "t", {"input_length": 5, "output_length": 6}, {"input_length": 7, "output_length": 8})
    assert not traces.read(lines).timed and len(traces.read(lines, 1).rows) == 1


def test_the_trace_that_ships(start: START, capsys: pytest.CaptureFixture[str]) -> None:
    trace = traces.read(traces.EXAMPLE)
    ids = [i for row in trace.rows for i in row.blocks]
    assert trace.timed and len(trace.rows) > 50 and len(set(ids)) < len(ids) / 2
    url = start("--first", "0.01", "--gap", "0.001", "--limit", "512")
    found = run(url, "--trace", "example", "--requests", "8", "--speed", "1000", capsys=capsys)
    assert found["completed"] == 8 and "512 tokens" in found["notes"][0] and "lengths x 0." in found["notes"][0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ("[1]", "no JSON object|not a JSON object"),
        ("[" * 100_000, "line 2"),
        (_row(input_length=0), "input_length"),
        (_row(input_length=10**9), "input_length"),
        (_row(output_length=2.5), "output_length"),
        (_row(output_length=True), "output_length"),
        (_row(timestamp=-1), "timestamp"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "timestamp"),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}', "timestamp"),
        (_row(hash_ids=[0, 1]), "hash_ids"),
        (_row(hash_ids=[0, 1, -2]), "hash id"),
        (_row(hash_ids=[0, 1, "2"]), "hash id"),
        (_row(hash_ids={"0": 1}), "hash_ids"),
        ('{"input_length": 1, "output_length": ' + "9" * 5000 + "}", "line 2"),
        (_row(more="x" * (1 << 20)), "line 2 is longer"),
        (b"\xff\xfe".decode("latin-1"), "line 2"),
    ],
)
def test_a_bad_line_is_named(line: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(KvloomError, match=says):
        traces.read(_trace(tmp_path / "t", _row(), line))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ftp://host"], "address"),
        (["http://host:port"], "address"),
        (["http://127.0.0.1:9"], "Is it up"),
        (["http://a", "--rate", "3", "--concurrency", "3"], "one of them"),
        (["http://a", "--rate", "0"], "--rate"),
        (["http://a", "--prompt-tokens", "9:3"], "--prompt-tokens"),
        (["http://a", "--trace", "nowhere"], "nowhere"),
        (["http://a", "--trace", "example", "--warm"], "synthetic"),
        (["http://a", "--users", "3"], "--prefix-share"),
        (["http://a", "--body", "[1]"], "--body"),
        (["http://a", "--token-ids", "9"], "--token-ids"),
        (["http://a", "--tokenizer", "nowhere"], "nowhere"),
        (["http://a", "--api-key", "a\nb"], "--api-key"),
    ],
)
def test_misuse(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["load", *arguments])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_percentiles_and_goodput() -> None:
    records = [
        Record(at=i, wanted=3, arrivals=[0.1 * i, 0.1 * i + 0.01, 0.1 * i + 0.03], took=0.1 * i + 0.05, tokens=3)
        for i in range(1, 101)
    ]
    found = report.summary(
        [*records, Record(at=0.0, took=1.0, error="HTTP 500", detail="x")], report.SLO(ttft=5001, itl=15.1)
    )
    assert found["ttft_ms"]["p50"] == pytest.approx(5050) and found["ttft_ms"]["p99"] == pytest.approx(9901)
    assert found["itl_ms"]["mean"] == pytest.approx(15) and found["itl_ms"]["p95"] == pytest.approx(20)
    assert found["seconds"] == pytest.approx(110.05) and found["output_tokens_per_second"] == pytest.approx(
        300 / 110.05, abs=1e-3
    )
    assert found["goodput"]["met"] == 50 and found["errors"] == {"HTTP 500": {"count": 1, "first": "x"}}
    json.dumps(found)  # plain numbers


def test_chunks_of_a_body() -> None:
    whole = b"head5\r\nabcde\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n"
    assert _chunks(whole, 4) == ([(7, 12), (21, 31)], True)
    assert _chunks(whole[:25], 4) == ([(7, 12), (21, 25)], False)
    assert not any(_chunks(whole[:n], 4)[1] for n in range(4, len(whole)))
    for bad in (b"xyz\r\n", b"-5\r\nabcde\r\n"):
        with pytest.raises(Malformed):
            _chunks(bad, 0)

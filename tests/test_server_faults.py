"""What goes wrong around a server: clients that leave, too many of them, an engine that fails, a stop in the middle."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from kvloom.engine.ask import Served
from tests.serving import TOY, Toy, serving

LONG = {"prompt": "One two three", "max_tokens": 200}


@pytest.fixture(scope="module")
def served(nano: Any) -> Served:
    return Served(names=["toy"], tokenizer=nano[1], vocabulary=TOY, context=1024, ends=[1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_memory_at_once(served: Served, stream: bool) -> None:
    toy = Toy(pause=0.02)
    with serving(toy, served) as site:
        url = httpx.URL(site.url)
        body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((url.host, url.port)) as line:
            line.sendall(head.encode() + body)
            site.until(lambda: len(toy.live) == 2 and toy.steps > 3)
        site.until(lambda: not toy.live and not site.runner.open, 2)
        assert len(toy.aborted) == 2 and toy.steps < 150
        assert site.runner.meter.finished["abort"] == 2


def test_too_many_get_429_and_come_in_later(served: Served) -> None:
    toy = Toy()
    with serving(toy, served, most=3) as site:
        toy.go.clear()
        with httpx.stream(
            "POST", f"{site.url}/v1/completions", json={**LONG, "n": 3, "stream": True}, timeout=20
        ) as first:
            site.until(lambda: len(toy.live) == 3)
            refused = httpx.post(f"{site.url}/v1/completions", json=LONG)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            toy.go.set()
            assert first.read().endswith(b"data: [DONE]\n\n")
        assert httpx.post(f"{site.url}/v1/completions", json=LONG).status_code == 200
        assert (
            'kvloom_requests_refused_total{model_name="toy",status="429"} 1.0' in httpx.get(f"{site.url}/metrics").text
        )


def test_a_full_queue_takes_all_choices_or_none(served: Served) -> None:
    toy = Toy(queue=3)
    with serving(toy, served) as site:
        refused = httpx.post(f"{site.url}/v1/completions", json={**LONG, "n": 4})
        assert refused.status_code == 429 and not toy.live and len(toy.aborted) == 3 and not site.runner.open
        assert httpx.post(f"{site.url}/v1/completions", json={**LONG, "n": 3}).status_code == 200


def test_a_step_that_fails_ends_its_requests_and_no_others(served: Served) -> None:
    with serving(Toy(fails=3), served) as site:
        failed = httpx.post(f"{site.url}/v1/completions", json=LONG)
        assert failed.status_code == 500 and "out of luck" in failed.json()["error"]["message"]
        assert httpx.post(f"{site.url}/v1/completions", json=LONG).status_code == 200
    with serving(Toy(fails=3), served) as site:
        told = httpx.post(f"{site.url}/v1/completions", json={**LONG, "stream": True}).text
        events = [event for event in told.split("\n\n") if event]
        assert "out of luck" in json.loads(events[-2].removeprefix("data: "))["error"]["message"]
        assert events[-1] == "data: [DONE]"


def test_an_engine_that_is_lost_is_reported(served: Served) -> None:
    class Lost(Toy):
        def abort(self, id: str) -> None:
            raise MemoryError("no way on")

    with serving(Lost(fails=2), served) as site:
        assert httpx.post(f"{site.url}/v1/completions", json=LONG).status_code == 500
        site.until(lambda: site.runner.failed)
        assert httpx.get(f"{site.url}/health").status_code == 503
        after = httpx.post(f"{site.url}/v1/completions", json=LONG)
        assert after.status_code == 503 and "no way on" in after.json()["error"]["message"]


def test_a_server_that_is_stopped_answers_what_it_took(served: Served) -> None:
    toy, found = Toy(pause=0.005), list[httpx.Response]()
    with serving(toy, served) as site:
        caller = threading.Thread(target=lambda: found.append(httpx.post(f"{site.url}/v1/completions", json=LONG)))
        caller.start()
        site.until(lambda: toy.steps > 5)
    caller.join()
    assert found[0].status_code == 200 and found[0].json()["usage"]["completion_tokens"] == 200
    assert not toy.live and toy.steps < 220


def test_what_does_not_end_in_time_is_cut(served: Served) -> None:
    from kvloom.engine.request import Request, Sampling
    from kvloom.engine.runner import Closed, Runner

    async def run() -> None:
        toy = Toy(pause=0.01)
        runner = Runner(toy)
        runner.start()
        stream = await runner.submit([Request([1, 2, 3], Sampling(max_tokens=10_000))])
        begin = time.monotonic()
        assert not await runner.drain(0.1) and time.monotonic() - begin < 2
        last = [output async for outputs in stream for output in outputs][-1]
        assert last.finish == "abort" and not toy.live
        with pytest.raises(Closed):
            await runner.submit([Request([1])])

    asyncio.run(run())


def test_a_slow_reader_costs_nothing(served: Served) -> None:
    toy = Toy()
    with serving(toy, served) as site:
        with httpx.stream("POST", f"{site.url}/v1/completions", json={**LONG, "stream": True}) as slow:
            site.until(lambda: toy.steps >= 200)
            parts = [json.loads(line[6:]) for line in slow.iter_lines() if line.startswith("data: {")]
        assert "".join(part["choices"][0]["text"] for part in parts).startswith("One two threeOne two three")


def test_nothing_runs_while_nothing_is_asked(served: Served) -> None:
    with serving(Toy(), served) as site:
        httpx.post(f"{site.url}/v1/completions", json=LONG)
        begin = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - begin < 0.2


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_streams_at_once_are_whole(served: Served, count: int) -> None:
    """Each over a line of its own; all the same as alone."""
    text = "one two three four five six seven eight nine ten "

    async def one(url: str, i: int) -> tuple[str, float]:
        prompt, begin, first, told = text[i % 30 :] * 4, time.monotonic(), 0.0, ""
        host = httpx.URL(url)
        reader, writer = await asyncio.open_connection(host.host, host.port)
        body = json.dumps({"prompt": prompt, "max_tokens": 32, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async for line in reader:
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - begin
                told += json.loads(line[6:])["choices"][0]["text"]
        writer.close()
        assert (prompt * 2).startswith(told) and len(told) > 60
        return told, first

    async def everyone(url: str) -> list[tuple[str, float]]:
        return await asyncio.gather(*(one(url, i) for i in range(count)))

    with serving(Toy(), served) as site:
        begin = time.monotonic()
        found = asyncio.run(everyone(site.url))
        seconds = time.monotonic() - begin
        firsts = sorted(first for _, first in found)
        print(
            f"{count} streams: {32 * count / seconds:.0f} tokens/s, p95 to the first token {firsts[int(0.95 * count)]:.2f} s"
        )
        assert len(found) == count and not site.runner.open

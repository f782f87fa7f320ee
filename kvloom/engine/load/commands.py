"""The command `kvloom load`."""

from __future__ import annotations

import asyncio
import json as json_
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console

from kvloom.engine.load import page, report, traces, work
from kvloom.engine.load.client import Client, Record, Server
from kvloom.engine.load.prompts import Prompts, words_of
from kvloom.engine.load.run import closed_loop, open_files, open_loop
from kvloom.engine.load.show import lines, progress, said, show
from kvloom.errors import KvloomError
from kvloom.lab.terminal import Json, print_json

__all__ = ["app"]

app = App(name="load")
MANY = 1024  # streams that an open loop is made ready for


def _positive(**given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise KvloomError(f"--{name.replace('_', '-')} {value} must be a number above 0.")


def _range(text: str) -> range:
    low, _, high = text.partition(":")
    try:
        found = range(int(low), int(high))
    except ValueError:
        found = range(0)
    if not found or found.start < 0 or found.stop > 1 << 24:
        raise KvloomError(f"--token-ids {text!r} is no range. Give the first id and one past the last, as 256:4000.")
    return found


@app.default
def load(
    url: str,
    *,
    trace: str | None = None,
    synthetic: Annotated[bool, Parameter(negative="")] = False,
    rate: float | None = None,
    concurrency: int | None = None,
    speed: float = 1.0,
    requests: int | None = None,
    prompt_tokens: str = "512",
    output_tokens: str = "64",
    prefix_share: float = 0.0,
    prefixes: int = 1,
    users: int = 0,
    warm: Annotated[bool, Parameter(negative="")] = False,
    scale: float | None = None,
    context: int | None = None,
    tokenizer: Path | None = None,
    token_ids: str = "256:4000",
    text: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    slo_ttft: float | None = None,
    slo_itl: float | None = None,
    slo_e2e: float | None = None,
    model: str | None = None,
    api_key: Annotated[str | None, Parameter(env_var="KVLOOM_API_KEY")] = None,
    body: str | None = None,
    timeout: float = 600.0,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    out: Annotated[Path | None, Parameter(help="Write the result as a self-contained HTML page to this file.")] = None,
    json: Json = False,
) -> None:
    """Put load on a server with OpenAI's completions API: how fast do answers come, and how many in time?

    Requests are drawn from a seed, so that two servers get the same ones. Each answer is streamed, greedy, and as long as
    asked for where the server knows `ignore_eos`. When requests come:

        --rate 5          five a second in the mean, at random, even if the
                          server falls behind (open loop)
        --concurrency 32  always 32; the next when one has ended (closed
                          loop); 8 by default
        --trace FILE      when the trace says, unless one of those is given

    What they ask: prompts of random tokens (the default), a part of which may be shared, or a trace's lengths and shared
    blocks. Times are from the sending of a request; one that fails is counted and not sent again.

    Start with:

        kvloom load http://127.0.0.1:8000

        kvloom load http://127.0.0.1:8000 --rate 2 --slo-ttft 500 --slo-itl 50

        kvloom load http://127.0.0.1:8000 --trace example --out load.html

    32 users, each over an own context of 7,000 tokens that is cached already:

        kvloom load http://127.0.0.1:8000 --users 32 --warm --concurrency 32
          --prompt-tokens 7040 --prefix-share 0.995 --output-tokens 256

    Args:
        url: Where the server is, with or without /v1.
        trace: JSON lines of Mooncake (timestamp, input_length, output_length, hash_ids), the same without times or
            blocks, comma-separated lengths of ShareGPT (num_prefill_tokens, num_decode_tokens), or "example".
        synthetic: Random prompts, not a trace. The default.
        rate: Requests a second.
        concurrency: Requests at a time.
        speed: How fast a trace's clock runs: 2 sends its requests in half the time.
        requests: How many; by default 100, or all that the trace has.
        prompt_tokens: Length of synthetic prompts: 512, or 64:512 for any in between.
        output_tokens: Length of their answers, in the same way.
        prefix_share: Part of each prompt that it has in common with others: 0.8.
        prefixes: How many different common parts there are.
        users: Each of so many users has that part as a context of the own, and asks over it again and again, in turn.
        warm: Send each common part once before, so that it is in the server's prefix cache; not measured.
        scale: Factor for a trace's lengths. By default 1, or less if the longest request exceeds the model's limit.
        context: The model's limit, if the server doesn't tell.
        tokenizer: The model's folder, or its tokenizer.json: prompts are words that are one token each, so that text
            has the length asked for and token ids are the same prompts.
        token_ids: Without a tokenizer, prompts are token ids from this range, first to one past the last.
        text: Send text, though the server would take token ids.
        seed: Another number gives other prompts, lengths and arrivals.
        slo_ttft: Most milliseconds to the first token; with it goodput is shown: requests that keep to every limit given.
        slo_itl: Most milliseconds between tokens, in the mean of a request.
        slo_e2e: Most milliseconds for the whole answer.
        model: Its name at the server; by default the first that it lists.
        api_key: Sent as a bearer token.
        body: JSON object of more fields for each request; null takes one out, as {"stream_options": null}.
        timeout: Seconds that a request may take.
        output: Write JSON with every request's times to this file.
    """
    _positive(rate=rate, concurrency=concurrency, speed=speed, requests=requests, prefixes=prefixes, scale=scale,
              context=context, timeout=timeout, slo_ttft=slo_ttft, slo_itl=slo_itl, slo_e2e=slo_e2e)  # fmt: skip
    if users < 0 or seed < 0:
        raise KvloomError(f"--users {users} and --seed {seed} must not be negative.")
    if rate is not None and concurrency is not None:
        raise KvloomError("--rate sends when it is time, --concurrency when an answer has ended: give one of them.")
    if trace is not None and synthetic:
        raise KvloomError("--trace or --synthetic: give one of them.")
    if trace is not None and (prefix_share or users or warm):
        raise KvloomError(
            "--prefix-share, --users and --warm are for synthetic prompts; a trace has its own shared blocks."
        )
    try:
        extra = json_.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise KvloomError(f"--body {body!r} is no JSON ({error}).") from error
    if not isinstance(extra, dict):
        raise KvloomError(f"--body {body!r} must be a JSON object of fields.")
    lengths = work.lengths(prompt_tokens, "--prompt-tokens"), work.lengths(output_tokens, "--output-tokens")
    ids = _range(token_ids)
    drawn: Prompts = Prompts(seed, *words_of(tokenizer)) if tokenizer else Prompts(seed, ids)
    parsed = None if trace is None else traces.read(traces.EXAMPLE if trace == "example" else Path(trace), requests)
    made = work.synthetic(requests or 100, *lengths, share=prefix_share, prefixes=prefixes, users=users, seed=seed)
    timed = parsed is not None and parsed.timed and rate is None and concurrency is None
    together = None if rate is not None or timed else concurrency or 8

    async def all_of_it() -> tuple[Server, list[str], list[work.Ask], list[Record]]:
        open_files(together or MANY)
        async with Client(url, model=model, key=api_key, seconds=timeout, extra=extra) as client:
            first = work.Ask((work.own(0, 4),), 1)
            server = await client.look([drawn.text(first)] if text else [drawn.tokens(first), drawn.text(first)])
            limit, notes = context or server.limit, []
            if parsed is not None:
                asks, factor, left = traces.fit(parsed, limit, scale)
                bound = f"the model's {limit:,} tokens" if limit else "a model whose limit nobody gave: see --context"
                notes.append(
                    f"lengths x {factor:.4g}, for {bound}" + (f"; {left:,} too long, left out" if left else "")
                )
                asks = [replace(ask, at=ask.at / speed) for ask in asks]
            else:
                asks = made
                if limit and max(ask.prompt + ask.output for ask in asks) > limit:
                    raise KvloomError(
                        f"--prompt-tokens and --output-tokens exceed the model's {limit:,} tokens together."
                    )
            if rate is not None:
                asks = work.poisson(asks, rate, seed)
            if not server.ids and tokenizer is None:
                notes.append("prompts are common words, about one token each; --tokenizer FOLDER makes lengths exact")
            if not server.unending:
                notes.append("the server doesn't know ignore_eos: answers may end early")
            for note in notes:
                Console(stderr=True).print(note, style="dim", highlight=False, markup=False)
            render = drawn.tokens if server.ids else drawn.text
            if warm and (begins := work.warming(asks)):
                with progress(len(begins)) as tell:
                    failed = [r for r in await closed_loop(client, begins, render, together or 8, tell) if r.error]
                if failed:
                    raise KvloomError(
                        f"--warm: {len(failed)} of {len(begins)} failed: {failed[0].error} {failed[0].detail}"
                    )
            with progress(len(asks)) as tell:
                if together is None:
                    return server, notes, asks, await open_loop(client, asks, render, tell)
                return server, notes, asks, await closed_loop(client, asks, render, together, tell)

    server, notes, asks, records = asyncio.run(all_of_it())
    if len(records) < len(asks):
        notes.append(f"interrupted: {len(asks) - len(records):,} of {len(asks):,} requests have no result")
    when = (
        f"{together} at a time"
        if together
        else f"{rate:g} a second"
        if rate
        else f"at the trace's times, x {1 / speed:g}"
    )
    what = f"trace {trace}" if trace else f"prompts of {prompt_tokens} tokens, answers of {output_tokens}"
    if prefix_share:
        whose = f"the context of one of {users} users" if users else f"one of {prefixes} prefixes"
        what += f", {prefix_share:.1%} of a prompt is {whose}"
    about: dict[str, Any] = {
        "url": url, "model": server.model, "what": what, "when": when, "seed": seed,
        "prompts": "token ids" if server.ids else "text", "notes": notes,
    }  # fmt: skip
    found = report.summary(records, report.SLO(slo_ttft, slo_itl, slo_e2e))
    if output is not None:
        _write(output, json_.dumps(about | found | {"each": report.rows(records)}))
    if out is not None:
        _write(out, page.html(records, found, "kvloom load", [said(about)], notes + lines(found)))
    print_json(about | found) if json else show(about, found, notes, [path for path in (output, out) if path])
    if not found["completed"]:
        sys.exit(1)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")

"""How evenly answers of `kvloom serve` flow while long prompts are read, by the tokens of a step (`kvloom serve --chunk`).

    python benchmarks/peers/serving_arrivals.py [--chunk 256 512 8192] [--talkers 8] [--output FILE]

Clients ask short questions with answers of 256 tokens, one after another; meanwhile another one sends prompts of 7,000 tokens,
each as soon as the last is read. A chunk larger than those reads them whole, as an engine without chunked prefill does: what it
gains in tokens per second is what smaller chunks cost. Bar: p99 of the time between tokens at most 3 times its median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import serving

from kvloom.engine.load import report, work
from kvloom.engine.load.client import Client, Record
from kvloom.engine.load.prompts import Prompts, words_of
from kvloom.engine.load.run import closed_loop

BAR = 3.0


async def measure(url: str, prompts: Prompts, talkers: int, rounds: int, long: int, answer: int) -> dict[str, Any]:
    """Talkers alone, then with long prompts beside them. Times in milliseconds, rates per second."""
    short, most = (work.Lengths(n, n) for n in (128, answer))
    asks = work.synthetic(talkers * rounds * 2, short, most)
    books = [work.Ask((work.own((1 << 40) + i, long),), 1) for i in range(10_000)]
    async with Client(url, seconds=1800) as client:
        await client.look([prompts.text(books[-1])[:60]])
        alone = await closed_loop(client, asks[: len(asks) // 2], prompts.text, talkers)
        reader = asyncio.create_task(closed_loop(client, books, prompts.text, 1))
        beside = await closed_loop(client, asks[len(asks) // 2 :], prompts.text, talkers)
        reader.cancel()
        read = await reader
    for record in (*alone, *beside, *read):
        if record.error:
            raise RuntimeError(f"{record.error} {record.detail}")
    calm, busy = report.summary(alone), report.summary(beside)
    tokens = long * _share(read, busy["seconds"]) + busy["output_tokens"] + sum(r.prompt or 0 for r in beside)
    return {
        "alone_itl_ms": calm["itl_ms"], "itl_ms": busy["itl_ms"], "ratio": busy["itl_ms"]["p99"] / busy["itl_ms"]["p50"],
        "read": len(read), "ttft_of_long_ms": report.percentiles(r.first for r in read),
        "tokens_per_second": tokens / busy["seconds"], "answers_per_second": busy["output_tokens_per_second"],
    }  # fmt: skip


def _share(read: Sequence[Record], seconds: float) -> float:
    """Long prompts read, the one that was cut off by as much as its time: its kind takes as long as the others' median."""
    if not read:
        return 0.0
    end, each = max(r.at + r.took for r in read), sorted(r.took for r in read)[len(read) // 2]
    return len(read) + min(1.0, max(0.0, seconds - end) / each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", nargs="+", type=int, default=[256, 512, 8192])
    parser.add_argument("--cache", default="full")
    parser.add_argument("--talkers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4, help="answers of each talker")
    parser.add_argument("--long", type=int, default=7000)
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--model", type=Path, default=serving.REPOSITORY / "kvloom" / "models" / "nano")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with this program
    prompts, rows = Prompts(0, *words_of(given.model)), []
    with tempfile.TemporaryDirectory() as temporary:
        model = serving.plain(given.model, Path(temporary) / "model", given.dtype)
        for chunk in given.chunk:
            side = serving.kvloom(given.cache, "--chunk", str(chunk))
            kind = serving.WORK["short"]
            place = serving.Place(model, serving.free_port(), given.threads, given.dtype, 2, kind, given.talkers + 1)
            with serving.served(side, place, Path(sys.executable), Path(temporary) / "log", 600) as url:
                found = asyncio.run(measure(url, prompts, given.talkers, given.rounds, given.long, given.answer))
            rows.append({"chunk": chunk, **found})
            said = f"alone p50 {found['alone_itl_ms']['p50']:,.0f} ms; with long prompts p50 {found['itl_ms']['p50']:,.0f}, "
            said += f"p99 {found['itl_ms']['p99']:,.0f}: {found['ratio']:.1f}x, {'keeps' if found['ratio'] <= BAR else 'MISSES'} {BAR:g}x; "
            said += f"{found['tokens_per_second']:,.0f} tokens/s read and written"
            print(f"chunk {chunk}: {said}")
    whole = rows[-1]["tokens_per_second"]
    for row in rows[:-1]:
        print(
            f"chunk {row['chunk']} costs {1 - row['tokens_per_second'] / whole:.1%} of the throughput of {rows[-1]['chunk']}"
        )
    if given.output is not None:
        given.output.write_text(json.dumps({"cache": given.cache, "dtype": given.dtype, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

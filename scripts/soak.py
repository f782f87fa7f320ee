"""Twenty minutes of load on `kvloom serve nano`, and whether its memory stays flat: `make soak`, or ARGS="60" for a minute.

Requests of all lengths come, some with common beginnings; a part is cut off. Ends with 1 if the server's memory grew by more than
a twentieth from the second quarter to the last, if an answer failed, or if caches hold memory when nothing runs.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import psutil

GROWTH = 1.05
CLIENTS = 12


def post(url: str, body: dict[str, object], most: int) -> int:
    """Streams an answer; lets go behind so many lines. Returns how many came."""
    asked = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    lines = 0
    with urllib.request.urlopen(asked, timeout=300) as answer:
        for line in answer:
            lines += line.startswith(b"data:")
            if lines >= most:
                break
    return lines


def ask(url: str, end: float, seed: int, failed: list[str]) -> None:
    draw = random.Random(seed)
    shared = [draw.randrange(10, 3000) for _ in range(1500)]
    while time.time() < end:
        n = draw.choice((20, 200, 600, 1500))
        tokens = shared[: n // 2] * draw.randrange(2) + [draw.randrange(10, 3000) for _ in range(n // 2)]
        body = {"model": "nano", "prompt": tokens, "max_tokens": draw.randrange(1, 80), "stream": True, "seed": seed}
        try:
            post(url, body, draw.choice((3, 1 << 30, 1 << 30)))
        except OSError as error:
            failed.append(repr(error))


def stats(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/stats", timeout=30) as answer:
        found: dict[str, float] = json.load(answer)
    return found


def sampled(process: psutil.Process, end: float) -> Iterator[float]:
    while time.time() < end:
        yield process.memory_info().rss
        time.sleep(min(5.0, max(0.1, end - time.time())))


def main(seconds: float) -> int:
    command = [sys.executable, "-m", "kvloom", "serve", "nano", "--port", "0", "--kv-memory", "64MiB"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        url = next(word.split("/v1")[0] for line in server.stdout for word in line.split() if "/v1" in word)
        threading.Thread(target=server.stdout.read, daemon=True).start()
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        end, failed = time.time() + seconds, list[str]()
        clients = [threading.Thread(target=ask, args=(url, end, i, failed)) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        memory = list(sampled(psutil.Process(server.pid), end))
        for client in clients:
            client.join()
        time.sleep(1)
        quarter = max(1, len(memory) // 4)
        before, after = max(memory[quarter : 2 * quarter]), max(memory[-quarter:])
        left = stats(url)
        grown = after / before
        print(
            f"memory {before / 2**20:,.0f} -> {after / 2**20:,.0f} MiB ({grown:.3f} times), {len(failed)} failed",
            failed[:3],
        )
        print("at rest:", {name: left[name] for name in ("running", "waiting") if name in left})
        return int(grown > GROWTH or bool(failed) or bool(left.get("running")) or bool(left.get("waiting")))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 1200))

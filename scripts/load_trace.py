"""Makes kvloom/engine/load/example.jsonl, the trace that `kvloom load --trace example` sends, in Mooncake's form.

    python scripts/load_trace.py > kvloom/engine/load/example.jsonl

Twenty people talk with an assistant for two minutes: all prompts begin with one system prompt of 512 tokens, a turn holds all
turns before it, and pauses are exponential. Invented, not recorded.
"""

from __future__ import annotations

import json
import random
from typing import Any

BLOCK, PEOPLE, SECONDS = 512, 20, 120.0


def main() -> None:
    """Prints the trace."""
    drawn, blocks = random.Random(0), 0
    rows: list[dict[str, Any]] = []
    for _ in range(PEOPLE):
        at, length, ids = drawn.uniform(0, SECONDS * 0.7), BLOCK + drawn.randint(100, 3000), [0]
        while at < SECONDS:
            ids = ids[: length // BLOCK + 1]
            while len(ids) < -(-length // BLOCK):
                blocks += 1
                ids.append(blocks)
            answer = drawn.randint(20, 300)
            rows.append(
                {"timestamp": round(at * 1000), "input_length": length, "output_length": answer, "hash_ids": [*ids]}
            )
            if length % BLOCK:  # a block that was not full becomes another one
                ids.pop()
            length += answer + drawn.randint(20, 400)
            at += 5 + drawn.expovariate(1 / 20)
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        print(json.dumps(row, separators=(", ", ": ")))


if __name__ == "__main__":
    main()

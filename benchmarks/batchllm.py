"""An offline batch whose beginnings don't fit into memory: BatchLLM's order beside first come, first served with LRU.

python benchmarks/batchllm.py [--texts 12] [--questions 6] [--length 1024] [--answer 16] [--share 0.25]
"""

from __future__ import annotations

import argparse
import random
import time

import torch

from kvloom.engine.batch import BatchLLM
from kvloom.engine.engine import Engine
from kvloom.engine.request import Request, Sampling
from kvloom.engine.scheduler import Sarathi
from kvloom.lab.measure import load_model


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("texts", 12), ("questions", 6), ("length", 1024), ("answer", 16), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--share", type=float, default=0.25, help="memory, as a share of what all beginnings take")
    parser.add_argument("--cache", default="full")
    parser.add_argument("--model", default="nano")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, _ = load_model(args.model)
    draw, vocabulary = random.Random(0), model.config.vocab_size
    heads = [[draw.randrange(10, vocabulary) for _ in range(args.length)] for _ in range(args.texts)]
    prompts = [
        head + [draw.randrange(10, vocabulary) for _ in range(40)] for head in heads for _ in range(args.questions)
    ]
    draw.shuffle(prompts)
    probe = Engine(model, args.cache).outline("")
    memory = int(
        max(args.share * args.texts * probe.nbytes(args.length), 2.2 * probe.more(0, args.length + 40 + args.answer))
    )
    print(
        f"{len(prompts)} prompts of {args.length + 40} tokens over {args.texts} texts, {memory / 2**20:.0f} MiB, {args.cache}"
    )
    best: dict[str, float] = {}
    for _ in range(args.rounds):
        for scheduler in (Sarathi(rows=1024), BatchLLM(rows=1024)):
            name = type(scheduler).__name__
            engine = Engine(model, args.cache, memory=memory, scheduler=scheduler)
            requests = [
                Request(x, Sampling(max_tokens=args.answer, temperature=0.0), id=str(i)) for i, x in enumerate(prompts)
            ]
            begun, spent = time.perf_counter(), time.process_time()
            for request in scheduler.plan(requests, engine.part) if isinstance(scheduler, BatchLLM) else requests:
                engine.add(request)
            tokens = 0
            while engine.busy:
                for out in engine.step():
                    assert not out.error, out.error
                    tokens += out.token is not None
            wall, spent = time.perf_counter() - begun, time.process_time() - spent
            stats = engine.stats()
            computed = stats["prefix_queries"] - stats["prefix_hits"]
            print(
                f"{name:10} {wall:7.1f} s, {spent:7.1f} s of CPU, {computed:,} of {stats['prefix_queries']:,} prompt tokens computed, "
                f"{stats['preempted']} preempted, {stats['steps']} steps, {tokens} tokens"
            )
            best[name] = min(best.get(name, spent), spent)
    print(f"BatchLLM over first come, first served with LRU: {best['Sarathi'] / best['BatchLLM']:.2f}x (CPU time)")


if __name__ == "__main__":
    main()

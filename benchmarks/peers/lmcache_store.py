"""LMCache 0.5.6 and kvloom side by side on one machine: file tiers, MB/s and what becomes of damaged files.

    python benchmarks/peers/lmcache_store.py [--env FOLDER] [--folder FOLDER] [--chunks 8] [--rounds 5] [--json]

Makes an environment in FOLDER (a temporary one by default, reused if it is there) with lmcache==0.5.6, what it needs on a
machine without a GPU, and torch; then runs itself in it. Needs a package index, no GPU. Both sides run in one process and
take turns. LMCache's side are the file adapters of its server ("fs" in Python, "fs_native" in C++ with 4 threads), called as
the server calls them, from host memory to host memory: what its server, network and GPU copies add is not in the figures.

Chunks are 256 tokens of a Llama-3.1-8B in bf16: 32 MiB. kvloom verifies what it reads, and syncs what it writes to the
disk; LMCache does neither, so kvloom's `put` is also given without the sync.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
VERSION = "0.5.6"
# What its modules for a CPU import. The wheel's other requirements are CUDA's libraries, several GB, and cloud clients.
NEEDS = [
    "aiofiles",
    "aiofile",
    "aiohttp",
    "blake3",
    "cachetools",
    "cryptography",
    "fastapi",
    "httpx",
    "httptools",
    "msgspec",
    "numba",
    "numpy<=2.2.6",
    "nvtx",
    "opentelemetry-api<=1.40.0,>=1.20.0",
    "opentelemetry-sdk>=1.20.0",
    "opentelemetry-exporter-otlp>=1.20.0",
    "opentelemetry-exporter-prometheus<=0.61b0,>=0.50b0",
    "prometheus_client<=0.24.1,>=0.18.0",
    "protobuf<7,>=6.31.1",
    "psutil",
    "py-cpuinfo",
    "pyyaml",
    "pyzmq>=25.0.0",
    "redis",
    "safetensors",
    "setuptools<81.0.0,>=77.0.3",
    "sortedcontainers",
    "transformers>=5.17,<6",
    "uvicorn",
    "sympy",
    "networkx",
    "jinja2",
    "fsspec",
    "filelock",
    "typing_extensions",
    "obstore",
    "xxhash",
    "zstandard",
]
LAYERS, HEADS, DIM, TOKENS = 32, 8, 128, 256
SIZE = 2 * LAYERS * HEADS * DIM * TOKENS * 2  # bytes of a chunk


def make(folder: Path) -> Path:
    """The Python of an environment with LMCache."""
    python = folder / "bin" / "python"
    marker = folder / f"lmcache-{VERSION}"
    if not marker.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = str(REPOSITORY / "constraints" / "base.txt")
        subprocess.run([str(python), str(REPOSITORY / "scripts" / "install_torch.py"), pins], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *NEEDS], check=True)
        subprocess.run([*pip, "--no-deps", f"lmcache=={VERSION}"], check=True)
        marker.touch()
    return python


class LMCache:
    """One of its file adapters."""

    def __init__(self, kind: str, folder: Path) -> None:
        from lmcache.v1.distributed.api import ObjectKey
        from lmcache.v1.distributed.l2_adapters import fs_l2_adapter, fs_native_l2_adapter
        from lmcache.v1.multiprocess.token_hasher import TokenHasher

        self.name, self.folder, self._key = f"LMCache {kind}", folder, ObjectKey
        if kind == "fs":
            self.adapter = fs_l2_adapter.FSL2Adapter(fs_l2_adapter.FSL2AdapterConfig(str(folder)))
        else:
            config = fs_native_l2_adapter.FSNativeL2AdapterConfig(str(folder))
            self.adapter = fs_native_l2_adapter._create_fs_native_l2_adapter(config)
        self.hasher = TokenHasher(TOKENS)

    def keys(self, tokens: list[int], **other: str) -> list[Any]:
        """`other`: what differs from the usual. Data type and layout have no place in its keys."""
        model = other.get("weights", "llama")
        hashes = [self.hasher.hash_to_bytes(h) for h in self.hasher.compute_chunk_hashes(tokens)]
        return [self._key(h, model, 1 << 24, cache_salt=other.get("salt", "")) for h in hashes]

    @staticmethod
    def room(flat: Any) -> Any:
        """Its object around a tensor's bytes."""
        import torch
        from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

        shape = torch.Size((2, LAYERS, TOKENS, HEADS * DIM))
        meta = MemoryObjMetadata(shape, flat.dtype, 0, SIZE, 1, fmt=MemoryFormat.KV_2LTD)
        return TensorMemoryObj(flat.view(torch.uint8), meta, None)

    def _wait(self, poll: Callable[[], Any]) -> Any:
        while (found := poll()) is None:
            time.sleep(0.0001)
        return found

    def store(self, keys: list[Any], flats: list[Any]) -> None:
        task, done = self.adapter.submit_store_task(keys, [self.room(flat) for flat in flats]), {}
        while task not in done:
            done |= self.adapter.pop_completed_store_tasks()
            time.sleep(0.0001)

    def lookup(self, keys: list[Any]) -> int:
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        found = len(self._wait(lambda: self.adapter.query_lookup_and_lock_result(task)).get_indices_list())
        self.adapter.submit_unlock(keys)
        return found

    def retrieve(self, keys: list[Any], flats: list[Any]) -> list[bool]:
        task = self.adapter.submit_load_task(keys, [self.room(flat) for flat in flats])
        hits = self._wait(lambda: self.adapter.query_load_result(task)).get_indices_list()
        return [i in hits for i in range(len(keys))]

    def remove(self, keys: list[Any]) -> None:
        self.adapter.delete(keys)
        for path in self.files():  # it may do so later; the next round is to find a free disk
            path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        return list(self.folder.rglob("*.data"))

    def close(self) -> None:
        self.adapter.close()


class KVLoom:
    """The file tier."""

    def __init__(self, kind: str, folder: Path) -> None:
        from kvloom.store import Store

        self.name, self.folder, self.sync = f"kvloom {kind}".strip(), folder, kind != "without sync"
        self.kept = Store.open(f"file://{folder}", deadline=600.0)

    def keys(self, tokens: list[int], **other: Any) -> list[Any]:
        from kvloom.store import Identity, chunk_keys

        layout = other.pop("layout", ((HEADS, DIM, DIM),) * LAYERS)
        fields = {"weights": "llama", "tokenizer": "llama", "dtype": "bfloat16"} | other
        return chunk_keys(Identity(layout=layout, **fields), tokens, TOKENS)

    @staticmethod
    def _tensors(flat: Any) -> dict[Any, Any]:
        from kvloom.store import Place

        halves = flat.view(2, LAYERS, HEADS, TOKENS, DIM)
        return {Place(i, name): halves[n, i] for n, name in enumerate(("key", "value")) for i in range(LAYERS)}

    def store(self, keys: list[Any], flats: list[Any]) -> None:
        sync = os.fsync
        os.fsync = sync if self.sync else lambda _: None
        try:
            for key, flat in zip(keys, flats):
                assert self.kept.put(key, self._tensors(flat))
        finally:
            os.fsync = sync

    def lookup(self, keys: list[Any]) -> int:
        return int(self.kept.match(keys))

    def retrieve(self, keys: list[Any], flats: list[Any]) -> list[bool]:
        return [self.kept.get(key, into=self._tensors(flat)) is not None for key, flat in zip(keys, flats)]

    def remove(self, keys: list[Any]) -> None:
        for key in keys:
            self.kept.delete(key)

    def files(self) -> list[Path]:
        return list(self.folder.glob("chunks/*/*"))

    def close(self) -> None:
        self.kept.close()


SIDES: dict[str, Callable[[Path], Any]] = {
    "LMCache fs": lambda folder: LMCache("fs", folder),
    "LMCache fs_native": lambda folder: LMCache("fs_native", folder),
    "kvloom": lambda folder: KVLoom("", folder),
    "kvloom without sync": lambda folder: KVLoom("without sync", folder),
}


def speed(folder: Path, chunks: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, in which the sides take turns: MB/s (10**6) of store and retrieve, lookups per second."""
    import torch

    flats = [torch.randint(-999, 999, (SIZE // 2,)).to(torch.bfloat16) for _ in range(chunks)]
    rooms = [torch.zeros_like(flat) for flat in flats]
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in SIDES}
    sides = {name: make_side(folder / name) for name, make_side in SIDES.items()}
    for turn in range(rounds + 1):  # the first is not counted
        for name, side in sides.items():
            keys = side.keys([turn, *range(chunks * TOKENS - 1)])
            read = partial(side.retrieve, keys, rooms)
            steps = {"store": partial(side.store, keys, flats), "lookup": partial(side.lookup, keys)}
            steps |= {"retrieve, cached": read, "retrieve, from disk": read}
            for step, do in steps.items():
                if step == "retrieve, from disk":
                    os.sync()
                    for path in side.files():
                        with open(path, "rb") as file:
                            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                before = time.perf_counter()
                found = do()
                seconds = time.perf_counter() - before
                amount = chunks if step == "lookup" else chunks * SIZE / 1e6
                if turn:
                    taken[name].setdefault(step, []).append(amount / seconds)
                if step.startswith("retrieve"):
                    assert all(found) and all(torch.equal(a, b) for a, b in zip(flats, rooms)), (name, step)
                    for room in rooms:
                        room.zero_()
                elif step == "lookup":
                    assert found == chunks, (name, found)
            side.remove(keys)
    for side in sides.values():
        side.close()
    return {name: {step: statistics.median(x) for step, x in steps.items()} for name, steps in taken.items()}


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    at = len(data) // 2
    if how == "a flipped bit":
        data[at] ^= 1
    elif how == "a zeroed page":
        data[at : at + 4096] = bytes(4096)
    elif how == "a shorter file":
        del data[at:]
    elif how == "a longer file":
        data += bytes(64)
    path.write_bytes(data)


DAMAGE = ("a flipped bit", "a zeroed page", "a shorter file", "a longer file")
OTHERS: dict[str, dict[str, Any]] = {
    "written as fp16, read as bf16": {"dtype": "float16"},
    "written with another head layout": {"layout": ((4, 2 * DIM, 2 * DIM),) * LAYERS},
    "written by other weights of that name": {"weights": "llama"},
    "written by another tenant": {"salt": "another tenant's"},
}


def corruption(folder: Path) -> dict[str, dict[str, str]]:
    """What a reader gets. Where another writer differs by what has no place in a side's keys, it writes under the same one."""
    import torch

    torch.manual_seed(0)
    ours, theirs = (torch.randn(SIZE // 2).to(torch.bfloat16) for _ in range(2))
    found: dict[str, dict[str, str]] = {}
    for name in ("LMCache fs", "LMCache fs_native", "kvloom"):
        for case in (*DAMAGE, *OTHERS):
            place = folder / "corruption"
            side = SIDES[name](place)
            key = side.keys(list(range(TOKENS)))
            if case in DAMAGE:
                side.store(key, [ours])
                _damage(side.files()[0], case)
            else:
                other = dict(OTHERS[case])
                if case.startswith("written by other weights") and isinstance(side, KVLoom):
                    other["weights"] = "fingerprint of others"  # `Identity.weights` is a fingerprint, not a name
                side.store(side.keys(list(range(TOKENS)), **other), [theirs])
            room = torch.zeros_like(ours)
            hit = side.retrieve(key, [room])[0]
            exact = torch.equal(room.view(torch.uint8), ours.view(torch.uint8))
            found.setdefault(case, {})[name] = "miss" if not hit else "hit, exact" if exact else "HIT, OTHER NUMBERS"
            side.close()
            shutil.rmtree(place)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "kvloom-lmcache")
    parser.add_argument("--folder", type=Path, help="where chunks are written; default: a temporary folder")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.inside:
        paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = os.environ | {"PYTHONPATH": paths, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "ERROR"}
        command = [str(make(given.env)), __file__, *sys.argv[1:], "--inside"]
        sys.exit(subprocess.run(command, env=environment).returncode)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        table, rates = corruption(Path(folder)), speed(Path(folder), given.chunks, given.rounds)
    if given.json:
        print(json.dumps({"lmcache": VERSION, "rates": rates, "corruption": table}, indent=2))
        return
    for case, row in table.items():
        print(f"{case:40}", *(f"{name}: {what}" for name, what in row.items()), sep="  ")
    for name, steps in rates.items():
        print(f"{name:40}", *(f"{step}: {rate:,.0f}" for step, rate in steps.items()), sep="  ")


if __name__ == "__main__":
    main()

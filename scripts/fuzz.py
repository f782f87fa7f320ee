"""Damages frames of the store at random: `python scripts/fuzz.py [MUTATIONS | SECONDSs] [SEED]`, as in 1000000 or 60s.

Half of the damage is blind. The other half forges: it changes the header, or what a page holds, and then mends the checksums, as
an attacker or a broken writer could, which tests the limits behind them, and the decoders. Blind damage has to be refused; forgeries may pass as other
frames, but never cost more memory than the limit, nor raise anything but DamagedFrame. It runs in a process of its own with
little address space: a crash, a hang and an allocation that is too large fail, and leave the frame in a file.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import xxhash

from kvloom.errors import DamagedFrame
from kvloom.store.cachegen import FORMS, CacheGen
from kvloom.store.coding import CODINGS
from kvloom.store.frame import BODY, PRELUDE, Frame, Place, _checksum, pack
from kvloom.store.identity import ChunkKey, Identity, chunk_keys

LIMIT = 1 << 16  # bytes of memory that a frame may cost here
ROOM = 256 << 20  # bytes of address space beyond what Python and torch have before the first frame
PATIENCE = 10.0  # seconds for one frame
NUMBERS = [-1, 0, 1, 7, 63, 64, 65, 255, 1 << 15, 1 << 16, 1 << 31, 1 << 40, 1 << 48, 1 << 63, 1 << 70]
Frames = list[tuple[bytes, dict[Place, torch.Tensor]]]


def example_key(n: int = 8, salt: str = "") -> ChunkKey:
    """A chunk of n tokens."""
    identity = Identity("weights", "tokenizer", "bfloat16", ((2, 4, 4),) * 2, salt=salt)
    return chunk_keys(identity, range(n), n)[0]


def examples() -> Frames:
    """Small frames: plain ones and compressed ones, several dtypes, an empty tensor and a scalar."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        Place(0, "key"): torch.randn(2, 8, 4, generator=generator).bfloat16(),
        Place(0, "value"): torch.randn(2, 8, 4, generator=generator).half(),
        Place(1, "key", "codes"): torch.randint(0, 4, (2, 8, 40), generator=generator, dtype=torch.uint8),
        Place(1, "key", "scale"): torch.tensor(0.5),
        Place(1, "value"): torch.zeros(2, 0, 4),
    }
    return [(bytes(pack(example_key(), tensors, coding=name, notes={"error": 0.5})), tensors) for name in CODINGS]


def coded_examples() -> Frames:
    """`examples`, and frames as CacheGen writes them."""
    generator, key = torch.Generator().manual_seed(1), example_key(24)
    x = torch.randn(2, 24, 8, generator=generator)
    planes = {Place(0, "key"): x.cumsum(1), Place(0, "value"): x.half(), Place(1, "key"): x.bfloat16()}
    found = examples()
    for form in FORMS:
        tensors, notes = CacheGen(3, form).encode(planes)
        found.append((bytes(pack(key, tensors, notes=notes, coding="rans")), tensors))
    return found


def blind(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Flips, zeroes, cuts, repeats, moves or mixes stretches of bytes."""
    out = bytearray(data)
    at, n = rng.randrange(len(out)), rng.choice((1, 2, 16, 64, rng.randrange(1, len(out))))
    to = rng.randrange(len(out))
    kind = rng.randrange(8)
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        out[at : at + n] = bytes(len(out[at : at + n]))
    elif kind == 2:
        del out[at:]
    elif kind == 3:
        out += rng.randbytes(n)
    elif kind == 4:
        out[at : at + n] = rng.randbytes(len(out[at : at + n]))
    elif kind == 5:
        del out[at : at + n]
    elif kind == 6:
        piece = out[at : at + n]
        out[to : to + len(piece)] = piece
    else:
        out[at:] = other[at:]
    return bytes(out)


def forged(data: bytes, rng: random.Random) -> bytes:
    """Changes what the header says, or its text, and gives it a checksum that is right."""
    magic, version, flags, length, total = PRELUDE.unpack_from(data)
    text, body = data[BODY : BODY + length], data[BODY + length :]
    if rng.random() < 0.3:
        text = blind(text, text[::-1], rng)
    else:
        header = json.loads(text)
        for _ in range(rng.randint(1, 3)):
            pages = header["pages"] if isinstance(header["pages"], list) else []
            holder: Any = rng.choice([header, *(page for page in pages if isinstance(page, dict))])
            name = rng.choice(list(holder))
            value = holder[name]
            options: list[Any] = [rng.choice(NUMBERS), -0.5, None, "", "int64", [], {}, [[]] * 9, "x" * 99, True, value]
            if isinstance(value, list) and value:
                options += [value * 2, value[::-1], value[1:], [rng.choice(NUMBERS)] * len(value)] * 3
            elif isinstance(value, int):
                options += [value + 1, value * 2, value + 64, rng.choice(NUMBERS)] * 3
            holder[name] = rng.choice(options)
        text = json.dumps(header).encode()
        text = text.ljust(-(-(BODY + len(text)) // 64) * 64 - BODY)
    total = rng.choice((BODY + len(text) + len(body),) * 8 + (total, rng.randrange(1 << 64)))
    prelude = PRELUDE.pack(magic, version, flags, len(text), total)
    return prelude + _checksum(prelude, text) + text + body


def mended(data: bytes, rng: random.Random) -> bytes:
    """Damages what one page holds, or takes it from another page, and gives it checksums that are right."""
    magic, version, flags, length, _ = PRELUDE.unpack_from(data)
    header, body = json.loads(data[BODY : BODY + length]), data[BODY + length :]
    pages = header["pages"]
    held = [body[page["offset"] : page["offset"] + page["stored"]] for page in pages]
    at = rng.choice([i for i, piece in enumerate(held) if piece])
    held[at] = blind(held[at], rng.choice(held), rng)
    whole = b""
    for page, piece in zip(pages, held):
        filled = piece.ljust(-(-len(piece) // 64) * 64, b"\0")
        page.update(offset=len(whole), stored=len(piece), checksum=xxhash.xxh3_128(filled).hexdigest())
        whole += filled
    text = json.dumps(header).encode()
    text = text.ljust(-(-(BODY + len(text)) // 64) * 64 - BODY)
    prelude = PRELUDE.pack(magic, version, flags, len(text), BODY + len(text) + len(whole))
    return prelude + _checksum(prelude, text) + text + whole


def same(a: dict[Place, torch.Tensor], b: dict[Place, torch.Tensor]) -> bool:
    """Whether the tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(
        a[p].dtype == b[p].dtype and a[p].shape == b[p].shape and a[p].tolist() == b[p].tolist() for p in a
    )


def attempt(frames: Frames, rng: random.Random, now: Now | None = None) -> str:
    """One damage; "refused", "same" or "forged". Raises AssertionError if the frame gives what it must not give."""
    data, tensors = rng.choice(frames)
    forge = rng.random() < 0.5
    mutant = rng.choice((forged, mended))(data, rng) if forge else blind(data, rng.choice(frames)[0], rng)
    if now is not None:
        now.at(mutant)
    try:
        frame = Frame.open(mutant, LIMIT)
        layers = rng.choice((None, {page.layer for page in frame.header.pages[:1]}))
        got = frame.read(layers)
        if any(place.field == "symbols" for place in got):
            CacheGen().decode(got)
    except DamagedFrame:
        return "refused"
    assert sum(tensor.nbytes for tensor in got.values()) <= LIMIT, "more memory than the limit"
    if not forge:
        # damage to what is not read does not matter
        twin = [other for data, other in frames if data == mutant]  # mixed with another frame so that it is that one
        whole, tensors = layers is not None or bool(twin), twin[0] if twin else tensors
        assert whole and same(got, {p: x for p, x in tensors.items() if layers is None or p.layer in layers}), (
            "damage that passed"
        )
        return "same"
    return "same" if same(got, tensors) else "forged"


def work(most: float, seconds: float, seed: int, now: Any) -> None:
    """Damages until it is enough. `now`: memory that the parent sees: how many are done, and the damaged frame at hand."""
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + ROOM, resource.RLIM_INFINITY))
    rng, frames, end, slowest = random.Random(seed), coded_examples(), time.monotonic() + seconds, 0.0
    counts: dict[str, int] = {}
    while now.done < most and time.monotonic() < end:
        before = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)  # its signal ends the process, even inside compiled code
        outcome = attempt(frames, rng, now)
        slowest = max(slowest, time.monotonic() - before)
        counts[outcome] = counts.get(outcome, 0) + 1
        now.done += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"{now.done} mutations, seed {seed}: {counts}; the slowest took {slowest * 1000:.1f} ms", flush=True)


def _mapped() -> int:
    """Bytes of address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


class Now(ctypes.Structure):
    """What the worker is at."""

    _fields_ = [("done", ctypes.c_uint64), ("length", ctypes.c_uint64), ("frame", ctypes.c_char * (4 * LIMIT))]

    def at(self, frame: bytes) -> None:
        self.length = len(frame)
        ctypes.memmove(ctypes.addressof(self) + Now.frame.offset, frame, min(len(frame), 4 * LIMIT))


def watch(most: float, seconds: float, seed: int) -> int:
    """The worker's exit code: 0, or 1 with a message and the frame in a file if it crashed, hung or took too much memory."""
    context = multiprocessing.get_context("fork")
    now = context.RawValue(Now)
    worker = context.Process(target=work, args=(most, seconds, seed, now))
    worker.start()
    worker.join()
    if worker.exitcode == 0:
        return 0
    why = {-signal.SIGALRM: f"no answer in {PATIENCE:.0f} s", 1: "see above"}.get(worker.exitcode or 0)
    bad = Path(f"fuzz-{seed}-{now.done}.frame")
    bad.write_bytes(bytes(now)[Now.frame.offset : Now.frame.offset + now.length])
    print(f"FAILED at mutation {now.done} of seed {seed}: {why or f'exit code {worker.exitcode}'}. The frame: {bad}")
    return 1


def main() -> None:
    """Runs, and prints what became of the damage."""
    amount, seed = (sys.argv[1:] + ["100000"])[0], int((sys.argv[2:] + ["0"])[0])
    timed = amount.endswith("s")
    sys.exit(watch(float("inf") if timed else int(amount), float(amount[:-1]) if timed else float("inf"), seed))


if __name__ == "__main__":
    main()

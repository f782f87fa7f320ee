"""Chunks of a tier looked at, checked, thrown out, and carried in one file. Nothing leaves or enters without being verified."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvloom.errors import DamagedFrame, StoreError, TierError
from kvloom.store.frame import LIMIT, Buffer, Frame, Header
from kvloom.store.identity import ChunkKey
from kvloom.store.tier import Deadline, Facts, Tier, TierFull

__all__ = ["Chunk", "Moved", "check", "chunks", "export", "import_", "shrink", "verify"]

SECONDS = 60.0  # for one call of a tier; nobody waits for a token here
HEAD = 1 << 16  # bytes read first to see a header
NAME = re.compile(r"([0-9a-f]{64})\.kvloom")
MOST = 1 << 20  # files in an archive
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Chunk:
    """What a header says. `base`: the key that chunks behind this one have as their context. `problem`: why it can't be
    read, or "".
    """

    key: str
    nbytes: int
    identity: str = ""
    context: str = ""
    start: int = 0
    tokens: int = 0
    seconds: float = 0.0
    base: str = ""
    problem: str = ""


@dataclass
class Moved:
    """Chunks and bytes that went over, chunks that were there already, and those that were refused, with the reason."""

    chunks: int
    nbytes: int
    known: int
    refused: dict[str, str]


def _quiet(text: str) -> None:
    pass


def chunks(tier: Tier, tell: Tell = _quiet) -> Iterator[Chunk]:
    """Every chunk of a tier, by its header alone. Raises TierError if the tier does not answer."""
    for key in sorted(tier.keys(Deadline(SECONDS))):
        tell(key[:12])
        size = tier.size(key, Deadline(SECONDS))
        if size is None:  # gone since
            continue

        def fetch(start: int, stop: int, key: str = key) -> Buffer | None:
            return tier.get(key, start, stop, Deadline(SECONDS))

        try:
            header = Frame(fetch(0, HEAD) or b"", fetch).header
        except DamagedFrame as error:
            yield Chunk(key, size, problem=str(error))
            continue
        base = _base(header)
        yield Chunk(
            key, size, header.identity, header.context, header.start, len(header.tokens), _seconds(header),
            base.digest, "" if header.key == key else "another chunk's name",
        )  # fmt: skip


def _base(header: Header) -> ChunkKey:
    """The key of what the header says, as if it were stored without loss."""
    return ChunkKey(header.identity, header.context, header.start, header.tokens)


def _seconds(header: Header) -> float:
    seconds = header.notes.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def check(name: str, data: Buffer, limit: int = LIMIT) -> Frame:
    """A frame of which every byte is verified, and that stands under the name that its content has. Raises DamagedFrame."""
    frame = Frame.open(data, limit)
    header = frame.header
    base = _base(header)
    if header.key not in (base.digest, base.at(str(header.notes.get("coding", ""))).digest):
        raise DamagedFrame("its key is not the digest of what it says of itself")
    if header.key != name:
        raise DamagedFrame("another chunk's name")
    frame.read(copy=False, lend=True)
    return frame


def verify(tier: Tier, fix: bool = False, tell: Tell = _quiet) -> tuple[int, int, dict[str, str]]:
    """Reads all of a tier: chunks and bytes that are as they were stored, and the others with the reason.

    `fix`: removes those.
    """
    good = nbytes = 0
    bad: dict[str, str] = {}
    for key in sorted(tier.keys(Deadline(SECONDS))):
        tell(key[:12])
        data = tier.get(key, 0, LIMIT + 1, Deadline(SECONDS))
        if data is None:
            continue
        try:
            check(key, data)
            good, nbytes = good + 1, nbytes + len(data)
        except DamagedFrame as error:
            bad[key] = str(error)
            if fix:
                tier.delete(key, Deadline(SECONDS))
    return good, nbytes, bad


def shrink(tier: Tier, most: int | None, orphans: bool, dry: bool = False, tell: Tell = _quiet) -> list[Chunk]:
    """Chunks to throw out, thrown out unless `dry`: unreadable ones, `orphans` (the chunk before them is gone, so no prompt
    leads to them), and then, until `most` bytes are left, the cheapest to compute again per byte; of a text, the last first.
    """
    held = list(chunks(tier, tell))
    gone = [chunk for chunk in held if chunk.problem]
    kept = {chunk.key: chunk for chunk in held if not chunk.problem}
    while orphans:
        led = {chunk.base for chunk in kept.values()}
        lost = [chunk for chunk in kept.values() if chunk.context and chunk.context not in led]
        if not lost:
            break
        for chunk in lost:
            gone.append(kept.pop(chunk.key))
    if most is not None:
        left = sum(chunk.nbytes for chunk in kept.values())
        for chunk in sorted(kept.values(), key=lambda c: (c.seconds / max(1, c.nbytes), -c.start)):
            if left <= most:
                break
            gone.append(chunk)
            left -= chunk.nbytes
    if not dry:
        for chunk in gone:
            tier.delete(chunk.key, Deadline(SECONDS))
    return gone


def export(tier: Tier, path: Path, identity: str = "", tell: Tell = _quiet) -> Moved:
    """Writes verified chunks into a new zip file; `identity`: only those whose identity begins so.

    Raises StoreError if the file is there already or cannot be written.
    """
    moved = Moved(0, 0, 0, {})
    try:
        archive = zipfile.ZipFile(path, "x", zipfile.ZIP_STORED)
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be written ({error}); name a new file.") from error
    with archive:
        for key in sorted(tier.keys(Deadline(SECONDS))):
            tell(key[:12])
            data = tier.get(key, 0, LIMIT + 1, Deadline(SECONDS))
            if data is None:
                continue
            try:
                frame = check(key, data)
            except DamagedFrame as error:
                moved.refused[key] = str(error)
                continue
            if frame.header.identity.startswith(identity):
                archive.writestr(zipfile.ZipInfo(f"{key}.kvloom"), bytes(data))
                moved.chunks, moved.nbytes = moved.chunks + 1, moved.nbytes + len(data)
    return moved


def names(path: Path) -> list[str]:
    """What is in an archive. Raises StoreError for a file that is none."""
    with _opened(path) as archive:
        return [info.filename for info in archive.infolist()]


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise StoreError(f"{str(path)!r} is no archive that `kvloom store export` wrote ({error}).") from error


def import_(path: Path, tier: Tier, tell: Tell = _quiet) -> Moved:
    """Puts the chunks of an archive into a tier. Names in it are digests or nothing; sizes are looked at before anything is
    read; every frame is verified. Raises StoreError for a file that is no archive, TierError if the tier fails.
    """
    moved = Moved(0, 0, 0, {})
    with _opened(path) as archive:
        for info in _entries(archive.infolist()):
            tell(info.filename[:12])
            match = NAME.fullmatch(info.filename)
            try:
                if match is None:
                    raise DamagedFrame("a name that is no digest")
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > LIMIT or info.flag_bits & 1:
                    raise DamagedFrame(f"{info.file_size} bytes, compressed, encrypted or more than {LIMIT}")
                with archive.open(info) as file:
                    data = file.read(LIMIT + 1)
                frame = check(match[1], data)
            except (DamagedFrame, zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
                moved.refused[info.filename[:80]] = str(error)
                continue
            facts = Facts("", _seconds(frame.header), frame.header.start)
            with suppress(TierFull):
                if tier.put(match[1], data, facts, Deadline(SECONDS)):
                    moved.chunks, moved.nbytes = moved.chunks + 1, moved.nbytes + len(data)
                else:
                    moved.known += 1
                continue
            raise TierError(f"{tier.name} is full after {moved.chunks} chunks; raise its max= or import less.")
    return moved


def _entries(infos: Iterable[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """In a good order: the beginning of a text first, as far as names tell; and not more than anybody would write."""
    found = list(infos)
    if len(found) > MOST:
        raise StoreError(f"the archive has {len(found)} entries, and at most {MOST} are read.")
    return found

"""`kvloom store`: what it shows, what it finds damaged, and archives from strangers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from kvloom.cli import main
from kvloom.store import Identity, Place, Store, chunk_keys

IDENTITY = Identity("weights", "tokenizer", "float32", ((2, 8, 8),))
KEYS = chunk_keys(IDENTITY, range(40), 8)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    try:
        main(["store", *arguments])
        found = 0
    except SystemExit as end:
        found = int(end.code or 0)
    out = capsys.readouterr()
    assert found == code, out
    return out.out + out.err if code == 2 else out.out


@pytest.fixture
def folder(tmp_path: Path) -> str:
    url = f"file://{tmp_path}/tier"
    with Store.open(url) as store:
        for i, key in enumerate(KEYS):
            store.put(key, {Place(0, plane): torch.randn(2, 8, 8) for plane in ("key", "value")}, seconds=1.0 + i)
    return url


def files(url: str) -> list[Path]:
    return sorted(Path(url.removeprefix("file://")).glob("chunks/*/*.kvloom"))


def test_stat_and_ls(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = json.loads(run(capsys, "stat", folder, "--json"))
    assert row["chunks"] == 5 and row["bytes"] == sum(path.stat().st_size for path in files(folder))
    found = json.loads(run(capsys, "ls", folder, "--json"))
    assert [chunk["key"] for chunk in found] == [key.digest for key in KEYS]
    assert [chunk["start"] for chunk in found] == [0, 8, 16, 24, 32] and found[1]["context"] == KEYS[0].digest
    text = run(capsys, "ls", folder, "--limit", "2")
    assert KEYS[1].digest[:12] in text and KEYS[3].digest[:12] not in text and "3 more" in text
    assert json.loads(run(capsys, "ls", folder, "--identity", "ffff", "--json")) == []
    assert "Dict" not in run(capsys, "--help") and "5" in run(capsys, "stat", folder)


def test_verify_finds_every_damage(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = json.loads(run(capsys, "verify", folder, "--json"))
    assert row["good"] == 5 and not row["damaged"]
    paths = files(folder)
    data = bytearray(paths[0].read_bytes())
    data[-1] ^= 1
    paths[0].write_bytes(data)
    paths[1].write_bytes(paths[2].read_bytes())  # intact, under another's name
    paths[3].write_bytes(b"")
    (row,) = json.loads(run(capsys, "verify", folder, "--json", code=1))
    assert set(row["damaged"]) == {paths[i].stem for i in (0, 1, 3)} and len(files(folder)) == 5
    assert "removed" in run(capsys, "verify", folder, "--fix", code=1)
    assert {path.stem for path in files(folder)} == {paths[i].stem for i in (2, 4)}
    run(capsys, "verify", folder)


def test_gc(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [Path(path).stat().st_size for key in KEYS for path in files(folder) if path.stem == key.digest]
    most = str(sum(sizes[2:]))
    assert "would remove 2" in run(capsys, "gc", folder, "--max", most, "--dry-run")
    assert len(files(folder)) == 5
    gone = json.loads(run(capsys, "gc", folder, "--max", most, "--json"))
    assert [chunk["start"] for chunk in gone["chunks"]] == [0, 8]  # the cheapest to compute again
    assert "removed 3" in run(capsys, "gc", folder, "--orphans")
    assert files(folder) == []


def test_lossy_variants_are_nothing_strange(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{tmp_path}/tier"
    with Store.open(url) as store:
        for key in KEYS:
            tensors = {Place(0, plane): torch.randn(2, 8, 8) for plane in ("key", "value")}
            store.put(key, tensors, coding="cachegen(level=2)" if key.start < 16 else "rans")
    run(capsys, "verify", url)
    assert "removed 0" in run(capsys, "gc", url, "--orphans")
    assert "exported 5" in run(capsys, "export", url, str(tmp_path / "all.zip"))
    assert "imported 5" in run(capsys, "import", str(tmp_path / "all.zip"), f"file://{tmp_path}/other")


def test_there_and_back(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, other = tmp_path / "chunks.zip", f"file://{tmp_path}/other"
    assert "exported 5" in run(capsys, "export", folder, str(archive))
    assert "new file" in run(capsys, "export", folder, str(archive), code=2)
    assert "imported 5" in run(capsys, "import", str(archive), other)
    assert "5 were there already" in run(capsys, "import", str(archive), other)
    with Store.open(folder) as one, Store.open(other) as two:
        for key in KEYS:
            a, b = one.get(key), two.get(key)
            assert a is not None and b is not None and all(torch.equal(a[place], b[place]) for place in a)


def test_archives_from_strangers(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = files(folder)[0], f"file://{tmp_path}/other"
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        data = good.read_bytes()
        archive.writestr(f"{good.stem}.kvloom", data)
        archive.writestr("../../etc/passwd", data)
        archive.writestr(f"{'0' * 64}.kvloom", data)
        archive.writestr(f"{'1' * 64}.kvloom", data[:-1])
        archive.writestr(f"{'2' * 64}.kvloom", bytes(1 << 20), zipfile.ZIP_DEFLATED)
    found = json.loads(run(capsys, "import", str(bad), other, "--json", code=1))
    assert found["chunks"] == 1 and len(found["refused"]) == 4
    assert [path.stem for path in files(other)] == [good.stem]
    (tmp_path / "no.zip").write_bytes(b"nothing")
    assert "no archive" in run(capsys, "import", str(tmp_path / "no.zip"), other, code=2)
    assert "unknown kind of tier" in run(capsys, "stat", "ftp://host", code=2)


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "store", "nano", "--tokens", "256", "--cache", "full", "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(row["source"], row["reused"], row["bar"]) for row in found["rows"]] == [
        ("recompute", 0, None),
        ("memory", 256, None),
        ("files", 256, None),
    ]
    assert found["fingerprint_gb_s"] > 0 and all(row["ms"] > 0 for row in found["rows"])

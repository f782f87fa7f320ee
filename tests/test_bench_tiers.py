"""`kvloom bench tiers` on small chunks: every tier is written and read, and shares are judged. Nothing here looks at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom.bench import store
from kvloom.bench.store import Rates, Row, hashing
from kvloom.cli import main
from kvloom.store import stream
from tests.refusal import check


def test_tiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["memory://", "--folder", str(tmp_path), "--chunks", "2", "--size", "4MiB", "--rounds", "1", "--json"]
    main(["bench", "tiers", *arguments])
    found = json.loads(capsys.readouterr().out)
    assert found["chunks"] == 2 and found["nbytes"] == 4 << 20 and not found["left_out"]
    names = [row["what"] for row in found["rows"]]
    assert len(set(names)) == len(names) >= 11 and all(row["rate"] > 0 for row in found["rows"])
    for row in found["rows"]:
        reads = row["what"].startswith(("files in", "files from", "memory, 1"))
        assert (row["checksum"] is not None and 0 < row["checksum"] < 1) == reads, row
    assert sum(row["met"] is not None for row in found["rows"]) == 2
    assert not list(tmp_path.iterdir())  # nothing is left


def test_steps(tmp_path: Path) -> None:
    told: list[str] = []
    store.run(tmp_path, ["memory://"], 1, 4 << 20, 1, told.append)
    assert len(told) == store.steps(1, 1)


def test_verdicts() -> None:
    assert store._judged(Row("x", 6.1, 0.2), 6.0, 0.25).met and not store._judged(Row("x", 5.9, 0.2), 6.0, 0.25).met
    assert not store._judged(Row("x", 6.1, 0.3), 6.0, 0.25).met
    rates = Rates(1, 1 << 20, [store._judged(Row("x", 5.9, 0.2), 6.0, 0.25)], [])
    assert rates.table().row_count == 1


def test_hashing_measures_and_puts_things_back() -> None:
    before = stream.new_checksum
    with hashing() as spent:
        check_ = stream.new_checksum()
        check_.update(memoryview(bytes(1 << 20)))
        assert check_.hexdigest() == before(bytes(1 << 20)).hexdigest() and spent() > 0
    assert stream.new_checksum is before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--size", "1MiB"], ["1048576", "too small"]),
        (["--size", "many"], ["'many'"]),
        (["--chunks", "0"], ["--chunks", "0"]),
        (["--folder", "/no/such/folder"], ["--folder", "/no/such/folder"]),
    ],
)
def test_refusals(arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "tiers", *arguments])
    assert caught.value.code == 2
    check(capsys.readouterr().err.splitlines()[-1], *named)

"""`kvloom bench reuse` with tiny sizes: every workload runs, and exact rows are exact. Nothing here looks at a time."""

from __future__ import annotations

import json
import math

import pytest

from kvloom.bench import reuse
from kvloom.cli import main
from kvloom.programs.cards import CLASSES
from tests.refusal import check


def test_reuse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "AHEAD", 2)
    main(["bench", "reuse", "nano", "--tokens", "64", "--requests", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = {(row["case"], row["method"]): row for row in found["rows"]}
    assert {row["part"] for row in found["rows"]} == {"agents", "edits", "contexts"}
    assert all(row["seconds"] > 0 and math.isfinite(row["kl"]) and 0 <= row["reused"] <= 1 for row in rows.values())
    first = rows["prefilled", "kvcomm"]  # one question: no anchors yet
    assert first["requests"] == 5 and abs(first["kl"]) < 1e-6 and ("corrected", "kvcomm") not in rows
    assert abs(rows["deletion", "pie(refresh=64)"]["kl"]) < 1e-6 < rows["deletion", "pie"]["kl"]
    asked, new = (rows["8 contexts", name] for name in ("ape", "ape, contexts new"))
    assert asked["kl"] == pytest.approx(new["kl"], abs=1e-6) and (asked["reused"], new["reused"]) == (0.75, 0.25)


def test_steps_are_announced() -> None:
    from kvloom.bench import models
    from kvloom.lab.measure import load_model

    told: list[str] = []
    network, book = (
        models.load("nano"),
        load_model("nano")[1].encode("The lamp is lit in winter. " * 40, return_tensors="pt")[0],
    )
    for part in (reuse.agents, reuse.edits, reuse.contexts):
        part(network, book, 1, 64, told.append)
    assert len(told) == reuse.steps(1)


def test_cards_of_classes(capsys: pytest.CaptureFixture[str]) -> None:
    for name in CLASSES:
        main(["methods", name])
        text = capsys.readouterr().out
        assert text.startswith(f"{name}: ") and "arXiv" in text and "options:" in text and "inspect._empty" not in text


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--tokens", "8"), ("--requests", "0")):
        with pytest.raises(SystemExit):
            main(["bench", "reuse", option, value])
        check(capsys.readouterr().err, option, value)

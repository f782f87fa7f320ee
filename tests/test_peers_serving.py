"""The side-by-side of servers, with stand-ins for them."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NANO = ROOT / "kvloom" / "models" / "nano"


@pytest.fixture(scope="module")
def serving() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
        yield importlib.import_module("serving")


def _stand_in(serving: ModuleType, *options: str) -> Any:
    return serving.Side("", lambda p: ["-m", "tests.openai_like", str(p.port), "--first", "0.01", *options])


def test_sides_side_by_side(
    serving: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As much as can be seen without the peers: fast beats slow, a server that does not start is told, all get the same."""
    sides = {
        "kvloom": _stand_in(serving, "--gap", "0.002"),
        "transformers": _stand_in(serving, "--gap", "0.05", "--faults", "text"),
    }
    sides["vllm eager"] = serving.Side("", lambda p: ["-c", "raise SystemExit('no such model')"])
    monkeypatch.setattr(serving, "SIDES", sides)
    monkeypatch.setattr(serving, "WORK", {"contexts": serving.Work("contexts", 100, 90, 16, users=3)})
    out = tmp_path / "found.json"
    arguments = ["--together", "1", "2", "--scale", "0.5", "--output", str(out), "--most", "60"]
    monkeypatch.setattr(sys, "argv", ["serving.py", *arguments])
    serving.main()
    found = json.loads(out.read_text())
    done = [row for row in found["rows"] if "failed" not in row]
    assert [(r["side"], r["together"], r["completed"]) for r in done] == [
        ("kvloom", 1, 2), ("kvloom", 2, 2), ("transformers", 1, 2), ("transformers", 2, 2)
    ]  # fmt: skip
    assert all(
        not r["cut"] and not r["errors"] and r["output_tokens"] == 32 and r["prompt_tokens"] == 200 for r in done
    )
    assert [r["failed"] for r in found["rows"] if "failed" in r] == ["no such model"]
    assert len(found["bars"]) == 2 and all("bar 1.5x  yes" in line for line in found["bars"])
    shown = capsys.readouterr().out
    assert "no such model" in shown and "TTFT p50" in shown and "yes" in shown


def test_a_level_is_cut_off(serving: ModuleType, tmp_path: Path) -> None:
    place = serving.Place(tmp_path, serving.free_port(), 1, "float32", 1, serving.WORK["short"], 1)
    prompts = serving.Prompts(0, *serving.words_of(NANO))
    side = _stand_in(serving, "--gap", "0.1")
    with serving.served(side, place, Path(sys.executable), tmp_path / "log", 60) as url:
        kind = serving.Work("short", 16, 0, 12)
        (level,) = asyncio.run(serving.measure(url, None, {}, kind, prompts, [1], 1.0, 3.0))
    assert level["cut"] and 0 < level["completed"] < 4


def test_the_model_folder_holds_nothing_else(serving: ModuleType, tmp_path: Path) -> None:
    folder = serving.plain(NANO, tmp_path / "model", "bfloat16")
    assert {path.name for path in folder.iterdir()} == set(serving.OWN_FILES)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16" and config.items() < json.loads((NANO / "config.json").read_text()).items()


def test_transformers_gets_room_for_the_work(serving: ModuleType) -> None:
    for kind in serving.WORK.values():
        command = serving.transformers_serve(serving.Place(NANO, 1, 2, "float32", 2, kind, 32))
        pages, batch = (int(command[command.index(f"--cb-{name}") + 1]) for name in ("num-blocks", "max-batch-tokens"))
        assert pages * 256 >= kind.users * kind.common + 32 * (kind.prompt - kind.common + kind.output)
        assert 256 <= batch <= 2048 and batch * pages * 256 * 4 <= 1 << 30


def test_long_prompts_arrive_beside_talkers(
    serving: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serving_arrivals = importlib.import_module("serving_arrivals")

    monkeypatch.setattr(serving_arrivals.serving, "kvloom", lambda cache, *options: _stand_in(serving, "--gap", "0.01"))
    out = tmp_path / "found.json"
    arguments = ["--chunk", "256", "8192", "--talkers", "2", "--rounds", "2", "--answer", "20", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["serving_arrivals.py", *arguments])
    serving_arrivals.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["chunk"] for row in rows] == [256, 8192] and all(
        row["read"] > 3 and row["itl_ms"]["p50"] > 9 for row in rows
    )
    assert all(row["tokens_per_second"] > 7000 * row["read"] / 60 for row in rows)
    assert "chunk 256 costs" in capsys.readouterr().out

"""The page on serving: its code runs, its flags and fields are those that there are."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from kvloom.engine.commands import serve
from kvloom.engine.protocol import Chat, Completion
from tests.test_docs import run_blocks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "serving.md"


def test_the_code_runs() -> None:
    assert run_blocks(PAGE)["app"].routes


def test_all_flags_and_no_others() -> None:
    told = set(
        re.findall(r"`--([a-z-]+)", PAGE.read_text(encoding="utf-8").split("## Flags")[1].split("## Endpoints")[0])
    )
    assert told == {name.replace("_", "-") for name in inspect.signature(serve).parameters} - {"model"}


def test_the_fields_are_known() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## Fields")[1].split("- **Forms")[0]
    names = {name.partition(".")[0] for name in re.findall(r"`([a-z_.]+)`", text)}
    assert names <= {*Chat.model_fields, *Completion.model_fields} and len(names) > 30

"""Answers of a form: whatever the model would like, what comes out fits it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from kvloom.engine.guide import KEPT, Guides
from kvloom.errors import RequestError

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def guides(nano: Any) -> Guides:
    return Guides(nano[1], 4104, [1])  # a vocabulary larger than the tokenizer's


def written(guides: Guides, tokenizer: Any, kind: str, form: Any, seed: int = 0, limit: int = 400) -> str:
    """What a model that likes all tokens alike writes."""
    generator = torch.Generator().manual_seed(seed)
    guide, tokens = guides.make(kind, form)(), []
    for _ in range(limit):
        logits = torch.randn(4104, generator=generator)
        guide.mask(logits)
        token = int(logits.argmax())
        assert logits[token] > -torch.inf and token < 4099
        if token == 1:
            break
        tokens.append(token)
        if guide.accept(token):
            break
    else:
        pytest.fail("no end")
    return str(tokenizer.decode(tokens))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_fits(guides: Guides, nano: Any, seed: int) -> None:
    person = json.loads(written(guides, nano[1], "json", SCHEMA, seed))
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 150
    assert written(guides, nano[1], "json", json.dumps(SCHEMA), seed)
    assert re.fullmatch(r"[a-f]{3}-\d{2,4}", written(guides, nano[1], "regex", r"[a-f]{3}-\d{2,4}", seed))
    assert written(guides, nano[1], "choice", ['"yes"\n', "no ä", "no"], seed) in ('"yes"\n', "no ä", "no")
    assert written(guides, nano[1], "grammar", 'start: ("ab" | "c")+ "."', seed).strip("abc") == "."


def test_an_object_begins_and_ends(guides: Guides) -> None:
    guide = guides.make("json_object", None)()
    text = iter(guides.tokenizer.encode('{"a": [1, {}]}', add_special_tokens=False))
    ended = [guide.accept(token) for token in text]
    assert ended == [False] * (len(ended) - 1) + [True]


def test_one_form_serves_many_answers(guides: Guides) -> None:
    make = guides.make("regex", "ab*")
    first, second = make(), make()
    encode = guides.tokenizer.convert_tokens_to_ids
    assert not first.accept(encode("a")) and not first.accept(encode("b"))
    logits = torch.zeros(4104)
    second.mask(logits)
    allowed = (logits == 0).nonzero()[:, 0].tolist()
    assert encode("a") in allowed and encode("b") not in allowed and 1 not in allowed
    logits = torch.zeros(4104)
    first.mask(logits)
    assert logits[1] == 0, "it may end here"
    for n in range(KEPT + 5):
        guides.make("regex", f"a{{{n}}}b")
    assert len(guides._kept) == KEPT


@pytest.mark.parametrize(
    "kind, form",
    [
        ("regex", "("), ("regex", "(?=x)"), ("regex", 7), ("json", {"type": "foo"}), ("json", "{"), ("json", [1]),
        ("choice", []), ("choice", [""]), ("grammar", "start: ("), ("grammar", None), ("poem", "x"),
        ("json", {"type": "string", "pattern": "["}),
    ],
)  # fmt: skip
def test_what_is_no_form_is_refused(guides: Guides, kind: str, form: Any) -> None:
    with pytest.raises(RequestError, match="form"):
        guides.make(kind, form)

"""`kvloom batch`: a file of requests in, a file of results out."""

import json

import pytest

from kvloom.cli import app
from kvloom.engine.offline import Results
from kvloom.errors import KvloomError


def ask(path, bodies):
    urls = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
    lines = [
        {"custom_id": id, "method": "POST", "url": urls[next(iter(body))], "body": body} for id, body in bodies.items()
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def results(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(x["error"] is None and x["id"].startswith("batch_req_") for x in found)
    assert len({x["custom_id"] for x in found}) == len(found)
    return {x["custom_id"]: (x["response"]["status_code"], x["response"]["body"]) for x in found}


def run(*tokens):
    with pytest.raises(SystemExit) as end:
        app(["batch", *map(str, tokens)])
    assert not end.value.code


def test_a_batch_is_answered_and_goes_on_where_it_was_cut(tmp_path, capsys):
    story = "The keeper of the lighthouse wrote down every ship that passed, its flag and its hour. " * 12
    bodies = {
        f"q{i}": {"prompt": story + f"Note {i}:", "max_tokens": 5, "temperature": 0} for i in range(6)
    } | {
        "chat": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0},
        "two": {"prompt": "One, two", "max_tokens": 3, "n": 2, "seed": 1},
        "bad": {"prompt": "x", "max_tokens": 5, "frequency": 3},
    }  # fmt: skip
    file, whole, cut = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    ask(file, bodies)
    run(file, "nano", "--out", whole, "--part", 64, "--kv-memory", "64MiB")
    assert "tokens of prompts computed" in capsys.readouterr().err
    found = results(whole)
    assert set(found) == set(bodies) and found["bad"][0] == 400 and "frequency" in found["bad"][1]["error"]["message"]
    assert all(status == 200 for id, (status, _) in found.items() if id != "bad")
    assert found["chat"][1]["choices"][0]["message"]["content"] and len(found["two"][1]["choices"]) == 2
    cached = [found[f"q{i}"][1]["usage"]["prompt_tokens_details"]["cached_tokens"] for i in range(6)]
    assert sorted(cached)[0] == 0 and sorted(cached)[1] >= 128
    # killed in the middle of a line
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    run(file, "nano", "--out", cut, "--part", 64, "--kv-memory", "64MiB")
    assert "4 of them from before" in capsys.readouterr().err
    again = results(cut)
    assert cut.read_bytes().startswith(b"".join(lines[:4]))
    texts = [{id: body["choices"][0]["text"] for id, (_, body) in x.items() if id[0] == "q"} for x in (found, again)]
    assert texts[0] == texts[1]


def test_files_of_another_format_are_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(KvloomError, match="no result of a batch"):
        Results(path)

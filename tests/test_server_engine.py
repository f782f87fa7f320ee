"""The server over the engine with the bundled model: answers as the model alone gives them, forms, recipes, a whole process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from kvloom.cli import main
from kvloom.engine.ask import Served
from kvloom.engine.engine import Engine
from kvloom.lab.chat import stops_of
from tests.serving import Site, serving

ASK = [{"role": "user", "content": "The key is in the blue box. Where is the key?"}]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    from kvloom.lab.measure import load_model

    model, tokenizer = load_model("nano")  # not the one that tests share: the engine sets its attention
    engine = Engine(model, memory=64 << 20, part=64, allowed=["kivi(bits=4)"])
    served = Served(
        ["nano"], tokenizer, engine.vocabulary, engine.context, stops_of(model, tokenizer), allowed=["kivi(bits=4)"]
    )
    with serving(engine, served) as found:
        yield found


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def alone(nano: Any, text: str, tokens: int) -> str:
    model, tokenizer = nano
    ids = tokenizer(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_many_at_once_answer_as_alone(client: openai.OpenAI, nano: Any) -> None:
    texts = ["It was a bright day in April, and", "The captain said", "Anna went to the harbour and", "Once"]

    def ask(text: str) -> str:
        return client.completions.create(model="nano", prompt=text, max_tokens=12, temperature=0).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, texts * 3)) == [alone(nano, text, 12) for text in texts] * 3


def test_a_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="nano", messages=ASK, temperature=0, max_tokens=24)
    events = client.chat.completions.create(model="nano", messages=ASK, temperature=0, max_tokens=24, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.choices[0].message.content


def test_what_was_read_is_found_again_but_not_by_others(client: openai.OpenAI) -> None:
    text = "The ship lay in the harbour until the wind turned. " * 20

    def cached(**more: Any) -> int:
        found = client.completions.create(model="nano", prompt=text, max_tokens=2, extra_body=more)
        return found.usage.prompt_tokens_details.cached_tokens

    assert cached() == 0 and cached() >= 128
    assert cached(cache_salt="mine") == 0 and cached(cache_salt="mine") >= 128
    assert cached(cache="kivi(bits=4)") == 0


def test_seeds_and_several_answers(client: openai.OpenAI) -> None:
    def run(seed: int) -> list[str]:
        found = client.completions.create(model="nano", prompt="One day", max_tokens=8, temperature=1.5, seed=seed, n=3)
        return [choice.text for choice in found.choices]

    assert run(1) == run(1) != run(2) and len(set(run(1))) > 1


def test_log_probabilities_are_the_models(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="nano", messages=ASK, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    for one in found.choices[0].logprobs.content:
        values = [top.logprob for top in one.top_logprobs]
        assert values == sorted(values, reverse=True) and one.logprob == values[0] <= 0 and len(values) == 3


def test_settings_change_what_is_drawn(client: openai.OpenAI, nano: Any) -> None:
    banned = nano[1].encode(" the", add_special_tokens=False)[0]
    pushed = client.completions.create(
        model="nano", prompt="The", max_tokens=6, logit_bias={str(banned): 100}, temperature=0
    )
    assert pushed.choices[0].text == " the" * 6
    plain, varied = (
        client.completions.create(
            model="nano", prompt="The", max_tokens=40, temperature=0, extra_body={"repetition_penalty": penalty}
        )
        for penalty in (1, 5)
    )
    words = [set(nano[1].encode(found.choices[0].text, add_special_tokens=False)) for found in (plain, varied)]
    assert len(words[0]) < len(words[1])
    long = client.chat.completions.create(
        model="nano", messages=ASK, temperature=0, max_tokens=60, extra_body={"ignore_eos": True}
    )
    assert long.usage.completion_tokens == 60 and long.choices[0].finish_reason == "length"


def test_answers_of_a_form(client: openai.OpenAI) -> None:
    schema = {
        "type": "object", "properties": {"box": {"enum": ["blue", "red"]}, "count": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["box", "count"], "additionalProperties": False,
    }  # fmt: skip
    for asked in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "key", "schema": schema, "strict": True}}},
        {"extra_body": {"guided_json": schema}},
        {"extra_body": {"structured_outputs": {"json": schema}}},
    ):
        found = client.chat.completions.create(model="nano", messages=ASK, max_tokens=200, seed=3, **asked).choices[0]
        jsonschema.validate(json.loads(found.message.content), schema)
        assert found.finish_reason == "stop"
    text = (
        client.completions.create(model="nano", prompt="Call", extra_body={"guided_regex": r"\+49 \d{3,5}"})
        .choices[0]
        .text
    )
    assert re.fullmatch(r"\+49 \d{3,5}", text)
    text = (
        client.completions.create(model="nano", prompt="Is it?", extra_body={"guided_choice": ["yes", "no"]})
        .choices[0]
        .text
    )
    assert text in ("yes", "no")


def test_another_recipe_for_one_request(client: openai.OpenAI) -> None:
    text = "The ship lay in the harbour until the wind turned. " * 20
    found = client.completions.create(
        model="nano", prompt=text, max_tokens=8, temperature=0, extra_body={"cache": "kivi(bits=4)"}
    )
    assert found.usage.completion_tokens == 8


def test_leaving_frees_memory(site: Site) -> None:
    body = {"prompt": "One two", "max_tokens": 4000, "ignore_eos": True, "stream": True, "cache_salt": "leaving"}
    with httpx.stream("POST", f"{site.url}/v1/completions", json=body) as found:
        next(found.iter_lines())
        assert site.runner.engine.live
    site.until(lambda: not site.runner.engine.live, 5)


def test_a_prompt_beyond_the_memory_is_told_so(site: Site) -> None:
    found = httpx.post(f"{site.url}/v1/completions", json={"prompt": [5] * 8000, "max_tokens": 1000})
    assert found.status_code == 400 and found.json()["error"]["code"] == "context_length_exceeded"


def test_schemathesis_finds_no_error_of_the_server(site: Site) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    easy = settings(
        max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None
    )

    def attempt(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body["max_tokens"] = 2  # an answer without a bound may be as long as the context, 128 times
            case.body.pop("max_completion_tokens", None)
        answer = case.call(timeout=30)
        assert answer.status_code < 500, answer.text
        seen[case.path, answer.status_code] += 1

    for result in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):  # of some routes nothing can be wrong
                easy(given(case=result.ok().as_strategy(generation_mode=mode))(attempt))()
    assert all(seen[path, 200] for path in ("/health", "/metrics", "/v1/models", "/v1/chat/completions"))
    assert seen["/v1/chat/completions", 400] and seen["/v1/completions", 400]


def test_the_command_serves_and_stops(tmp_path: Any) -> None:
    given = f"serve nano --port 0 --kv-memory 64MiB --served-model-name small --store {tmp_path.as_uri()}"
    command = [sys.executable, "-m", "kvloom", *given.split()]
    environment = {**os.environ, "KVLOOM_API_KEY": "k", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        head = [process.stderr.readline() for _ in range(4)]
        assert (
            "small, context 8,192" in head[0]
            and str(tmp_path) in head[1]
            and "0.06 GiB (as --kv-memory says)" in head[2]
        )
        url = re.search(r"http://[0-9.:]+", head[3])[0]
        end = time.monotonic() + 20
        while True:
            try:
                assert httpx.get(f"{url}/health").status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < end
                time.sleep(0.05)
        answers: list[httpx.Response] = []
        body = {"prompt": "One two", "max_tokens": 150, "ignore_eos": True}
        body["prompt"] *= 200  # so that there is something to keep
        ask = {"json": body, "headers": {"Authorization": "Bearer k"}, "timeout": 60}
        caller = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", **ask)))
        caller.start()
        while httpx.get(f"{url}/stats").json()["running"] == 0:
            assert time.monotonic() < end + 20
        process.send_signal(signal.SIGTERM)
        caller.join()
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 150
        out, err = process.communicate(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM) and out == "" and "Traceback" not in err
        assert any(path.is_file() and path.stat().st_size > 10_000 for path in tmp_path.rglob("*"))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--cache", "nothing"], "nothing"),
        (["--kv-memory", "much"], "--kv-memory 'much'"),
        (["--port", "99999999"], "--port"),
        (["--chunk", "0"], "--chunk 0"),
    ],
)
def test_the_command_refuses_before_it_loads(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", "nano", "--port", "0", *arguments])
    assert left.value.code == 2 and why in capsys.readouterr().err

"""The server over a toy that repeats the prompt: shapes, streams, limits, errors, by OpenAI's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from kvloom.engine.ask import Served
from tests.serving import TOY, Site, Toy, serving


@pytest.fixture(scope="module")
def served(nano: Any) -> Served:
    return Served(
        names=("toy", "also-toy"), tokenizer=nano[1], vocabulary=TOY, context=256, ends=(1,), recipe="full",
        allowed=("kivi(bits=4)",), adapters={"pirate": "/adapters/pirate"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(served: Served) -> Iterator[Site]:
    with serving(Toy(), served, most=64, body=100_000) as found:
        yield found


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# what is answered


def test_a_chat(client: openai.OpenAI, served: Served) -> None:
    found = client.chat.completions.create(model="toy", messages=ask("Good €vening"), max_tokens=100)
    prompt = served.tokenizer.apply_chat_template(ask("Good €vening"), add_generation_prompt=True)["input_ids"]
    assert found.object == "chat.completion" and found.model == "toy" and found.id.startswith("chatcmpl-")
    (choice,) = found.choices
    # the prompt again, up to the mark that ends the user's turn
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert choice.message.content == "Good €vening"
    assert found.usage.prompt_tokens == len(prompt) and found.usage.completion_tokens == prompt.index(1) + 1
    assert found.usage.prompt_tokens_details.cached_tokens == len(prompt) // 2
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_chat_as_a_stream(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    events = list(
        client.chat.completions.create(model="toy", messages=ask("Good €vening"), stream=True, stream_options=options)
    )
    assert events[0].choices[0].delta.role == "assistant"
    parts = [event.choices[0].delta.content for event in events[1:-2]]
    assert "".join(parts) == "Good €vening" and all(parts) and len(parts) > 2
    assert events[-2].choices[0].finish_reason == "stop"
    assert not events[-1].choices and events[-1].usage.completion_tokens > 3
    assert {event.id for event in events} == {events[0].id} and all(event.usage is None for event in events[:-1])
    plain = list(client.chat.completions.create(model="toy", messages=ask("Good evening"), stream=True))
    assert all(event.choices for event in plain)


def test_completions(client: openai.OpenAI, served: Served) -> None:
    encode = served.tokenizer.encode
    found = client.completions.create(model="toy", prompt="One two three", max_tokens=len(encode("One two three")))
    assert found.object == "text_completion" and found.choices[0].text == "One two three"
    assert found.choices[0].finish_reason == "length"
    many = client.completions.create(model="toy", prompt=["One two", "Three four"], n=2, max_tokens=2, echo=True)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text[:5] for choice in many.choices] == ["One t"] * 2 + ["Three"] * 2
    tokens = client.completions.create(model="toy", prompt=[encode(" Anna"), encode(" Bert")], max_tokens=1)
    assert tokens.usage.prompt_tokens == len(encode(" Anna")) + len(encode(" Bert")) and len(tokens.choices) == 2
    echo = client.completions.create(model="toy", prompt=encode("One two"), max_tokens=0, echo=True)
    assert echo.choices[0].text == "One two" and echo.usage.completion_tokens == 0
    parts = list(client.completions.create(model="toy", prompt="One two", max_tokens=9, echo=True, stream=True, n=2))
    for index in (0, 1):
        mine = [event.choices[0] for event in parts if event.choices[0].index == index]
        assert (
            "".join(choice.text for choice in mine).startswith("One twoOne two") and mine[-1].finish_reason == "length"
        )


def test_stop_strings(client: openai.OpenAI) -> None:
    def run(**more: Any) -> Any:
        return client.completions.create(model="toy", prompt="One two three four ", max_tokens=60, **more).choices[0]

    cut = run(stop=["three", "zzz"])
    assert (cut.text, cut.finish_reason) == ("One two ", "stop")
    assert run(stop="o th", extra_body={"include_stop_str_in_output": True}).text == "One two th"
    assert run(stop="three", extra_body={"min_tokens": 12}).text.count("three") == 2
    events = list(
        client.completions.create(model="toy", prompt="One two three four ", max_tokens=60, stop="three", stream=True)
    )
    assert (
        "".join(event.choices[0].text for event in events) == "One two "
        and events[-1].choices[0].finish_reason == "stop"
    )


def test_stop_tokens(client: openai.OpenAI, served: Served) -> None:
    tokens = served.tokenizer.encode("One two three four")

    def run(**more: Any) -> Any:
        return client.completions.create(model="toy", prompt=tokens, max_tokens=30, extra_body=more)

    cut = run(stop_token_ids=[tokens[2]])
    assert cut.choices[0].text == served.tokenizer.decode(tokens[:2]) and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens == 3
    assert run(stop_token_ids=[tokens[2]], include_stop_str_in_output=True).choices[0].text == served.tokenizer.decode(
        tokens[:3]
    )
    tokens[1] = 1
    assert run().usage.completion_tokens == 2 and run(ignore_eos=True).usage.completion_tokens == 30
    assert "<|end|>" in run(ignore_eos=True, skip_special_tokens=False).choices[0].text


def test_log_probabilities(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="toy", messages=ask("Grün €"), logprobs=True, top_logprobs=2)
    content = found.choices[0].logprobs.content
    assert bytes(b for one in content for b in one.bytes).decode() == "<|begin|><|user|>Grün €"
    assert content[0].logprob == -0.5 and [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    events = list(client.chat.completions.create(model="toy", messages=ask("Grün €"), logprobs=True, stream=True))
    told = [one for event in events if (held := event.choices[0].logprobs) for one in held.content]
    assert [one.bytes for one in told] == [one.bytes for one in content] and not told[0].top_logprobs
    whole = client.completions.create(model="toy", prompt="One two", max_tokens=6, logprobs=2).choices[0]
    held = whole.logprobs
    assert "".join(held.tokens) == whole.text and held.token_logprobs == [-0.5] * 6 and len(held.top_logprobs[0]) == 2
    assert [whole.text[at:].startswith(token) for at, token in zip(held.text_offset, held.tokens)] == [True] * 6
    parts = list(client.completions.create(model="toy", prompt="One two", max_tokens=6, logprobs=2, stream=True))
    assert [x for event in parts if (h := event.choices[0].logprobs) for x in h.text_offset] == held.text_offset


def test_tools_reach_the_template(served: Served, nano: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(nano[1])
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.arguments.city }}){% endfor %};{% endfor %}{{ mood }}"
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad ones') }}{% endif %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        *ask("?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "wet"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    with (
        serving(Toy(), Served(["toy"], tokenizer, TOY, 256, [1])) as site,
        openai.OpenAI(base_url=f"{site.url}/v1", api_key="x", max_retries=0) as client,
    ):

        def run(messages: Any, **more: Any) -> str:
            n = len(tokenizer.encode("[weather]user:?;assistant:(Bonn);tool:wet;"))
            return (
                client.chat.completions.create(model="toy", messages=messages, max_tokens=n, **more)
                .choices[0]
                .message.content
            )

        assert run(messages, tools=tools) == "[weather]user:?;assistant:(Bonn);tool:wet;"
        assert run(messages, tools=tools, tool_choice="none").startswith("user:?;")
        assert run(ask("?"), extra_body={"chat_template_kwargs": {"mood": "calm"}}).startswith("user:?;calm")
        for extra in ({"chat_template": "x"}, {"tokenize": True}, {"return_dict": True}):
            with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
                run(ask("?"), extra_body={"chat_template_kwargs": extra})
        with pytest.raises(openai.BadRequestError, match="no bad ones"):
            run(ask("bad"))
        call["function"]["arguments"] = "{"
        with pytest.raises(openai.BadRequestError, match="arguments"):
            run(messages)


def test_parts_of_messages(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    found = client.chat.completions.create(model="toy", messages=[{"role": "user", "content": parts}])
    assert found.choices[0].message.content == "One\ntwo"
    picture = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(openai.BadRequestError, match="text alone"):
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": picture}])


def test_names(client: openai.OpenAI, site: Site) -> None:
    assert {model.id for model in client.models.list()} == {"toy", "also-toy", "pirate"}
    assert client.models.retrieve("pirate").parent == "toy"
    assert client.completions.create(model="pirate", prompt="a", max_tokens=1).model == "pirate"
    assert client.completions.create(model="also-toy", prompt="a", max_tokens=1).model == "toy"
    assert httpx.post(f"{site.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).json()["model"] == "toy"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'toy'") as error:
        client.completions.create(model="toi", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_tokens_and_back(site: Site, served: Served) -> None:
    found = httpx.post(f"{site.url}/tokenize", json={"prompt": "One two", "return_token_strs": True}).json()
    assert found["tokens"] == served.tokenizer.encode("One two") and found["count"] == len(found["tokens"]) == len(
        found["token_strs"]
    )
    assert found["max_model_len"] == 256
    assert httpx.post(f"{site.url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "One two"}
    chat = httpx.post(f"{site.url}/tokenize", json={"messages": ask("Hi")}).json()["tokens"]
    assert chat == served.tokenizer.apply_chat_template(ask("Hi"), add_generation_prompt=True)["input_ids"]
    for bad in ({}, {"prompt": "a", "messages": ask("b")}):
        assert httpx.post(f"{site.url}/tokenize", json=bad).status_code == 400


def test_small_routes(site: Site) -> None:
    assert httpx.get(f"{site.url}/health").status_code == httpx.get(f"{site.url}/ping").status_code == 200
    assert httpx.get(f"{site.url}/version").json()["version"]
    echoed = httpx.get(f"{site.url}/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"]
    assert echoed == "abc-1" and len(httpx.get(f"{site.url}/health").headers["x-request-id"]) == 32


def test_metrics_by_their_names(site: Site, client: openai.OpenAI) -> None:
    client.completions.create(model="toy", prompt="One two", max_tokens=5)
    text = httpx.get(f"{site.url}/metrics").text
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total", "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_sum",
        "vllm:e2e_request_latency_seconds_count", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
        "vllm:request_success_total", "vllm:num_preemptions_total", "kvloom_kv_kind_bytes",
    ):  # fmt: skip
        assert f"\n{name}{{" in text, name
    stats = httpx.get(f"{site.url}/stats").json()
    assert stats["model"] == "toy" and stats["ttft"]["p95"] > 0 and stats["finished"]["length"] > 0
    # asked-for answers that were cut at a stop string are no aborts
    before = stats["finished"]
    client.completions.create(model="toy", prompt="One two", stop="two")
    after = httpx.get(f"{site.url}/stats").json()["finished"]
    assert after["stop"] == before.get("stop", 0) + 1 and after.get("abort") == before.get("abort")


# what is refused

BAD: list[tuple[str, Any, str]] = [
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {}, "messages"),
    ("chat/completions", {"messages": ask("a"), "temprature": 1}, "Did you mean 'temperature'"),
    ("chat/completions", {"messages": ask("a"), "max_tokens": 0}, "max_tokens"),
    ("chat/completions", {"messages": ask("a"), "temperature": -1}, "temperature"),
    ("chat/completions", {"messages": ask("a"), "top_logprobs": 2}, "logprobs"),
    ("chat/completions", {"messages": ask("a"), "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ("chat/completions", {"messages": ask("a"), "stream_options": {"include_usage": True}}, "stream_options"),
    ("chat/completions", {"messages": ask("a"), "response_format": {"type": "json_schema"}}, "form"),
    ("chat/completions", {"messages": ask("a"), "guided_regex": "("}, "regex"),
    ("chat/completions", {"messages": ask("a"), "guided_regex": "a", "guided_choice": ["b"]}, "one"),
    ("chat/completions", {"messages": ask("a"), "guided_regex": "a", "min_tokens": 5}, "min_tokens"),
    ("chat/completions", {"messages": ask("a"), "tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {"messages": ask("a"), "cache": "h2o"}, "kivi(bits=4)"),
    ("chat/completions", {"messages": ask("a"), "logit_bias": {"99999": 1}}, "logit_bias"),
    ("chat/completions", {"messages": ask("a"), "logit_bias": {"-1": 1}}, "logit_bias"),
    ("chat/completions", {"messages": ask("a"), "n": 1000}, "n"),
    ("chat/completions", {"messages": ask("a"), "seed": 2**70}, "seed"),
    ("chat/completions", {"messages": ask("a"), "cache_salt": "refuse"}, "salt is refused"),
    ("chat/completions", {"messages": ask("a"), "stop": [""]}, "stop"),
    ("completions", {"prompt": ""}, "empty"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[]]}, "empty"),
    ("completions", {"prompt": [5000]}, "5000"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("completions", {"prompt": "a", "max_tokens": 256}, "context"),
    ("completions", {"prompt": "one two " * 300}, "context"),
    ("completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
    ("completions", {"prompt": ["a"] * 100, "n": 2}, "128"),
    ("completions", {"prompt": "a", "min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ("completions", [1], "object"),
    ("completions", None, "object"),
]


@pytest.mark.parametrize("path, body, why", BAD)
def test_bad_requests_are_told_what_is_wrong(site: Site, path: str, body: Any, why: str) -> None:
    found = httpx.post(f"{site.url}/v1/{path}", json=body)
    error = found.json()["error"]
    assert found.status_code == 400, error
    assert why in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe{}", b'{"prompt": "a" * 3}', b'{"prompt": ' + b"[" * 40_000, b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "guided_json": {"title": "\\ud800", "type": "objekt"}}', b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "temperature": 1e400}',
    ],
)  # fmt: skip
def test_malformed_bodies_are_no_errors_of_the_server(site: Site, content: bytes) -> None:
    found = httpx.post(f"{site.url}/v1/completions", content=content, headers={"content-type": "application/json"})
    assert found.status_code == 400 and found.json()["error"]["message"]


def test_errors_elsewhere_have_the_same_shape(site: Site) -> None:
    form = httpx.post(f"{site.url}/v1/completions", content=b'{"prompt": "a"}')
    assert form.status_code == 400 and "application/json" in form.json()["error"]["message"]
    assert httpx.get(f"{site.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    wrong = httpx.get(f"{site.url}/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"] and wrong.headers["allow"] == "POST"
    large = httpx.post(f"{site.url}/v1/completions", json={"prompt": "a" * 200_000})
    assert large.status_code == 413 and "100,000" in large.json()["error"]["message"]
    pieces = httpx.post(
        f"{site.url}/v1/completions",
        content=(b'"' + b"a" * 9_000 for _ in range(20)),
        headers={"content-type": "application/json"},
    )
    assert pieces.status_code == 413 and pieces.json()["error"]


def test_keys(served: Served) -> None:
    with serving(Toy(), served, key="s3cret") as site:
        assert httpx.get(f"{site.url}/v1/models").status_code == 401
        assert httpx.get(f"{site.url}/health").status_code == 200
        for wrong in ("Bearer s3cre", "Bearer s3crett", "Basic s3cret", "s3cret", "Bearer", "Bearer ä"):
            found = httpx.get(f"{site.url}/v1/models", headers={"Authorization": wrong.encode()})
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        assert httpx.post(f"{site.url}/tokenize", json={"prompt": "a"}).status_code == 401
        with openai.OpenAI(base_url=f"{site.url}/v1", api_key="s3cret") as client:
            assert client.models.list().data
        with (
            openai.OpenAI(base_url=f"{site.url}/v1", api_key="other") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_what_the_engine_is_asked(served: Served) -> None:
    toy = Toy()
    asked: list[Any] = []
    add, toy.add = toy.add, lambda request: (asked.append(request), add(request))  # type: ignore[method-assign]
    body = {
        "prompt": "One two", "n": 2, "seed": 7, "temperature": 1e-9, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"5": 2}, "cache": " kivi( bits=4)", "cache_salt": "mine",
        "priority": 3, "min_tokens": 1, "model": "pirate", "stop_token_ids": [9], "max_tokens": 3, "user": "me", "metadata": {"a": 1},
    }  # fmt: skip
    with serving(toy, served) as site:
        assert httpx.post(f"{site.url}/v1/completions", json=body).status_code == 200
        assert httpx.post(f"{site.url}/v1/completions", json={"prompt": "a", "cache": "full"}).status_code == 200
    first, second, third = asked
    s = first.sampling
    assert (s.seed, second.sampling.seed, s.temperature, s.top_p, s.top_k, s.min_p) == (7, 8, 0.01, 0.5, 0, 0.1)
    assert (s.presence, s.frequency, s.repetition, s.bias, s.stop, s.min_tokens) == (1, -1, 1.5, {5: 2}, {1, 9}, 1)
    assert (first.recipe, first.salt, first.priority, first.adapter) == ("kivi(bits=4)", "mine", 3, "pirate")
    assert third.recipe == "" and third.adapter == "" and first.id != second.id
    assert json.dumps(s.max_tokens) == "3"

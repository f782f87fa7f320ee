"""Requests with LoRA adapters beside others: each as if its adapter were merged into the weights and it ran alone."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from kvloom.engine.adapters import Adapters
from kvloom.engine.engine import Engine
from kvloom.engine.packed import Packed, Part
from kvloom.engine.pool import Pool
from kvloom.engine.request import Request, Sampling
from kvloom.engine.sequence import Outline, Sequence
from kvloom.errors import KvloomError, ModelError, RequestError
from tests.families import build, prompt, subject

TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "gpt_neox": ("query_key_value", "attention.dense", "dense_4h_to_h"),
}


def write(folder: Path, model: PreTrainedModel, targets: tuple[str, ...], seed: int, **config: Any) -> Path:
    """An adapter as PEFT writes it, of random numbers that matter."""
    draw = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": list(targets), **config}
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(targets):
            r = next((v for k, v in config.get("rank_pattern", {}).items() if name.endswith(k)), config["r"])
            start = f"base_model.model.{name}.lora_"
            tensors[f"{start}A.weight"] = torch.randn(r, module.in_features, generator=draw) / module.in_features**0.5
            tensors[f"{start}B.weight"] = torch.randn(module.out_features, r, generator=draw) * 0.2
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@torch.no_grad()
def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter in its weights."""
    from safetensors.torch import load_file

    twin = copy.deepcopy(model)
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        name, a, b = (
            key[len("base_model.model.") : -len(".lora_A.weight")],
            tensors[key],
            tensors[key.replace("_A", "_B")],
        )
        alpha = next((v for k, v in config.get("alpha_pattern", {}).items() if name.endswith(k)), config["lora_alpha"])
        scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        weight = twin.get_submodule(name).weight
        weight.copy_(weight.double() + scale * (b.double() @ a.double()))
    return twin


def zoo(folder: Path, family: str) -> tuple[PreTrainedModel, dict[str, Path]]:
    model, targets = subject(family), TARGETS[family]
    last = targets[-1]
    return model, {
        "all": write(folder / "all", model, targets, 1),
        "one": write(folder / "one", model, targets[:1], 2, r=16, lora_alpha=4),
        "stable": write(folder / "stable", model, targets[1:], 3, r=8, use_rslora=True),
        "mixed": write(folder / "mixed", model, targets, 4, rank_pattern={last: 2}, alpha_pattern={last: 3.0}),
    }


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_mixed_step_gives_what_merged_weights_give(family: str, tmp_path: Path) -> None:
    model, paths = zoo(tmp_path, family)
    pool = Pool(1 << 30)
    adapters = Adapters(model, pool, paths)
    packed, outline = Packed(model), Outline(model, "full", 512, 256)
    names = ["all", "", "one", "all", "stable", "mixed", "", "one"]
    texts = [prompt(5 + 3 * i, seed=i)[0].tolist() for i in range(len(names))]
    for name in {*names} - {""}:
        adapters.load(name)
    sequences = [Sequence(outline) for _ in names]

    def feed(pieces: list[list[int]]) -> torch.Tensor:
        with adapters.applied((name, len(piece)) for name, piece in zip(names, pieces, strict=True)):
            return packed.run([Part(s, piece) for s, piece in zip(sequences, pieces, strict=True)])

    first, *steps = feed([t[:-2] for t in texts]), feed([t[-2:-1] for t in texts]), feed([t[-1:] for t in texts])
    lone = {name: merged(model, path) for name, path in paths.items()} | {"": build(family)}
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        with torch.no_grad():
            want = lone[name](torch.tensor([text])).logits[0]
        for got, at in ((first, -3), (steps[0], -2), (steps[1], -1)):
            torch.testing.assert_close(got[i], want[at], atol=1e-5 * want.abs().max().item(), rtol=1e-5)
        if name:
            assert (want[-1] - lone[""](torch.tensor([text])).logits[0, -1]).abs().max() > 0.1  # adapters matter
    assert not any(x._forward_hooks for x in model.modules())
    assert pool.used == sum(adapters.find(name).nbytes for name in paths)


def run(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for request in requests:
        engine.add(request)
        found[request.id] = []
    while engine.busy:
        for output in engine.step():
            assert output.finish != "error", output.error
            if output.token is not None:
                found[output.id].append(output.token)
        assert engine.pool.used <= engine.pool.limit
        busy = {r.request.adapter for r in engine.live.values() if not r.waiting} - {""}
        assert busy <= {*engine.adapters.resident}
    return found


def asked(ids: list[int], adapter: str, tokens: int = 6, **options: Any) -> Request:
    return Request(ids, Sampling(max_tokens=tokens, temperature=0.0), adapter=adapter, **options)


@pytest.mark.parametrize("recipe", ["full", "kivi(bits=4, group=8, residual=16)"])
def test_the_engine_answers_as_each_request_alone(recipe: str, tmp_path: Path) -> None:
    """The same beginning under different adapters is no shared beginning; the same adapter's is."""
    model, paths = zoo(tmp_path, "llama")
    text = prompt(70)[0].tolist()
    requests = [asked(text, name) for name in ("all", "", "one", "stable", "mixed", "")]
    engine = Engine(model, recipe, part=32, adapters=paths)
    got = run(engine, requests)
    for request in requests:
        alone = Engine(model, recipe, part=32, adapters=paths, keep=False)
        again = copy.copy(request)
        assert run(alone, [again])[request.id] == got[request.id]
    if recipe == "full":
        for request in requests:
            plain = merged(model, paths[request.adapter]) if request.adapter else build("llama")
            ids = torch.tensor([text])
            found = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
            assert found[0, 70:].tolist() == got[request.id]
    assert len({tuple(x) for x in got.values()}) > 2
    late = asked(text, "one")
    engine.add(late)
    outputs = [x for _ in range(20) for x in engine.step() if x.id == late.id]
    assert outputs[0].cached == 64 and [x.token for x in outputs] == got[requests[2].id]


def test_adapters_and_caches_share_one_memory(tmp_path: Path) -> None:
    """S-LoRA: what is used is what sequences and adapters hold, to the byte; all of it comes back; it is never more than given."""
    model = subject("llama")
    paths = {f"a{i}": write(tmp_path / str(i), model, TARGETS["llama"][: 1 + i % 4], i, r=2 + i) for i in range(12)}
    roomy = Engine(model, part=16, adapters=paths, memory=1 << 26)
    texts = [prompt(20 + i, seed=i)[0].tolist() for i in range(24)]
    want = run(roomy, [asked(t, f"a{i % 12}", id=str(i)) for i, t in enumerate(texts)])
    most = max(roomy.adapters.find(name).nbytes for name in paths)
    tight = Engine(model, part=16, adapters=paths, keep=False, memory=3 * most + roomy.outline("").more(0, 80))
    got = run(tight, [asked(t, f"a{i % 12}", id=str(i)) for i, t in enumerate(texts)])
    assert got == want and tight.adapters.loads > 12 and roomy.adapters.loads == 12
    assert tight.pool.kinds()["adapter"] == sum(x.nbytes for x in tight.adapters.resident.values())
    while tight.adapters.evict(busy=()):
        pass
    assert (tight.pool.used, tight.pool.promised, tight.pool.holders) == (0, 0, 0)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 20))
def test_any_order_of_arrivals_is_served(seed: int, tmp_path: Path) -> None:
    """No fragmentation: whatever came and went before, what fits is begun."""
    draw, model = random.Random(seed), subject("llama")
    paths = {f"a{i}": write(tmp_path / str(i), model, ("q_proj",), i, r=1 << i) for i in range(6)}
    probe = Engine(model, part=16, adapters=paths)
    memory = probe.adapters.find("a5").nbytes + probe.outline("").more(0, 60)
    engine = Engine(model, part=16, adapters=paths, memory=memory, keep=False)
    waiting = [
        asked(prompt(draw.randint(2, 40), seed=i)[0].tolist(), draw.choice(["", *paths]), draw.randint(1, 8))
        for i in range(12)
    ]
    done = 0
    while waiting or engine.busy:
        for _ in range(draw.randint(0, 3)):
            if waiting:
                engine.add(waiting.pop())
        if engine.live and draw.random() < 0.1:
            engine.abort(draw.choice([*engine.live]))
        done += sum(x.finish is not None for x in engine.step())
        assert engine.pool.used <= memory
    assert done == 12


def test_one_memory_admits_what_any_split_admits(tmp_path: Path) -> None:
    model = subject("llama")
    paths = {f"a{i}": write(tmp_path / str(i), model, TARGETS["llama"], i, r=4 * (i + 1)) for i in range(5)}
    probe = Engine(model, part=16, adapters=paths)
    sizes = {name: probe.adapters.find(name).nbytes for name in paths}
    memory = sum(sizes.values()) // 2 + probe.outline("").more(0, 200)
    for seed in range(6):
        draw = random.Random(seed)
        requests = [asked(prompt(draw.randint(8, 60), seed=i)[0].tolist(), draw.choice(["", *paths])) for i in range(8)]
        engine = Engine(model, part=16, adapters=paths, memory=memory, keep=False)
        for request in requests:
            engine.add(request)
        engine.plan()
        begun = sum(not r.waiting for r in engine.live.values())
        needs = [probe.outline("").more(0, len(request.tokens)) for request in requests]
        for share in range(0, 101, 5):
            left, kv, held, n = memory * share // 100, memory - memory * share // 100, set[str](), 0
            for request, need in zip(requests, needs, strict=True):
                more = 0 if request.adapter in ("", *held) else sizes[request.adapter]
                if more > left or need > kv:
                    break
                left, kv, n = left - more, kv - need, n + 1
                held.add(request.adapter)
            assert n <= begun


def test_many_are_known_and_few_are_read(tmp_path: Path) -> None:
    model = subject("llama")
    folder = write(tmp_path / "x", model, ("q_proj", "v_proj"), 0)
    engine = Engine(model, adapters={f"tenant-{i}": folder for i in range(500)})
    assert len(engine.adapters) == 500 and not engine.adapters.resident and engine.pool.used == 0
    run(engine, [asked([1, 2, 3], "tenant-7"), asked([1, 2, 3], "tenant-9")])
    assert [*engine.adapters.resident] == ["tenant-7", "tenant-9"] and engine.stats()["adapters"] == 2
    with pytest.raises(RequestError, match=r"unknown adapter 'tenant-77x'. Did you mean 'tenant-77'"):
        engine.add(asked([1], "tenant-77x"))
    with pytest.raises(RequestError, match="already"):
        engine.adapters.add("tenant-7", folder)
    with pytest.raises(RequestError, match="bytes of KV memory"):
        Engine(model, adapters={"a": folder}, memory=engine.adapters.find("tenant-7").nbytes + 1000).add(
            asked([1] * 9, "a")
        )
    with pytest.raises(RequestError, match="layer inputs"):
        Engine(model, "xquant(bits=8)", adapters={"a": folder}).add(asked([1], "a"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "biases"),
    ({"peft_type": "IA3"}, "no LoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial"),
    ({"r": 5}, "another model"),
    ({"r": 0}, "rank"),
    ({"lora_alpha": "8"}, "number"),
    ({"alpha_pattern": {"(a+)+": 1}}, "repeated"),
    ({"rank_pattern": {"q_proj": 1 << 20}}, "rank"),
]


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    model = build("llama")

    def refused(folder: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match) as info:
            Engine(model, adapters={"mine": folder})
        assert "mine" in str(info.value) and isinstance(info.value, KvloomError)

    for i, (config, match) in enumerate(REFUSED):
        folder = write(tmp_path / str(i), model, ("q_proj",), 0)
        old = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(old | config))
        refused(folder, match)
    refused(tmp_path / "missing", "cannot be read")
    refused(write(tmp_path / "head", model, ("lm_head",), 0), "every token")
    refused(write(tmp_path / "other", build("llama", hidden_size=32), ("q_proj",), 0), "another model")
    folder = write(tmp_path / "bad", model, ("q_proj",), 0)
    for data in (
        b"",
        b"\xff" * 8,
        (100).to_bytes(8, "little") + b"{" * 100,
        (folder / "adapter_model.safetensors").read_bytes()[:-9],
    ):
        (folder / "adapter_model.safetensors").write_bytes(data)
        refused(folder, "header|cannot be read")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    refused(folder, "adapter_model.bin is not read")
    for name, x in (
        ("base_model.model.lm_head.bias", torch.zeros(3)),
        ("base_model.model.x.lora_embedding_A", torch.zeros(3, 3)),
    ):
        save_file({name: x}, folder / "adapter_model.safetensors")
        refused(folder, "Only plain LoRA")
    for config in ("[]", "{", "[" * 100_000, " " * (1 << 21)):
        (folder / "adapter_config.json").write_text(config)
        refused(folder, "no LoRA|cannot be read|longer")


def test_a_file_that_changed_ends_its_requests_alone(tmp_path: Path) -> None:
    model, paths = zoo(tmp_path, "llama")
    engine = Engine(model, adapters=paths)
    write(paths["one"], model, ("k_proj",), 0)
    (paths["all"] / "adapter_model.safetensors").unlink()
    requests = [asked(prompt(9)[0].tolist(), name) for name in ("one", "stable", "all", "")]
    for request in requests:
        engine.add(request)
    outputs = [x for _ in range(20) for x in engine.step()]
    ends = {x.id: x for x in outputs if x.finish}
    assert [ends[r.id].finish for r in requests] == ["error", "length", "error", "length"]
    assert "read any more" in ends[requests[0].id].error and "one" in ends[requests[0].id].error

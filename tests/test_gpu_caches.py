"""Caches on the GPU's kernels: in Triton's interpreter against plain torch, and on tensors whose numbers nobody can read.

Meta tensors stand for a GPU's: what would make the host wait for one (`.item()`, `.tolist()`, `nonzero`, a copy to the CPU)
raises on them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from kvloom import KVCache
from kvloom.errors import KvloomError
from kvloom.kernels import gpu, reference
from kvloom.kernels.dispatch import kernels_for
from kvloom.kernels.gpu import serving
from tests.test_gpu_kernels import hurry

pytestmark = pytest.mark.skipif(not gpu.available, reason="no Triton that is new enough")
VOCAB, LAYERS = 64, 2
INTERPRETED = serving.FORCED and os.environ.get("TRITON_INTERPRET") == "1"
KIVI = "kivi(bits=4, residual=32)"
RECIPES = ["full", KIVI, "snapkv(budget=36, window=8) | kivi(bits=2, residual=32)", "h2o(budget=24)"]
if INTERPRETED and gpu.available:
    hurry()


def test_interpreted() -> None:
    """Triton interprets in all of a process or not at all, so the first class of tests runs in one of its own."""
    if INTERPRETED:
        pytest.skip("the tests below run in this process")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "TestInterpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1", "KVLOOM_KERNELS": "triton", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout + ran.stderr


def llama(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).eval().to(dtype)


def prompt(rows: int, n: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, n), generator=torch.Generator().manual_seed(1))


def generate(model: Any, recipe: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and logits of every step."""
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, past_key_values=KVCache(model, recipe),
        do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0, **options,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


@torch.inference_mode()
def read(model: Any, recipe: str, ids: Tensor) -> Tensor:
    """Logits of a prompt, one token, a draft of three of which two are taken back, and one token."""
    cache, out = KVCache(model, recipe), []
    for piece in (ids[:, :-5], ids[:, -5:-4], ids[:, -4:-1]):
        out.append(model(piece, past_key_values=cache).logits)
    cache.crop(-2)
    out.append(model(ids[:, -3:-2], past_key_values=cache).logits)
    return torch.cat(out, 1).float()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was asked, and with which kinds of runs."""
    found: Counter[str] = Counter()

    def spy(name: str) -> None:
        inner = getattr(gpu, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            if name == "run":
                found["jobs"] += len(args[0])
                runs = [run for job in args[0] for part in job.parts for run in (*part.keys, *part.values)]
                found.update(type(run).__name__ for run in runs)
            return inner(*args, **kwargs)

        monkeypatch.setattr(gpu, name, outer)

    for name in ("run", "prefill", "observe", "encode"):
        spy(name)
    return found


@pytest.fixture
def plain() -> Iterator[pytest.MonkeyPatch]:
    """Call it to go on without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def without(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu, "runs_on", lambda device: False)
    assert kernels_for(torch.zeros(1)) is None


@pytest.mark.skipif(not INTERPRETED, reason="they run in the process that test_interpreted starts")
class TestInterpreted:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_generate(self, recipe: str, calls: Counter[str], plain: pytest.MonkeyPatch) -> None:
        model, ids = llama(), prompt(1, 44)
        tokens, logits = generate(model, recipe, ids, max_new_tokens=3)
        assert calls["prefill"] == LAYERS and calls["run"] == calls["jobs"] == 2 * LAYERS
        assert (calls["Packed"] > 0) == (calls["encode"] > 0) == ("kivi" in recipe)
        assert (calls["observe"] > 0) == ("h2o" in recipe) and calls["Dense"] > 0
        seen = calls.total()
        without(plain)
        expected = generate(model, recipe, ids, max_new_tokens=3)
        assert calls.total() == seen, "torch alone"
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], atol=3e-4, rtol=0)

    def test_a_padded_batch_is_one_launch(self, calls: Counter[str], plain: pytest.MonkeyPatch) -> None:
        model, ids = llama(), prompt(2, 40)
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        tokens, logits = generate(model, KIVI, ids, mask, max_new_tokens=2)
        assert calls["run"] == LAYERS and calls["jobs"] == 2 * LAYERS and calls["Packed"] > 0
        without(plain)
        expected = generate(model, KIVI, ids, mask, max_new_tokens=2)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], atol=3e-4, rtol=0)

    def test_beams(self, calls: Counter[str], plain: pytest.MonkeyPatch) -> None:
        model, ids = llama(), prompt(1, 36)
        tokens, logits = generate(model, "full", ids, max_new_tokens=3, num_beams=2)
        assert calls["run"] == 2 * LAYERS and calls["jobs"] == 2 * calls["run"]
        without(plain)
        expected = generate(model, "full", ids, max_new_tokens=3, num_beams=2)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], atol=3e-4, rtol=0)

    @pytest.mark.parametrize(
        ("dtype", "recipe"), [(torch.float32, "full"), (torch.float16, KIVI), (torch.bfloat16, "full")], ids=str
    )
    def test_drafts_and_crop(
        self, dtype: torch.dtype, recipe: str, calls: Counter[str], plain: pytest.MonkeyPatch
    ) -> None:
        """As close to the same weights in fp32 as plain torch in the model's own numbers."""
        model, ids = llama(dtype), prompt(1, 44)
        logits = read(model, recipe, ids)
        assert calls["run"] == 3 * LAYERS
        without(plain)
        expected, right = read(model, recipe, ids), read(llama(dtype).float(), recipe, ids)
        assert (logits - right).norm() <= 1.25 * (expected - right).norm() + 1e-5 * right.norm()


class OneDevice(TorchDispatchMode):
    """Every tensor is on the device, but for numbers on their way there: the table of a launch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sent = func in (torch.ops.aten._to_copy.default, torch.ops.aten.lift_fresh.default)
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() and not (sent and x.dtype == torch.int64):
                raise AssertionError(f"{func} of a CPU's tensor {tuple(x.shape)}")
        return out


class _Launch:
    """Counts launches in place of a kernel."""

    def __init__(self, name: str, counted: Counter[str]) -> None:
        self.name, self.counted = name, counted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in (grid if isinstance(grid, tuple) else (grid,)))
        return lambda *_, **__: self.counted.update([self.name])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels serve meta tensors, and launch nothing."""
    from kvloom.kernels.gpu import flash, mass, quantize, split

    def on(device: torch.device) -> bool:
        return device.type == "meta"

    found: Counter[str] = Counter()
    monkeypatch.setattr(gpu, "runs_on", on)
    monkeypatch.setattr(serving, "runs_on", on)
    for module, names in ((split, ("split", "merge")), (flash, ["prefill"]), (mass, ["mass"]), (quantize, ["encode"])):
        for name in names:
            monkeypatch.setattr(module, name, _Launch(name, found))
    return found


@pytest.mark.skipif(INTERPRETED, reason="the other process")
class TestNoWaiting:
    @pytest.mark.parametrize(
        ("recipe", "asked"),
        [("full", {"split"}), (KIVI, {"split", "merge", "encode"}), ("h2o(budget=24)", {"split"}),
         ("mikv(budget=24, interval=8)", {"split", "merge", "encode"}), ("snapkv(budget=60, window=8, interval=4)", {"split"}),
         ("snapkv(budget=60, window=8) | kivi(bits=2, residual=32)", {"split", "merge", "encode"})],
    )  # fmt: skip
    def test_a_step_reads_nothing_back(self, recipe: str, asked: set[str], launches: Counter[str]) -> None:
        """A prompt and then steps of two sequences: they append, evict and encode, and the host never waits."""
        model = llama(torch.bfloat16, "meta")
        ids, cache = torch.zeros(2, 150, dtype=torch.long, device="meta"), KVCache(model, recipe)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            assert launches.pop("prefill") == 2 * LAYERS
            assert (launches["mass"] > 0) == ("h2o" in recipe or "mikv" in recipe)
            launches.clear()
            with OneDevice():
                for _ in range(12):
                    model(ids[:, :1], past_key_values=cache)
        assert set(launches) == asked or set(launches) == {*asked, "merge"}
        # both sequences share a launch; a cache has at most three ways in which stretches are stored
        assert 12 * LAYERS <= launches["split"] <= 3 * 12 * LAYERS

    def test_reading_back_would_raise(self) -> None:
        x = torch.zeros(3, device="meta")
        for wait in (
            lambda: x[0].item(),
            lambda: x.tolist(),
            lambda: bool(x.any()),
            lambda: x.cpu(),
            lambda: x.nonzero(),
        ):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()

    @pytest.mark.parametrize("padding", [0, 3])
    def test_a_mask_is_fetched_once_in_a_forward(self, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model, ids = llama(), prompt(2, 20)
        mask, cache, fetched = torch.ones_like(ids), KVCache(model, "full"), []
        mask[0, :padding] = 0
        to_host = Tensor.cpu
        with torch.inference_mode():
            model(ids, attention_mask=mask, past_key_values=cache)
            monkeypatch.setattr(Tensor, "cpu", lambda x, *a, **k: (fetched.append(x.shape), to_host(x, *a, **k))[1])
            model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)
        assert fetched == [(2, 21)]


def test_torch_s_flash_attention_is_asked_for_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that a GPU gets, on meta tensors: out in the dtype of the queries, the log-sum-exp of every row in fp32."""
    monkeypatch.setattr(reference, "flash_serves", lambda *_: True)
    q, k = (torch.empty(h, 24, 64, device="meta", dtype=torch.bfloat16) for h in (8, 8))
    out, lse = reference.dense(q, k, k, 0.125, causal=True)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (8, 24) and lse.dtype == torch.float32


def test_flash_attention_is_for_gpus() -> None:
    q = torch.zeros(4, 8, 64, dtype=torch.bfloat16)
    assert not reference.flash_serves(q, q, q, True)


@pytest.fixture
def fresh() -> Iterator[None]:
    serving.obstacle.cache_clear()
    yield
    serving.obstacle.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(serving, "FORCED", False)
    assert serving.obstacle(cpu) == "they are for NVIDIA GPUs" and not serving.runs_on(cpu)
    serving.obstacle.cache_clear()
    monkeypatch.setattr(serving, "FORCED", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KvloomError, match=r"KVLOOM_KERNELS=triton.*TRITON_INTERPRET=1"):
        serving.runs_on(cpu)
    serving.obstacle.cache_clear()
    monkeypatch.setattr(serving, "available", False)
    with pytest.raises(KvloomError, match=r"Triton 3.5 or newer.*kvloom\[gpu\]"):
        serving.runs_on(cpu)
    serving.obstacle.cache_clear()
    monkeypatch.setattr(serving, "OFF", True)
    monkeypatch.setattr(serving, "FORCED", False)
    assert serving.obstacle(cpu) == "KVLOOM_KERNELS=torch"

"""The GPU's kernels against float64: on a GPU where there is one, elsewhere on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvloom.core.codec import Codec, Exact
from kvloom.kernels import gpu, native
from kvloom.segments.minmax import MinMax

pytestmark = pytest.mark.skipif(not gpu.available, reason="no Triton that is new enough")
CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not CUDA
DEVICE = "cuda" if CUDA else "cpu"
EXACT = Exact()
PLANES = ("codes", "scale", "zero")


def hurry() -> None:
    """Has the interpreter patch Triton's language once and not in every call, and not look for overflows of integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if INTERPRETED and gpu.available:
    hurry()


def test_interpreted() -> None:
    """Triton interprets in all of a process or not at all, so without a GPU the tests below run in one of their own."""
    if CUDA or INTERPRETED:
        pytest.skip("the tests below run in this process")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


def tokens(bits: int, group: int) -> MinMax:
    return MinMax(bits, group, "tokens")


def channels(bits: int, group: int | None) -> MinMax:
    return MinMax(bits, group, "channels")


Runs = list[tuple[Codec, int]]  # codec and slots of each


def make(
    keys: Runs, values: Runs, h: int = 1, rows: int = 4, dim: int = 64, value_dim: int = 64,
    dtype: torch.dtype = torch.float32, weigh: bool = False,
) -> tuple[native.Part, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """A part, its queries, and its keys and values as the codecs read them back, fp64."""
    q = torch.randn(h, rows, dim).to(dtype).to(DEVICE)
    part = native.Part(sum(n for _, n in keys))
    decoded = []
    for runs, width, into, queries in ((keys, dim, part.keys, q), (values, value_dim, part.values, None)):
        read = []
        for codec, n in runs:
            block = codec.encode(((torch.randn(h, n, width) + torch.randn(width)) * 2).to(dtype).to(DEVICE), {})
            read.append(codec.decode(block, {}).double())
            if isinstance(codec, MinMax):
                fields = (block[name].contiguous() for name in PLANES)
                into.append(gpu.packed(codec.along, codec.bits, codec.group or width, *fields, queries))
            else:
                into.append(gpu.dense(block["x"], queries))
        decoded.append(torch.cat(read, 1))
    if weigh:
        part.logw = torch.randn(h, part.n, device=DEVICE)
        part.logw[:, ::5] = -torch.inf
    part.scores = torch.empty(h, rows, part.n, device=DEVICE)
    return part, q, decoded[0], decoded[1]


def logits(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    s = q.double() * scale @ k.double().transpose(-1, -2)
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def check(
    part: native.Part, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    softcap: float | None = None,
) -> None:  # fmt: skip
    """The result of `attend` with scale 0.2 is what float64 gives, as closely as the numbers that are multiplied allow."""
    s = logits(q, k, 0.2, softcap)
    if part.logw is not None:
        s += part.logw[:, None].double()
    small = (CUDA and q.dtype != torch.float32) or q.dtype == torch.float16
    near = 1e-5 if not small else torch.finfo(q.dtype).eps
    size = max(1.0, float(s.abs().nan_to_num(0, 0, 0).max()))
    assert torch.allclose(part.scores.double(), s, atol=20 * near * size)
    assert torch.allclose(lse.double(), s.logsumexp(-1), atol=20 * near * size)
    expected = s.softmax(-1) @ v
    assert float((out - expected).norm() / expected.norm()) < 4 * near * size


@pytest.mark.skipif(not CUDA and not INTERPRETED, reason="they run in the process that test_interpreted starts")
class TestKernels:
    @pytest.mark.parametrize(
        ("keys", "values", "softcap", "options"),
        [
            ([(EXACT, 300)], [(EXACT, 300)], None, {"dim": 128, "value_dim": 80}),
            ([(EXACT, 70)], [(EXACT, 70)], 15.0, {"dtype": torch.bfloat16, "rows": 16}),
            ([(EXACT, 33)], [(EXACT, 33)], None, {"dtype": torch.float16, "rows": 1, "h": 2, "dim": 80}),
            # as KIVI holds a sequence: its planes freeze at different times
            ([(tokens(4, 32), 96), (EXACT, 21)], [(channels(4, 32), 85), (EXACT, 32)], None,
             {"dtype": torch.bfloat16, "dim": 128}),
            ([(tokens(2, 32), 160)], [(channels(2, 16), 160)], 15.0, {"dtype": torch.float16, "weigh": True}),
            ([(channels(2, None), 75)], [(channels(1, 32), 75)], None, {"dtype": torch.float16, "h": 3}),
            ([(tokens(1, 64), 64)], [(channels(8, 16), 64)], None, {"rows": 17}),
            ([(tokens(3, 32), 64)], [(channels(3, 16), 64)], None, {"dim": 80, "value_dim": 80}),
            # groups that are no power of two, begin anywhere, or are wider than a tile
            ([(tokens(3, 24), 72)], [(tokens(8, 24), 48), (tokens(2, 8), 24)], None, {"dim": 8, "value_dim": 24}),
            ([(channels(3, 8), 50), (EXACT, 30)], [(tokens(1, 40), 80)], 15.0, {"dim": 24, "value_dim": 40, "weigh": True}),
            ([(EXACT, 192)], [(tokens(4, 192), 192)], None, {"rows": 2}),
        ],
        ids=["fp32", "bf16", "fp16", "kivi", "kivi-weighed", "mikv", "many-rows", "3-bits", "odd", "odd-values", "wide"],
    )  # fmt: skip
    def test_attend(self, keys: Runs, values: Runs, softcap: float | None, options: dict[str, object]) -> None:
        torch.manual_seed(0)
        part, q, k, v = make(keys, values, **options)
        out, lse = gpu.attend(*q.shape, v.shape[2], [part], 0.2, softcap)
        check(part, q, k, v, out, lse, softcap)

    # a failure is not shrunk: the interpreter would take minutes
    @settings(max_examples=200 if CUDA else 16, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(data=st.data(), h=st.integers(1, 2), rows=st.integers(1, 17), seed=st.integers(0, 2**32))
    def test_any_cut(self, data: st.DataObject, h: int, rows: int, seed: int) -> None:
        """Runs of any codec, cut anywhere."""
        torch.manual_seed(seed)
        n, planes = data.draw(st.sampled_from([96, 192])), []
        for groups in ((8, 16, 24, 32), (8, 16, 24)):
            along = data.draw(st.sampled_from(["tokens", "channels"]))
            codec = MinMax(data.draw(st.sampled_from([1, 2, 3, 4, 8])), data.draw(st.sampled_from(groups)), along)
            frozen = data.draw(st.integers(0, n // codec.unit)) * codec.unit
            planes.append([run for run in ((codec, frozen), (EXACT, n - frozen)) if run[1]])
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        part, q, k, v = make(*planes, h, rows, 96, 48, dtype, data.draw(st.booleans()))
        out, lse = gpu.attend(h, rows, 96, 48, [part], 0.2, None)
        check(part, q, k, v, out, lse)

    def test_many(self) -> None:
        """Sequences of different lengths, heads and soft-capping in one call; one has two classes, one holds nothing."""
        torch.manual_seed(0)
        a, b, c, d = (make([(EXACT, n)], [(EXACT, n)], h=h, rows=2) for h, n in ((1, 140), (3, 5), (3, 9), (1, 40)))
        c[0].keys = [gpu.dense(c[2].float(), b[1])]
        parts = ([a[0]], [b[0], c[0]], [], [d[0]])
        jobs = [
            gpu.job(h, 2, 64, 64, x, 0.2, cap)
            for h, x, cap in zip((1, 3, 2, 1), parts, (None, None, None, 9.0), strict=True)
        ]
        gpu.run(jobs)
        found = [(job.out, job.lse) for job in jobs]
        check(*a, *found[0])
        check(*d, *found[3], softcap=9.0)
        s, v = logits(b[1], torch.cat([b[2], c[2]], 1), 0.2, None), torch.cat([b[3], c[3]], 1)
        assert torch.allclose(torch.cat([b[0].scores, c[0].scores], -1).double(), s, atol=1e-4)
        assert torch.allclose(found[1][1].double(), s.logsumexp(-1), atol=1e-4)
        assert torch.allclose(found[1][0].double(), s.softmax(-1) @ v, atol=1e-4)
        assert not found[2][0].any() and (found[2][1] == -torch.inf).all()

    def test_extremes(self) -> None:
        """Logits far apart and slots that are all hidden: no NaN, and what softmax gives."""
        part, q, k, v = make([(EXACT, 140)], [(EXACT, 140)], rows=2)
        q.zero_(), k.zero_()
        q[0, 0, 0], k[0, 13, 0], k[0, 60, 0] = 1e4, 1e4, -1e4
        part.keys = [gpu.dense(k.float(), q)]
        out, lse = gpu.attend(1, 2, 64, 64, [part], 1.0, None)
        assert torch.equal(out[0, 0].double(), v[0, 13]) and lse[0, 0] == 1e8
        assert torch.allclose(out[0, 1].double(), v[0].mean(0), atol=1e-6)
        out, _ = gpu.attend(1, 2, 64, 64, [part], 1.0, 30.0)
        assert torch.allclose(out[0, 0].double(), v[0, 13], atol=1e-4)
        part.logw = torch.full((1, 140), -torch.inf, device=DEVICE)
        out, lse = gpu.attend(1, 2, 64, 64, [part], 1.0, None)
        assert not out.any() and (lse == -torch.inf).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("along", "group", "n", "dim"),
        [("tokens", 32, 64, 16), ("tokens", 24, 48, 40), ("channels", None, 20, 24), ("channels", 8, 9, 40),
         ("channels", 16, 5, 64)],
    )  # fmt: skip
    def test_encode(self, along: str, group: int | None, n: int, dim: int, dtype: torch.dtype) -> None:
        """The same bits as torch: at any strides, where groups are constant, and where numbers saturate or vanish."""
        torch.manual_seed(0)
        x = (torch.randn(2, n, dim) * torch.rand(dim) * 10 + torch.randn(dim)).to(dtype)
        x[0, : n // 2, : dim // 2] = 3.0
        x[1, 0] *= 1e4
        x[1, 1] *= 1e-7
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if n == 20 else x
        for bits in (
            (1, 2, 3, 4, 8) if CUDA else {torch.float32: (2, 8), torch.float16: (4,), torch.bfloat16: (3, 1)}[dtype]
        ):
            block = MinMax(bits, group, along).encode(x, {})
            found = gpu.encode(x.to(DEVICE), along, bits, group or dim)
            for name, mine in zip(PLANES, found, strict=True):
                assert mine.dtype == block[name].dtype and torch.equal(mine.cpu(), block[name]), (bits, name)

    @pytest.mark.parametrize(
        ("dtype", "softcap", "past", "n", "m", "dim"),
        [(torch.float32, None, 100, 170, 70, 64), (torch.float16, 20.0, 0, 40, 40, 80), (torch.bfloat16, None, -30, 50, 64, 24),
         (torch.float32, None, 250, 300, 1, 128)],
    )  # fmt: skip
    def test_mass(self, dtype: torch.dtype, softcap: float | None, past: int, n: int, m: int, dim: int) -> None:
        """Attention summed over the rows of a forward, and over a window whose slots are in any order and weighed."""
        torch.manual_seed(0)
        q, k = torch.randn(4, m, dim, device=DEVICE).to(dtype), torch.randn(2, n, dim, device=DEVICE).to(dtype)
        lse, scale = torch.rand(4, m, device=DEVICE) + 4, dim**-0.5
        s = logits(q, k.repeat_interleave(2, 0), scale, softcap)
        row, slot = torch.arange(m, device=DEVICE), torch.arange(n, device=DEVICE)
        expected = ((s - lse[..., None]).exp() * (slot <= past + row[:, None])).sum(1)
        found = gpu.observe(q, k, lse, scale, past, softcap)
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
        heads = 1 if softcap else 2
        index = torch.randint(0, 200, (heads, n), dtype=torch.int32, device=DEVICE)
        last = torch.randint(100, 200, (m,), dtype=torch.int32, device=DEVICE)
        logw = torch.randn(heads, n, device=DEVICE)
        hidden, extra = (x.expand(2, n).repeat_interleave(2, 0)[:, None] for x in (index, logw))
        s = (s + extra).masked_fill(hidden > last[:, None], -torch.inf)
        lse = gpu.window_lse(q, k, index, last, scale, softcap, logw)
        assert torch.allclose(lse.double(), s.logsumexp(-1), atol=1e-5)
        found = gpu.window_mass(q, k, lse, index, last, scale, softcap, logw)
        assert torch.allclose(found.double(), s.softmax(-1).sum(1), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("dtype", "softcap", "causal", "n", "m", "dim", "value_dim"),
        [(torch.float32, None, True, 50, 50, 64, 64), (torch.float16, 30.0, True, 140, 133, 80, 64),
         (torch.bfloat16, None, False, 70, 20, 24, 40), (torch.float32, None, True, 20, 50, 64, 128)],
    )  # fmt: skip
    def test_prefill(
        self, dtype: torch.dtype, softcap: float | None, causal: bool, n: int, m: int, dim: int, value_dim: int
    ) -> None:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(h, rows, d, device=DEVICE).to(dtype)
            for h, rows, d in ((4, m, dim), (2, n, dim), (2, n, value_dim))
        )
        out, lse = gpu.prefill(q, k, v, 0.2, causal, softcap)
        s = logits(q.unflatten(0, (2, 2)), k[:, None], 0.2, softcap)
        if causal:
            s = s.masked_fill(torch.arange(n, device=DEVICE) > torch.arange(m, device=DEVICE)[:, None], -torch.inf)
        expected = (s.softmax(-1) @ v[:, None].double()).flatten(0, 1)
        assert out.dtype == dtype and torch.allclose(lse.double(), s.logsumexp(-1).flatten(0, 1), atol=1e-4)
        assert float((out - expected).norm() / expected.norm()) < max(2 * torch.finfo(dtype).eps, 1e-5)
        out, lse = gpu.prefill(q, k[:, :0], v[:, :0], 0.2, causal)
        assert not out.any() and (lse == -torch.inf).all()


def test_serves() -> None:
    """Only what lies on a GPU."""
    q = torch.zeros(1, 1, 64)
    assert not gpu.serves(q, 64)
    if CUDA:
        assert gpu.serves(q.cuda(), 80)
        assert not gpu.serves(q.cuda(), 20) and not gpu.serves(q.cuda().double(), 64)
        assert not gpu.serves(q.cuda().requires_grad_(), 64)

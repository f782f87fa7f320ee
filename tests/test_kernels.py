"""The compiled kernels against plain torch in float64, and a layer with them against the same layer without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core.attention import Logits
from kvloom.core.codec import Codec, Exact
from kvloom.core.layer import Layer, Steps
from kvloom.core.registry import parse
from kvloom.core.site import Site
from kvloom.core.together import together
from kvloom.kernels import native
from kvloom.segments.balance import Balance
from kvloom.segments.minmax import MinMax

pytestmark = pytest.mark.skipif(native.ISA is None, reason="installed without compiled kernels")
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


DOTS = ["float", "int8"] if native.DOT == "int8" else ["float"]


@contextmanager
def multiplying(dot: str) -> Iterator[None]:
    """Packed codes that are described in here are multiplied by weights of that kind."""
    before, native.DOT, native.WHOLE_BITS = (native.DOT, native.WHOLE_BITS), dot, 4
    try:
        yield
    finally:
        native.DOT, native.WHOLE_BITS = before


def attend(
    h: int, rows: int, dim: int, value_dim: int, parts: list[native.Part], scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One job alone."""
    job = native.job(h, rows, dim, value_dim, parts, scale, softcap)
    native.run([job])
    return job.out, job.lse


def packed(along: str) -> st.SearchStrategy[Codec]:
    return st.builds(MinMax, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([8, 16, 24, 32, 64]), st.just(along))


CODECS = st.one_of(st.builds(Exact), packed("tokens"), packed("channels"), st.builds(Balance, packed("tokens")))


def make_part(
    keys: list[tuple[Codec, torch.Tensor]], values: list[tuple[Codec, torch.Tensor]], q: torch.Tensor
) -> tuple[native.Part, torch.Tensor, torch.Tensor]:
    """A part of these runs, and its keys and values as the codecs read them back, [h, n, D] fp64."""
    part = native.Part(sum(x.shape[1] for _, x in keys), kept=[q])
    decoded: list[torch.Tensor] = []
    for runs, into, queries in ((keys, part.keys, q), (values, part.values, None)):
        read = []
        for codec, x in runs:
            const = {"balance": torch.rand(x.shape[0], x.shape[2]) + 0.5}
            block = {name: y.contiguous() for name, y in codec.encode(x, const).items()}
            part.kept += [*block.values(), *const.values()]
            described = codec.describe(block, const, queries, part.kept)
            assert described is not None
            into.append(described)
            read.append(codec.decode(block, const).double())
        decoded.append(torch.cat(read, 1))
    return part, decoded[0], decoded[1]


@settings(max_examples=250, deadline=None)
@given(
    data=st.data(), h=st.integers(1, 3), rows=st.integers(1, 17), dim=st.sampled_from([8, 24, 64, 72, 80, 128]),
    value_dim=st.sampled_from([8, 40, 64, 96, 128]), softcap=st.sampled_from([None, None, 20.0]), weigh=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_against_float64(
    data: st.DataObject, h: int, rows: int, dim: int, value_dim: int, softcap: float | None, weigh: bool, seed: int
) -> None:
    """Any cut of the planes into runs, any codec, dtype, group and number of rows; scores and log-weights too."""
    generator = torch.Generator().manual_seed(seed)
    units = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype = data.draw(DTYPES)

    def runs(width: int, codecs: st.SearchStrategy[Codec], size: float) -> list[tuple[Codec, torch.Tensor]]:
        found = []
        for a, b in pairwise([0, *torch.tensor(units).cumsum(0).tolist()]):
            codec = data.draw(codecs)
            if isinstance(codec, MinMax) and codec.along == "channels" and width % (codec.group or width):
                codec = MinMax(codec.bits, 8, "channels")
            x = torch.randn(h, (b - a) * 192, width, generator=generator) * size
            found.append((codec, x.to(dtype)))
        return found

    keys, values = runs(dim, CODECS, 3.0), runs(value_dim, CODECS.filter(lambda c: not isinstance(c, Balance)), 1.0)
    q = torch.randn(h, rows, dim, generator=generator)
    with multiplying("float"):
        part, k, v = make_part(keys, values, q)
    part.scores = torch.empty(h, rows, part.n)
    if weigh:
        part.logw = torch.randn(h, part.n, generator=generator)
        part.logw[:, ::5] = -torch.inf
    scale = dim**-0.5
    out, lse = attend(h, rows, dim, value_dim, [part], scale, softcap)
    s = q.double() * scale @ k.transpose(1, 2)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s if part.logw is None else s + part.logw[:, None].double()
    assert torch.allclose(part.scores.double(), s, atol=2e-4, rtol=1e-5)
    assert torch.allclose(lse.double(), s.logsumexp(-1), atol=1e-4)
    expected = s.softmax(-1) @ v
    assert float((out - expected).norm() / expected.norm()) < 2e-5 * max(1.0, float(s.abs().nan_to_num(0, 0, 0).max()))


def window(x: torch.Tensor, reach: int) -> torch.Tensor:
    """The greatest of [..., n] among the neighbours that are less than `reach` away."""
    return F.max_pool1d(x.flatten(0, -2)[:, None], 2 * reach - 1, 1, reach - 1)[:, 0].view(x.shape)


@pytest.mark.skipif(DOTS == ["float"], reason="this instruction set multiplies in floats")
@settings(max_examples=50, deadline=None)
@given(
    h=st.integers(1, 3), rows=st.integers(1, 17), dim=st.sampled_from([8, 64, 72, 80, 96, 128, 256]),
    bits=st.integers(1, 4), group=st.sampled_from([8, 16, 24, 32, 64]), units=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    outliers=st.booleans(), peaked=st.booleans(), seed=st.integers(0, 2**32), small=DTYPES,
)  # fmt: skip
def test_whole_numbers(
    h: int, rows: int, dim: int, bits: int, group: int, units: list[int], outliers: bool, peaked: bool, seed: int,
    small: torch.dtype,
) -> None:  # fmt: skip
    """Queries and weights rounded to 8 bits: never further off than half a step of each, and on the whole as little as
    uniform noise of that size. Steps are those of the blocks that `native/dots.h` describes."""
    draw = torch.Generator().manual_seed(seed)
    key = MinMax(bits, group, "tokens")
    value = MinMax(bits, group if dim % group == 0 else 8, "channels")
    size = torch.ones(dim)
    size[:: max(8, dim // 4)] = 15.0 if outliers else 1.0
    runs = [torch.randn(2, h, n * 192, dim, generator=draw) * size for n in units]
    keys, values = ([(codec, x[i].to(small)) for x in runs] for i, codec in enumerate((key, value)))
    q = torch.randn(h, rows, dim, generator=draw) * (8.0 if peaked else 1.0)
    with multiplying("int8"):
        part, k, v = make_part(keys, values, q)
    part.scores = torch.empty(h, rows, part.n)
    part.logw = torch.randn(h, part.n, generator=draw)
    scale = dim**-0.5
    out, lse = attend(h, rows, dim, dim, [part], scale, None)

    def parts(codec: MinMax, runs: list[tuple[Codec, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales, and how far codes are from the middle one: [h, n, D] fp64."""
        blocks = [codec.encode(x, {}) for _, x in runs]
        ones = [{**b, "scale": torch.ones_like(b["scale"]), "zero": torch.zeros_like(b["zero"])} for b in blocks]
        codes = torch.cat([codec.decode(b, {}) for b in ones], 1).double()
        zeros = [{**b, "codes": torch.full_like(b["codes"], 255), "zero": torch.zeros_like(b["zero"])} for b in blocks]
        tops = torch.cat([codec.decode(b, {}) for b in zeros], 1).double()
        return tops / (2**bits - 1), (codes - (2**bits - 1) / 2).abs()

    step, off = parts(key, keys)
    weight = (q.double() * scale)[:, :, None] * step[:, None]  # [h, R, n, D]
    each = [b.abs().amax(-1, True).expand_as(b) for b in weight.split(512 >> bits, -1)]
    off_step = torch.cat(each, -1) / 127 * off[:, None]
    s = q.double() * scale @ k.transpose(1, 2) + part.logw[:, None].double()
    wrong = part.scores.double() - s
    assert bool((wrong.abs() <= off_step.sum(-1) / 2 + 2e-5 * s.abs().max() + 1e-4).all())
    noise = float((off_step**2 / 12).sum().sqrt())
    assert float(wrong.norm()) < 1.5 * noise + 2e-5 * float(s.norm())
    used = part.scores.double()
    assert torch.allclose(lse.double(), used.logsumexp(-1), atol=1e-4)
    step, off = parts(value, values)
    p = used.softmax(-1)
    weight = p[:, :, None] * step.transpose(1, 2)[:, None]  # [h, R, D, n]
    most = window(weight, 64) / 127 * off.transpose(1, 2)[:, None]  # wherever the blocks of slots begin
    wrong = (out.double() - p @ v).abs()
    assert bool((wrong <= most.sum(-1) / 2 + 2e-5 * float(v.abs().max())).all())
    assert float(wrong.norm()) < 1.5 * float((most**2 / 12).sum().sqrt()) + 2e-5 * float((p @ v).norm())


def test_extremes() -> None:
    """Logits far apart, slots that are all hidden, huge and tiny numbers: no NaN, and what softmax gives."""
    q, k, v = torch.zeros(1, 2, 64), torch.zeros(1, 700, 64), torch.randn(1, 700, 64)
    q[0, 0, 0], k[0, 13, 0], k[0, 600, 0] = 1e4, 1e4, -1e4
    part, _, _ = make_part([(Exact(), k)], [(Exact(), v)], q)
    out, lse = attend(1, 2, 64, 64, [part], 1.0, None)
    assert torch.equal(out[0, 0], v[0, 13]) and lse[0, 0] == 1e8
    assert torch.allclose(out[0, 1], v[0].mean(0), atol=1e-6)
    part.logw = torch.full((1, 700), -torch.inf)
    out, lse = attend(1, 2, 64, 64, [part], 1.0, None)
    assert not out.any() and (lse == -torch.inf).all()
    out, lse = attend(1, 2, 64, 64, [], 1.0, None)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dot", DOTS)
def test_same_bits_for_any_number_of_threads(dot: str) -> None:
    q = torch.randn(4, 4, 64)
    codec = MinMax(4, 32, "tokens")
    with multiplying(dot):
        part, _, _ = make_part(
            [(codec, torch.randn(4, 4096, 64)), (Exact(), torch.randn(4, 33, 64))],
            [(MinMax(4, 32, "channels"), torch.randn(4, 4000, 64)), (Exact(), torch.randn(4, 129, 64))], q,
        )  # fmt: skip
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found += [attend(4, 4, 64, 64, [part], 0.125, None) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1]) for out, lse in found)


def test_callers_at_once_and_after_a_fork() -> None:
    """Several Python threads share the pool, and a forked process makes its own."""
    script = """
import os, threading, torch
from kvloom.kernels import native
q, k, v = torch.randn(4, 4, 64), torch.randn(4, 9000, 64), torch.randn(4, 9000, 64)
part = native.Part(9000, [native.dense(k, q)], [native.dense(v)])
torch.set_num_threads(3)
def attend():
    job = native.job(4, 4, 64, 64, [part], 0.125, None)
    native.run([job])
    return job.out
want = attend()
wrong = []
def work():
    for _ in range(40):
        if not torch.equal(attend(), want):
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(attend(), want) else 3)
assert os.waitpid(child, 0)[1] == 0 and not wrong
"""
    ran = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("dot", DOTS)
@pytest.mark.parametrize("recipe", ["full", "snapkv(budget=40, window=8) | kivi"])
def test_a_batch_is_one_call_and_the_same_bits(recipe: str, dot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of unequal lengths decode together in one call, each as it does alone."""
    monkeypatch.setattr(native, "DOT", dot)
    monkeypatch.setattr(native, "WHOLE_BITS", 4)
    found, site = parse(recipe), Site(0, 1, 4, 2, 32, 32, torch.float32, lambda: None)
    calls: list[int] = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda jobs: (calls.append(len(jobs)), run(jobs)))
    draw, logits, lengths = torch.Generator().manual_seed(0), Logits(0.2), (60, 9, 137)
    rows = [[torch.randn(h, n + 5, 32, generator=draw) for h in (4, 2, 2)] for n in lengths]

    def filled() -> list[Layer]:
        layers = []
        for (q, k, v), n in zip(rows, lengths, strict=True):
            layers.append(Layer(site, found.bind([site])))
            together([layers[-1].forward(q[:, :n], k[:, :n], v[:, :n], logits, None, None)])
        calls.clear()
        return layers

    def step(layer: Layer, i: int, t: int) -> Steps:
        q, k, v = (x[:, lengths[i] + t : lengths[i] + t + 1] for x in rows[i])
        return layer.forward(q, k, v, logits, None, None)

    layers = filled()
    batch = [together([step(layer, i, t) for i, layer in enumerate(layers)]) for t in range(5)]
    assert calls == [3] * 5
    alone = [[together([step(layer, i, t)])[0] for t in range(5)] for i, layer in enumerate(filled())]
    assert all(torch.equal(batch[t][i], alone[i][t]) for t in range(5) for i in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe", ["full", "streamingllm(sinks=2, window=40)", "h2o(budget=64)", "snapkv(budget=64, window=8) | kivi", "mikv",
               "kivi(bits=2)", "kivi(bits=3, group=64, residual=64)"],
)  # fmt: skip
def test_a_layer_with_and_without(recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, single tokens and a few rows at once: the layer decodes the same on torch alone."""
    torch.manual_seed(0)
    found = parse(recipe)
    site = Site(0, 1, 8, 2, 64, 64, dtype, lambda: None)
    layers = [Layer(site, found.bind([site])) for _ in range(2)]
    assert native.ISA is not None
    for m in (300, *[1] * 40, 5, *[1] * 30):
        q, k, v = (torch.randn(h, m, 64).to(dtype) for h in (8, 2, 2))
        outs = []
        for layer, isa in zip(layers, (native.ISA, None), strict=True):
            monkeypatch.setattr(native, "ISA", isa)
            outs.append(together([layer.forward(q, k, v, Logits(0.125), None, None)])[0].float())
        assert torch.allclose(outs[0], outs[1], atol=2e-5 if dtype == torch.float32 else 1e-2), recipe


@pytest.mark.skipif(DOTS == ["float"], reason="this instruction set multiplies in floats")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_layer_in_whole_numbers(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What whole numbers change in a layer's output is less than a quarter of what its codes do."""
    torch.manual_seed(0)
    site = Site(0, 1, 8, 2, 64, 64, torch.float32, lambda: None)
    recipes = [parse(f"kivi(bits={bits})"), parse(f"kivi(bits={bits})"), parse("full")]
    layers, outs = [Layer(site, recipe.bind([site])) for recipe in recipes], []
    for m in (600, *[1] * 20, 5):
        q, k, v = (torch.randn(h, m, 64) * size for h, size in ((8, 1.0), (2, 2.0), (2, 1.0)))
        found = []
        for layer, dot in zip(layers, ("int8", "float", "float"), strict=True):
            monkeypatch.setattr(native, "DOT", dot)
            monkeypatch.setattr(native, "WHOLE_BITS", 4)
            found.append(together([layer.forward(q, k, v, Logits(0.125), None, None)])[0])
        outs.append(torch.stack(found))
    whole, floats, full = torch.cat(outs[1:], 2)
    assert 0 < float((whole - floats).norm()) < 0.25 * float((floats - full).norm())


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """The kernels of smaller machines pass the same tests."""
    if isa == native.ISA or os.environ.get("KVLOOM_ISA"):
        pytest.skip("this is what the other tests ran on")
    env = {**os.environ, "KVLOOM_ISA": isa}
    asked = [sys.executable, "-c", "from kvloom.kernels import native; print(native.ISA)"]
    if subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}")
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__], env=env)
    assert ran.returncode == 0

"""Kernels that decode a tile at a time, against the same in torch: every codec, and keys that turn when read."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvloom.core.codec import Codec, Exact
from kvloom.core.rope import Rope
from kvloom.core.run import Run
from kvloom.core.site import Site
from kvloom.core.tap import Tap
from kvloom.kernels import native
from kvloom.segments.fewbits import Sign, Ternary
from kvloom.segments.levels import Levels
from kvloom.segments.lowrank import LowRank
from kvloom.segments.minmax import MinMax
from kvloom.segments.outliers import ChannelOutliers, RangeOutliers, TokenOutliers
from kvloom.segments.pairs import Pairs
from kvloom.segments.permute import Permute
from kvloom.segments.pooled import Pooled
from kvloom.segments.product import Product
from kvloom.segments.project import Project
from kvloom.segments.ranges import ChannelScale, RunMinMax, TokenMinMax
from kvloom.segments.rotate import Rotate, rotation
from kvloom.segments.sphere import SignResidual, Sphere
from kvloom.segments.split import ByRange
from tests.test_codecs import codecs, draw_block

pytestmark = pytest.mark.skipif(native.ISA is None, reason="needs the compiled kernels")


def attention(
    q: Tensor,
    keys: list[Run],
    values: list[Run],
    scale: float = 0.3,
    logw: Tensor | None = None,
    cap: float | None = None,
    emit: bool = True,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """By the compiled kernels: out [h, R, Dv], lse [h, R] and logits [h, R, n]; None where they do not serve."""
    n, kept = sum(run.n for run in keys), [native.queries(q)]
    scores = torch.empty(*q.shape[:2], n if emit else 0)
    part = native.Part(n, logw=logw, scores=scores if emit else None, kept=kept)
    for run in keys:
        part.keys.append(run.describe(kept[0], kept))
    for run in values:
        part.values.append(run.describe(None, kept))
    if None in part.keys or None in part.values:
        return None
    job = native.job(*q.shape, q.shape[2], [part], scale, cap)
    native.run([job])
    return job.out, job.lse, scores


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float = 0.3, logw: Tensor | None = None, cap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    s = (q.double() * scale) @ k.double().transpose(1, 2)
    s = s if cap is None else cap * (s / cap).tanh()
    s = s if logw is None else s + logw[:, None]
    return s.softmax(-1) @ v.double(), s.logsumexp(-1), s


def close(found: Any, expected: Any, size: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-4 * size, rtol=2e-4)


def run_of(codec: Codec, h: int, units: int, dim: int, seed: int, dtype: torch.dtype, tap: Tap | None = None) -> Run:
    _, const, block = draw_block(codec, h, units, dim, seed, 1.0, dtype)
    return Run(codec, block, const, tap)


@settings(max_examples=150, deadline=None)
@given(
    key=codecs(), value=codecs(), h=st.integers(1, 3), rows=st.sampled_from([1, 2, 4, 7, 8]),
    dim=st.sampled_from([8, 16, 24, 40, 64]), blocks=st.integers(1, 3), seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), weighted=st.booleans(),
    cap=st.sampled_from([None, 5.0]),
)  # fmt: skip
def test_every_codec(
    key: Codec, value: Codec, h: int, rows: int, dim: int, blocks: int, seed: int, dtype: torch.dtype, weighted: bool,
    cap: float | None,
) -> None:  # fmt: skip
    n = 48 * blocks  # whole units of all
    torch.manual_seed(seed)
    k, v = (run_of(each, h, n // each.unit, dim, seed + i, dtype) for i, each in enumerate((key, value)))
    q, logw = torch.randn(h, rows, dim), torch.randn(h, n) if weighted else None
    found = attention(q, [k], [v], logw=logw, cap=cap)
    assert found is not None, (key, value)
    keys, values = k.decode().float(), v.decode().float()
    size = max(1.0, float(values.abs().max()), float(keys.abs().max()) if native.DOT == "float" else 20.0)
    decoded = {each.decode().dtype for each in (k, v)}  # torch rounds to it, the kernels don't
    size *= 30 if torch.bfloat16 in decoded else 4 if torch.float16 in decoded else 1
    close(found, plain(q, keys, values, logw=logw, cap=cap), size)


@pytest.mark.parametrize("codec", [Product(2), Product(4, 4), Product(2, 3), Pairs((1.0, 2.0)), Permute(Pairs((1.0,)))])
@pytest.mark.parametrize("dim", [32, 64])
def test_codes_of_several_numbers(codec: Codec, dim: int) -> None:
    k, v = (run_of(codec, 2, 300, dim, seed, torch.float32) for seed in (1, 2))
    q = torch.randn(2, 4, dim)
    found = attention(q, [k], [v])
    assert found is not None
    close(found, plain(q, k.decode().float(), v.decode().float()), 10.0)


@settings(max_examples=60, deadline=None)
@given(
    key=codecs(), h=st.integers(1, 3), dim=st.sampled_from([16, 24, 64]), seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), layout=st.sampled_from(["half", "interleaved"]),
    part=st.booleans(), start=st.sampled_from([0, 1, 60, 20000]), column=st.sampled_from([None, "one", "heads"]),
    scaling=st.sampled_from([1.0, 1.3]),
)  # fmt: skip
def test_keys_that_turn(
    key: Codec, h: int, dim: int, seed: int, dtype: torch.dtype, layout: Any, part: bool, start: int, column: str | None,
    scaling: float,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    size = dim // 2 if part else dim
    rope = Rope(1e4 ** (-torch.arange(0, size, 2) / size), layout, size, dim - size, scaling)
    run = run_of(key, h, 96 // key.unit, dim, seed, dtype)
    heads = h if column == "heads" else 1
    places = torch.stack([torch.randperm(4096)[:96].sort().values + start for _ in range(heads)]).int()
    run = Run(key, run.block, run.const, Tap(rope, torch.float32), start if column is None else places)
    values = run_of(Exact(), h, 96, dim, seed, torch.float32)
    q = torch.randn(h, 4, dim)
    found = attention(q, [run], [values])
    expected = plain(q, run.decode().float(), values.decode())
    if "SignResidual" in repr(key):
        assert found is None  # a sum of two codes does not turn as one
    else:
        assert found is not None, key
        close(found, expected, {torch.bfloat16: 500.0, torch.float16: 80.0}.get(run.decode().dtype, 40.0))


@pytest.mark.parametrize(
    "codec",
    [RunMinMax(4, 16), TokenMinMax(4), TokenMinMax(8), ChannelScale(TokenMinMax(2)), ChannelScale(RunMinMax(2, 16))],
)
def test_ranges_that_reach_further(codec: Codec) -> None:
    x = torch.randn(3, 96, 64)
    const = {"channel": torch.rand(3, 64) + 0.5}
    run, exact = Run(codec, codec.encode(x, const), const), Run(Exact(), {"x": x}, {})
    inside = Run(LowRank(codec, 2), LowRank(codec, 2).encode(x, const), const)  # where it is one of several terms
    for rows in (1, 4):
        q = torch.randn(3, rows, 64)
        for keys, values in ((run, exact), (exact, run), (inside, inside)):
            found = attention(q, [keys], [values])
            assert found is not None
            close(found, plain(q, keys.decode().float(), values.decode().float()), 20.0)


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("dim", [24, 64])
def test_signs_trits_and_parts(rows: int, dim: int) -> None:
    x, y, q = torch.randn(2, 3, 320, dim), torch.randn(3, 320, dim), torch.randn(3, rows, dim)
    split = ByRange(MinMax(2, 32, "tokens"), Rotate(Sign(32), "fourier"), 0.5)
    wide = dim - split.width(dim)
    order = {"order": torch.randperm(dim)[None].to(torch.int16), "rotation": rotation("fourier", wide, None)}
    for codec, const in ((Sign(32), {}), (Ternary(32), {}), (Ternary(24 if dim == 24 else 64), {}), (split, order)):
        k, v = (Run(codec, codec.encode(each[:, : 320 // codec.unit * codec.unit], const), const) for each in (x[0], y))
        found = attention(q, [k], [v])
        assert found is not None, codec
        close(found, plain(q, k.decode().float(), v.decode().float()), 10.0 if native.DOT == "float" else 100.0)


@pytest.mark.parametrize("inner", [Exact(), MinMax(4, 32, "channels"), MinMax(2, 32, "tokens"), Product(2)])
@pytest.mark.parametrize("reads", [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
def test_heads_that_read_others(inner: Codec, reads: list[int]) -> None:
    codec, q, const = Pooled(inner), torch.randn(4, 4, 64), {"reads": torch.tensor(reads)}
    if isinstance(inner, Product):
        const["book"] = torch.randn(1, 32, 256, 2).half()
    k, v = (Run(codec, codec.encode(torch.randn(4, 320, 64), const), const) for _ in range(2))
    found = attention(q, [k], [v])
    assert found is not None
    close(found, plain(q, k.decode().float(), v.decode().float()), 40.0)
    wrong = {**const, "reads": torch.tensor([0, 0, 0, 2])}
    assert Run(codec, k.block, wrong).describe(q, []) is None  # it would read past the end


@pytest.mark.parametrize("join", [1, 2, None])
@pytest.mark.parametrize("rank", [5, 16, 37])
@pytest.mark.parametrize("tapped", [False, True])
def test_few_directions(join: int | None, rank: int, tapped: bool) -> None:
    """Rows that heads share, a mean that all slots share, and directions turned in strips of 6, 4 and 1."""
    together = join or 4
    basis = torch.linalg.qr(torch.randn(4 // together, together * 64, rank))[0].unflatten(1, (together, 64))
    const = {"basis": basis.contiguous(), "mean": torch.randn(4 // together, together, 64)}
    codec = Project(Exact(), rank, join, tap="pre-rope" if tapped else "post-rope")
    blocks = [codec.encode(torch.randn(4, 600, 64), const) for _ in range(2)]
    k, v = Run(codec, blocks[0], const, tap() if tapped else None), Run(codec, blocks[1], const)
    q = torch.randn(4, 5, 64)
    found = attention(q, [k], [v])
    if join == 2 and tapped:
        assert found is None  # what turns is asked by heads that share nothing, or all
    else:
        assert found is not None
        close(found, plain(q, k.decode().float(), v.decode().float()), 10.0)


class Allocated(TorchDispatchMode):
    """Bytes of all tensors made inside, whether freed again or not."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.known = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.known.add(x.untyped_storage().data_ptr())
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.bytes += x.untyped_storage().nbytes()
        return out


def heap() -> int:
    """Bytes that the C library has given out."""
    fields = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    info = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = info
    found = ask()
    return int(found.uordblks + found.hblkhd)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_a_step_allocates_little() -> None:
    """At 16,384 slots attention allocates less than an eighth of a layer's dense keys, what the kernels keep included."""
    h, n, dim, steps = 2, 16384, 64, []
    x, q = torch.randn(h, n, dim), torch.randn(h, 4, dim)
    site = Site(0, 1, h, h, dim, dim, torch.float32, lambda: None)
    pairs = (
        (MinMax(2, 32, "tokens"), MinMax(4, 32, "channels")),
        (LowRank(ChannelOutliers(MinMax(2, 64, "tokens"), 0.02), 4), LowRank(TokenOutliers(MinMax(2, 64, "channels"), 0.02), 4)),
        (RangeOutliers(Levels(3, "tokens"), 0.01), TokenOutliers(Levels(3, "channels"), 0.01)),
        (Rotate(SignResidual(Sphere(3))), Rotate(Sphere(4))),
        (ByRange(MinMax(2, 32, "tokens"), Rotate(Sign(32), "fourier"), 0.5), Ternary(32)),
        (Product(2), Product(4)),
        (Project(Exact(), 64, None), Project(Exact(), 64, None)),
        (Pooled(Exact()), Pooled(Exact())),
    )  # fmt: skip
    fitted = {"order": torch.arange(dim)[None].to(torch.int16), "reads": torch.zeros(h, dtype=torch.long)}
    for pair in pairs:
        made = []
        for codec in pair:
            const = {**fitted, **codec.const(site, "key")}
            made.append(Run(codec, codec.encode(x, const), const))
        steps.append(made)
    steps.append(
        [Run(RangeOutliers(Levels(3, "tokens"), 0.01), steps[2][0].block, steps[2][0].const, tap()), steps[2][1]]
    )
    before = heap()
    for key, value in steps:
        attention(q, [key], [value])
        with Allocated() as allocated:
            found = attention(q, [key], [value], emit=False)
        assert found is not None and allocated.bytes < x.nbytes / 8, (key.codec, allocated.bytes)
    assert heap() - before < x.nbytes / 8


def tap(dim: int = 64) -> Tap:
    return Tap(Rope(1e4 ** (-torch.arange(0, dim, 2) / dim), "half", dim), torch.float32)

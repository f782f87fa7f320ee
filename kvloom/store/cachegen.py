"""CacheGen (Liu et al., SIGCOMM 2024, arXiv 2310.07240): keys and values in whole numbers that an entropy coder makes small.

The lossy part is here: named tensors in place of each plane. The lossless part is the coding of pages: "rans", or zstd where it is smaller (`coding`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.core.card import Card, Option
from kvloom.errors import DamagedFrame, StoreError, unknown
from kvloom.store.frame import Place

__all__ = ["BINS", "CARD", "CacheGen", "parse"]

FIELDS = ("symbols", "fit", "anchors", "peak")
FORMS = ("fitted", "paper", "released")
BINS = {1: 0.25, 2: 0.5, 3: 1.0, 4: 1.5}  # what a level makes of every step
THIRDS = (0.5, 1.0, 1.5)  # steps of the first, middle and last third of the layers, in the paper's form
KEYS = 0.7  # steps of keys against those of values: an error in a key moves every logit of its token
WORTH = 4.0  # bits of a channel that its anchors have to save: a weight takes about as many
LEAST = (
    2**-12
)  # a plane that deviates less than that, of its largest number, is stored exact: steps would not be finite
EIGHTHS = 8  # weights of anchors are multiples of 1/8
RELEASED = {
    1: ((64, 64, 64), (64, 64)),
    2: ((32, 32, 32), (32, 32)),
    3: ((32, 16, 16), (32, 16)),
    4: ((16, 16, 12), (16, 12)),
}
KEY_BORDERS, VALUE_BORDER = (10 / 32, 20 / 32), 2 / 32  # of the layers; the code has 10, 20 and 2 for 32 layers

CARD = Card(
    name="cachegen",
    title="CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving",
    year=2024,
    arxiv="2310.07240",
    code="UChi-JCL/CacheGen",
    idea="A cache that is sent need not be computed with: tokens are stored as differences to an anchor token nearby, in steps "
    "that grow with the layer, and an arithmetic coder with statistics of each layer and channel makes them small. A context is "
    "sent in chunks, each at the level that the bandwidth and the time left allow, or as text.",
    claims="3.5 to 4.3x fewer bytes than quantized caches, time to first token 3.1 to 4.7x shorter than from text, at similar quality.",
    differs='The default form "fitted": one step for all layers, keys 0.7 of it; a channel is predicted from its centre and its anchor '
    'by a fitted weight. Form "paper" has the bins and the plain differences of the paper, "released" the normalized tokens of its code. '
    "Range ANS in place of arithmetic coding; its tables, counted on the chunk and shared by like channels, travel with it.",
    open="What a bin is measured in: here, of the deviation that a plane's differences have in the chunk. How the bins of other levels "
    "follow: here, all in proportion.",
    measured="`kvloom bench coding nano`, levels 1 to 4: 4.08, 3.17, 2.34, 1.86 bits per number, KL 0.0005, 0.0016, 0.0069, 0.0139 nats per "
    "token; 20 to 46% fewer bits than min-max quantization, packed, zstd-1 at equal KL. The paper's form takes 2 to 16% more. docs/store-codecs.md.",
    bytes="symbols of the entropy coder, by the text; per chunk, plane and channel three numbers, and up to 16 tables",
    options=(
        Option("level", 2, "0: exact; 1 to 4: coarser and coarser."),
        Option("form", "fitted", '"fitted", "paper" or "released".'),
        Option("group", 10, "tokens that share an anchor, the first of them."),
    ),
)


@dataclass(frozen=True)
class CacheGen:
    """Turns planes x [h, n, D] into symbols and back. `text` names it as `Store.put(coding=...)` takes it."""

    level: int = 2
    form: str = "fitted"
    group: int = 10

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise StoreError("cachegen: " + unknown("form", str(self.form), FORMS))
        if self.level not in (0, *BINS) or isinstance(self.level, bool):
            raise StoreError(f"cachegen: level={self.level!r}; give 0 (exact) or 1 to {max(BINS)}.")
        if not isinstance(self.group, int) or self.group < 2:
            raise StoreError(f"cachegen: group={self.group!r} tokens that share an anchor; give 2 or more.")

    @property
    def text(self) -> str:
        return f"cachegen(level={self.level}, form='{self.form}', group={self.group})"

    def encode(self, tensors: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], dict[str, Any]]:
        """Tensors to store, and notes: the coding and its error.

        Of each (layer, plane, "x") in floating point: `symbols` [tokens, h D], `fit` [h, D, 1 or 3], where there are
        `anchors` [groups, h D], and `peak` [tokens or groups] for scales of tokens. Everything else stays as it is.
        """
        out: dict[Place, Tensor] = {}
        worst = total = square = energy = 0.0
        count = 0
        deepest = 1 + max((Place(*place).layer for place in tensors), default=0)
        for at, x in tensors.items():
            place = Place(*at)
            fields = None
            if self.level and place.field == "x" and x.dim() == 3 and x.is_floating_point() and x.itemsize < 8:
                fields = self._encode(x.detach().cpu(), place, deepest)
            if fields is None:
                out[place] = x
                continue
            out.update({Place(place.layer, place.plane, name): field for name, field in fields.items()})
            exact = x.detach().cpu().float().flatten()
            gap = _decode(fields, self.group).float().flatten().sub_(exact)
            square, energy = square + float(gap @ gap), energy + float(exact @ exact)
            worst, total = max(worst, float(gap.abs_().max())), total + float(gap.sum())
            count += gap.numel()
        notes = {"coding": self.text, "max_error": worst, "mean_error": total / max(count, 1)}
        return out, notes | {"relative_error": (square / energy) ** 0.5 if energy else 0.0}

    def decode(self, tensors: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
        """What `encode` was given, but for its error. Raises DamagedFrame for what it never makes."""
        planes: dict[tuple[int, str], dict[str, Tensor]] = {}
        for place, x in tensors.items():
            planes.setdefault((place.layer, place.plane), {})[place.field] = x
        out: dict[Place, Tensor] = {}
        for (layer, plane), fields in planes.items():
            coded = {name: x for name, x in fields.items() if name in FIELDS and "symbols" in fields}
            if coded:
                try:
                    out[Place(layer, plane)] = _decode(coded, self.group)
                except (KeyError, IndexError, RuntimeError) as error:
                    raise DamagedFrame(f"cachegen, layer {layer}, {plane}: {type(error).__name__}: {error}") from error
            out.update({Place(layer, plane, name): x for name, x in fields.items() if name not in coded})
        return out

    def _encode(self, x: Tensor, place: Place, layers: int) -> dict[str, Tensor] | None:
        """Fields of a plane; None for one that has to stay exact: not finite, too few tokens, or (almost) constant."""
        h, n, dim = x.shape
        flat = x.transpose(0, 1).reshape(n, h * dim).float()
        if n < 2 or not flat.numel() or not bool(flat.isfinite().all()):
            return None
        fields: dict[str, Tensor] | None
        if self.form == "released":
            fields = self._released(flat, place, layers, x.dtype)
        else:
            fields = self._steps(flat, place, layers, x.dtype)
        if fields is not None:
            fields["fit"] = fields["fit"].T.reshape(h, dim, -1).contiguous()  # the coder's columns are the last axis
        return fields

    def _steps(self, x: Tensor, place: Place, layers: int, dtype: torch.dtype) -> dict[str, Tensor] | None:
        paper = self.form == "paper"
        anchors = torch.arange(0, len(x), self.group)
        rest = torch.arange(len(x)).remainder(self.group).nonzero()[:, 0]
        mine = rest // self.group
        moved = x[rest] - x[anchors][mine] if paper else x - x.mean(0)
        unit = float(moved.square().mean().sqrt())
        bins = BINS[self.level] * (
            THIRDS[place.layer * 3 // layers] if paper else KEYS if place.plane == "key" else 1.0
        )
        step = torch.tensor(bins * unit).to(dtype).float()  # as it is stored, so that the decoder has the same
        if not unit > LEAST * float(x.abs().max()) or not 0 < float(step) < float("inf"):
            return None
        if paper:
            peak = x[anchors].abs().amax(1).to(dtype).float()
            first = (x[anchors] * 127 / peak.masked_fill(peak == 0, 1.0)[:, None]).round().clamp(-127, 127)
            fit = torch.stack((torch.zeros_like(x[0]), torch.full_like(x[0], EIGHTHS), step.expand(x.shape[1])))
            known = first / 127 * peak[:, None]
            fields = {"anchors": _zigzag(first), "peak": peak.to(dtype)}
        else:
            centre = (x.mean(0) / step).round().to(dtype).float() * step
            first = ((x[anchors] - centre) / step).round()
            known = first * step + centre
            away, want = (known - centre)[mine], x[rest] - centre
            weight = (away * want).sum(0) / away.square().sum(0).clamp_min(1e-30)
            weight = (weight * EIGHTHS).round().clamp(0, EIGHTHS)
            left = (want - weight / EIGHTHS * away).square().mean(0)
            saved = ((want.square().mean(0) + step.square()) / (left + step.square())).log2() / 2  # bits of each token
            weight = torch.where(saved * len(rest) > WORTH, weight, 0.0)
            fit = torch.stack(((centre / step).round(), weight, step.expand(x.shape[1])))
            if float(torch.where(weight > 0, saved, 0.0).sum()) * len(rest) < WORTH * x.shape[1]:
                symbols = _zigzag(((x - centre) / step).round())
                return None if symbols is None else {"symbols": symbols, "fit": fit.to(dtype)}
            coded = _zigzag(first)
            if coded is None:
                return None
            fields = {"anchors": coded}
        fit = fit.to(dtype)
        symbols = _zigzag(((x[rest] - _predicted(known, fit.float(), mine)) / step).round())
        return None if symbols is None else {**fields, "symbols": symbols, "fit": fit}  # type: ignore[dict-item]

    def _released(self, x: Tensor, place: Place, layers: int, dtype: torch.dtype) -> dict[str, Tensor]:
        keys, values = RELEASED[self.level]
        depth = place.layer / layers
        if place.plane == "key":
            bins = keys[(depth >= KEY_BORDERS[0]) + (depth >= KEY_BORDERS[1])]
        else:
            bins = values[depth >= VALUE_BORDER]
        most = bins // 2 - 1
        peak = x.abs().amax(1).to(dtype).float()
        symbols = _zigzag((x * most / peak.masked_fill(peak == 0, 1.0)[:, None]).round().clamp(-most, most))
        assert symbols is not None  # 64 bins at most
        return {
            "symbols": symbols,
            "peak": peak.to(dtype),
            "fit": torch.full((1, x.shape[1]), float(most), dtype=dtype),
        }


def _predicted(known: Tensor, fit: Tensor, mine: Tensor) -> Tensor:
    """What tokens [m, C] are expected to be from the anchors [groups, C] as the decoder has them."""
    centre = fit[0] * fit[2]
    return centre + fit[1] / EIGHTHS * (known[mine] - centre)


def _decode(fields: Mapping[str, Tensor], group: int) -> Tensor:
    """x [h, n, D] in the dtype of `fit`. IndexError, KeyError, RuntimeError for fields that do not fit together."""
    fit = fields["fit"]
    if fit.dim() != 3 or fit.shape[2] not in (1, 3) or not fit.is_floating_point():
        raise IndexError(f"fit {fit.dtype} {tuple(fit.shape)}")
    h, dim, rows = fit.shape
    dtype, fit = fit.dtype, fit.float().reshape(h * dim, rows).T
    symbols = _signed(fields["symbols"], h * dim)
    if len(fit) == 1:
        x = symbols / fit * fields["peak"].float().reshape(len(symbols), 1)
    elif "anchors" not in fields:
        x = (symbols + fit[0]) * fit[2]
    else:
        first = _signed(fields["anchors"], h * dim)
        n = len(symbols) + len(first)
        mine = torch.arange(n).remainder(group).nonzero()[:, 0]
        if -(-n // group) != len(first):
            raise IndexError("anchors for other tokens")
        if "peak" in fields:
            known = first / 127 * fields["peak"].float().reshape(len(first), 1)
        else:
            known = (first + fit[0]) * fit[2]
        x = torch.empty(n, h * dim)
        x[::group] = known
        x[mine] = _predicted(known, fit, mine // group) + symbols * fit[2]
    return x.reshape(-1, h, dim).transpose(0, 1).to(dtype).contiguous()


def _zigzag(x: Tensor) -> Tensor | None:
    """Whole numbers as 0, -1, 1, -2, ... -> 0, 1, 2, 3, ... in one byte, or two where they need it; None where they need more."""
    most = float(x.abs().max()) if x.numel() else 0.0
    if most >= 1 << 14:
        return None
    whole = x.to(torch.int16)
    coded = (whole << 1) ^ (whole >> 15)
    return coded.to(torch.uint8) if int(coded.max()) < 256 else coded


def _signed(coded: Tensor, columns: int) -> Tensor:
    if coded.dim() != 2 or coded.shape[1] != columns or coded.dtype not in (torch.uint8, torch.int16):
        raise IndexError(f"symbols {coded.dtype} {tuple(coded.shape)} for {columns} channels")
    whole = coded.to(torch.int16)
    return ((whole >> 1) ^ -(whole & 1)).float()


def parse(text: str) -> CacheGen:
    """Reads "cachegen(level=1)". Raises StoreError with the reason."""
    try:
        call = ast.parse(text.strip() if "(" in text else f"{text.strip()}()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError
        given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise StoreError(f"coding={text!r} cannot be read; write it as in 'cachegen(level=1)'.") from None
    if call.func.id != "cachegen":
        raise StoreError(unknown("coding", call.func.id, ["raw", "zstd", "rans", "best", "cachegen"]))
    for name in given:
        if name not in ("level", "form", "group"):
            raise StoreError("cachegen: " + unknown("option", name, ["level", "form", "group"]))
    return CacheGen(**given)

"""What a cache of one sequence holds, as named tensors and small facts, and back: the same slots, runs and bytes.

Encoded runs travel as their packed bytes. What comes back may come from anywhere, so all of it is checked against the model
and the recipe before the cache is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvloom.core.cache import KVCache, KVLayer
from kvloom.core.codec import Block, Codec, Const
from kvloom.core.group import Group
from kvloom.core.kind import EXACT
from kvloom.core.layer import Layer
from kvloom.core.mask import Gaps
from kvloom.core.run import Buffer, Run
from kvloom.core.segment import Segment
from kvloom.core.select import digested
from kvloom.core.site import Site
from kvloom.core.stack import share
from kvloom.errors import CacheError, KvloomError, ModelError

__all__ = ["FORMAT", "Part", "State", "checked", "dump", "fields_of", "load", "movable", "shape_of"]

FORMAT = 1
EXACT_RUN = -1  # in the place of the number of a codec's form
Shape = tuple[int, int, int, torch.dtype]  # KV heads, key width, value width and dtype of a layer


class Part(NamedTuple):
    """Where a tensor belongs: a layer, "key", "value", "column" or "state", and a name there."""

    layer: int
    plane: str
    field: str


@dataclass(frozen=True)
class State:
    """A cache of one sequence. `facts` is plain JSON. `tensors` are the cache's own memory: copy or write them out at once."""

    facts: dict[str, Any]
    tensors: dict[Part, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())


def movable(cache: KVCache) -> list[KVLayer]:
    """The layers of a cache whose state can be taken out or put in. Raises ModelError if some are not managed."""
    if cache.left_alone:
        names = ", ".join(f"{i} ({name})" for i, name in cache.left_alone.items())
        raise ModelError(
            f"layers {names} have caches of transformers' own, whose state kvloom does not move (sliding windows, linear "
            "attention). Only models whose every layer attends to the whole text can be stored."
        )
    return list(cache.managed())


def shape_of(site: Site) -> Shape:
    """What keys and values of a layer look like."""
    return site.kv_heads, site.key_dim, site.value_dim, site.dtype


# ---- out


def dump(cache: KVCache) -> State:
    """The state of a cache that holds one sequence.

    Raises CacheError for a batch, an empty cache, or drafts that are not accepted yet; ModelError as `movable` does.
    """
    layers = movable(cache)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "recipe": cache.recipe.name,
        "seen": cache.get_seq_length(),
        "layers": [],
    }
    tensors: dict[Part, Tensor] = {}
    held: set[int] = set()  # buffers that layers have in common: they come with the first
    for layer in layers:
        if len(layer.rows) != 1:
            raise CacheError(f"this cache holds {len(layer.rows)} sequences; the state of exactly one can be stored.")
        if layer.recording or layer.waiting is not None:
            raise CacheError("drafts or a forward are pending in this cache; store it when they are done.")
        row, at = layer.rows[0], layer.site.layer
        layer.resolve()
        groups = []
        for g, group in enumerate(row.layer.groups):
            if group.heads is not None:
                tensors[Part(at, "state", f"heads.{g}")] = group.heads
            classes = {
                name: _dump_segment(segment, at, f"{g}.{c}", tensors, held)
                for c, (name, segment) in enumerate(group.segments.items())
            }
            tensors |= {Part(at, "state", f"{g}.{name}"): x for name, x in group.state.items()}
            groups.append({"heads": group.heads is not None, "classes": classes, "state": sorted(group.state)})
        if row.layer.recent is not None:
            tensors[Part(at, "state", "queries")] = row.layer.recent.view
        if row.layer.unread is not None:
            tensors[Part(at, "state", "text")] = row.layer.unread.view
        *shape, dtype = shape_of(layer.site)
        facts["layers"].append(
            {
                "layer": at, "shape": [*shape, str(dtype).removeprefix("torch.")], "length": row.layer.length,
                "prompt": row.layer.prompt, "dropped_at": row.layer.dropped_at, "gaps": [row.gaps.at, row.gaps.shift],
                "queries": row.layer.recent is not None, "groups": groups,
                "read": row.layer.read, "unread": row.layer.unread is not None,
            }
        )  # fmt: skip
    return State(facts, tensors)


def _dump_segment(
    segment: Segment, layer: int, prefix: str, tensors: dict[Part, Tensor], held: set[int]
) -> dict[str, Any]:
    planes: dict[str, Any] = {}
    for which, plane in (("key", segment.key), ("value", segment.value)):
        forms, listed = plane.codec.forms(), []
        for r, run in enumerate(() if plane.mirrors else plane.runs):
            form = EXACT_RUN if run.codec.exact else forms.index(run.codec)
            listed.append([form, run.n, run.sealed, run.start, run.at is not None])
            for name, x in run.block.items():
                if name in run.codec.shared:
                    if id(run.fields[name]) in held:
                        continue
                    held.add(id(run.fields[name]))
                tensors[Part(layer, which, f"{prefix}.{r}.{name}")] = x
            if run.at is not None:
                tensors[Part(layer, "column", f"{prefix}.{which}.{r}.at")] = run.at.view
        known = segment.kind.key_const if which == "key" else segment.kind.value_const
        own = sorted(plane.const.keys() - known.keys())  # the others come with the recipe
        for name in own:
            tensors[Part(layer, which, f"{prefix}.const.{name}")] = plane.const[name]
        planes[which] = {"runs": listed, "const": own, "fitted": plane.fitted}
    if segment.n and "index" in segment.cols:
        segment.index  # noqa: B018  # writes down what is still only a number
    for name, buffer in segment.cols.items():
        tensors[Part(layer, "column", f"{prefix}.{name}")] = buffer.view
    return {"n": segment.n, "start": segment.start, "columns": sorted(segment.cols), **planes}


# ---- in


def load(cache: KVCache, state: State, device: torch.device | str = "cpu") -> None:
    """Fills an empty cache with a state that `dump` gave, of the same model and recipe.

    Raises CacheError, and leaves the cache as it was, for anything that does not agree with the model, the recipe or itself.
    """
    layers = movable(cache)
    if cache.get_seq_length():
        raise CacheError("a state is put into an empty cache; make a new KVCache.")
    try:
        made = _read(cache, layers, state, torch.device(device))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"the state cannot be read: {type(error).__name__}: {error}") from error
    for group in cache.recipe.groups:
        share([inner for site, inner, _ in made if site.layer in group])
    for layer, (site, inner, gaps) in zip(layers, made, strict=True):
        heads, key_dim, value_dim, dtype = shape_of(site)
        blank = [torch.empty(1, heads, 0, dim, dtype=dtype, device=device) for dim in (key_dim, value_dim)]
        layer.lazy_initialization(*blank)
        layer.rows[0].layer, layer.rows[0].gaps, layer.seen = inner, gaps, state.facts["seen"]


def checked(what: str, good: bool, found: object = None) -> None:
    """Raises CacheError that names what is wrong with a state."""
    if not good:
        raise CacheError(f"the state does not fit this cache: {what}" + ("." if found is None else f" ({found!r})."))


def _count(x: Any, what: str, most: int = 1 << 40) -> int:
    checked(f"{what} is no count", isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= most, x)
    return int(x)


def _read(cache: KVCache, layers: list[KVLayer], state: State, device: torch.device) -> list[tuple[Site, Layer, Gaps]]:
    facts, left = state.facts, dict(state.tensors)
    checked(f"format {FORMAT} is known here", facts.get("format") == FORMAT, facts.get("format"))
    checked(f"it was made by another recipe than {cache.recipe.name}", facts["recipe"] == cache.recipe.name)
    seen = _count(facts["seen"], "seen", 1 << 31)
    checked("it has other layers", [x["layer"] for x in facts["layers"]] == [layer.site.layer for layer in layers])
    made: list[tuple[Site, Layer, Gaps]] = []
    for layer, found in zip(layers, facts["layers"], strict=True):
        site = _site(cache, layer, found["shape"])
        inner = Layer(site, cache.recipe)
        for name in ("length", "prompt", "dropped_at"):
            setattr(inner, name, _count(found[name], name, seen))
        before = [x for s, x, _ in made if s.layer in inner.mates]
        take = _Taker(left, site, device, before)
        inner.groups = list(_groups(inner, found["groups"], take))
        if found["queries"]:
            queries = take("state", "queries", (site.q_heads, None, site.key_dim), site.dtype)
            checked("more queries than the recipe looks at", queries.shape[1] <= cache.recipe.window)
            inner.recent = Buffer(queries)
        inner.read = _count(found.get("read", 0), "read", inner.length)
        if found.get("unread"):
            inner.unread = Buffer(take("state", "text", (1, inner.length - inner.read), torch.int32))
        at, shift = ([int(x) for x in numbers] for numbers in found["gaps"])
        checked("gaps", len(at) == len(shift) and at == sorted(set(at)) and all(0 <= x < max(1, seen) for x in at))
        made.append((site, inner, Gaps(at, shift)))
    checked("it has tensors that belong nowhere", not left, next(iter(left), None))
    return made


def _site(cache: KVCache, layer: KVLayer, shape: Any) -> Site:
    """The layer's site; its true shape shows only when the model runs, so a state may know it better."""
    heads, key_dim, value_dim = (_count(x, "a shape", 1 << 20) for x in shape[:3])
    dtype = getattr(torch, str(shape[3]), None)
    checked("dtype", isinstance(dtype, torch.dtype) and dtype.is_floating_point, shape[3])
    checked("KV heads", heads > 0 and layer.site.q_heads % heads == 0, heads)
    wanted = (heads, key_dim, value_dim, dtype)
    if wanted == shape_of(layer.site):
        return layer.site
    checked("keys and values of another shape", not layer.is_initialized, shape)
    try:
        return cache.refine(layer.site, wanted)  # type: ignore[arg-type]
    except KvloomError as error:
        raise CacheError(f"the state has a shape that the recipe refuses: {error}") from error


class _Taker:
    """Takes tensors out of a state by name, with the shape (None: any) and dtype that they must have."""

    def __init__(self, tensors: dict[Part, Tensor], site: Site, device: torch.device, before: list[Layer]) -> None:
        self.tensors, self.site, self.device, self.before = tensors, site, device, before

    def __call__(self, plane: str, field: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
        part = Part(self.site.layer, plane, field)
        x = self.tensors.pop(part, None)
        if x is None:
            raise CacheError(f"the state does not fit this cache: {part} is missing.")
        same = x.dim() == len(shape) and all(want in (None, n) for want, n in zip(shape, x.shape, strict=True))
        checked(f"{part} is not {dtype} {shape}", same and x.dtype == dtype, (x.dtype, tuple(x.shape)))
        return x.to(self.device)


def _groups(inner: Layer, found: Any, take: _Taker) -> Iterator[Any]:
    heads, covered = inner.site.kv_heads, []
    for g, facts in enumerate(found):
        if facts["heads"]:
            at = take("state", f"heads.{g}", (None,), torch.int64).clone()
            checked("heads", bool(((at >= 0) & (at < heads)).all()), at.tolist())
            group = _blank(inner, at)
            covered += at.tolist()
        else:
            checked("heads that are not stored alike", len(inner.groups) == 1)
            group = inner.groups[0].fork()
            covered += range(heads)
        h = heads if group.heads is None else len(group.heads)
        for name in facts["state"]:
            part = Part(inner.site.layer, "state", f"{g}.{name}")
            x = take.tensors.get(part)
            checked("what policies remember", x is not None and x.dim() >= 1 and x.shape[0] == h, part)
            assert x is not None
            group.state[str(name)] = take("state", part.field, tuple(x.shape), torch.float32).clone()
        checked("it has other classes", list(facts["classes"]) == list(group.segments), list(facts["classes"]))
        for c, (name, segment) in enumerate(group.segments.items()):
            _fill(segment, facts["classes"][name], h, f"{g}.{c}", inner, take)
        yield group
    checked("heads are missing or double", sorted(covered) == list(range(heads)), covered)


def _blank(inner: Layer, at: Tensor) -> Group:
    """A group of some heads, without slots."""
    for group in inner.groups:
        held = torch.arange(inner.site.kv_heads) if group.heads is None else group.heads.cpu()
        if torch.equal(held, at.cpu()) and group.heads is not None:
            return group.fork()
        if bool(torch.isin(at.cpu(), held).all()):
            (found,) = group.split([torch.searchsorted(held, at.cpu())])
            return found
    raise CacheError("the state does not fit this cache: heads that are not stored alike.")


def _fill(segment: Segment, facts: Any, heads: int, prefix: str, inner: Layer, take: _Taker) -> None:
    kind, site = segment.kind, inner.site
    segment.n, segment.start = _count(facts["n"], "slots", 1 << 31), _count(facts["start"], "start", inner.length)
    checked("a folded class of many slots", not kind.fold or segment.n <= 1, segment.n)
    for which, plane in (("key", segment.key), ("value", segment.value)):
        all_heads, dim = kind.shape(site, plane.which)
        h = heads if all_heads == site.kv_heads else all_heads
        wide = site.key_dim if which == "key" else site.value_dim
        own, forms = facts[which]["const"], plane.codec.forms()
        checked("constants that its codec does not have", plane.codec.fits or not own, own)
        for name in own:
            part = Part(site.layer, which, f"{prefix}.const.{name}")
            x = take.tensors.get(part)
            checked("constants", x is not None and x.dim() >= 1 and x.shape[0] in (1, h), part)
            assert x is not None
            plane.const = {**plane.const, name: take(which, part.field, tuple(x.shape), x.dtype).clone()}
        plane.fitted = bool(facts[which]["fitted"])
        checked("slots where another plane holds them", not (plane.mirrors and facts[which]["runs"]))
        for r, (form, n, sealed, start, placed) in enumerate(facts[which]["runs"]):
            coded = form != EXACT_RUN
            checked("an encoded run of an exact class", not (coded and plane.codec.exact))
            codec = forms[_count(form, "form", len(forms) - 1)] if coded else EXACT
            n = _count(n, "slots of a run", 1 << 31)
            common = _common(take.before, codec, prefix, which, r)
            block = _block(
                codec, plane.const, n, h, dim, site, partial(take, which), f"{prefix}.{r}", common, len(take.before)
            )
            at: int | Tensor = _count(start, "start of a run", inner.length)
            if placed:
                name = f"{prefix}.{which}.{r}.at"
                each = len(take.tensors.get(Part(site.layer, "column", name), ())) == h
                at = take("column", name, (h if each else 1, n), torch.int32)
            run = Run(codec, block, plane.const if coded else {}, plane.tap if coded or plane.inputs else None, at)
            checked("slots of a run", run.n == n, (run.n, n))
            if (
                coded
            ):  # whatever else the codec relies on: it reads the run once, here and not in the middle of an answer
                checked("an encoded run that decodes to something else", run.decode().shape[1:] == (n, wide))
            run.sealed = bool(sealed)
            plane.runs.append(run)
        order = [run.codec.exact for run in plane.runs]
        checked("an exact run before an encoded one", order == sorted(order))
        checked(f"{which} slots", plane.n == segment.n, (plane.n, segment.n))
    for name in facts["columns"]:
        dtype = torch.int32 if name == "index" else torch.float32
        rows = take.tensors.get(Part(site.layer, "column", f"{prefix}.{name}"))
        each = rows is not None and rows.dim() == 2 and rows.shape[0] == heads
        x = take("column", f"{prefix}.{name}", (heads if each else 1, segment.n), dtype)
        if name == "index" and x.numel():
            checked("places outside the text", int(x.amin()) >= 0 and int(x.amax()) < inner.length)
        segment.cols[name] = Buffer(x)
    if kind.select is not None and segment.n:
        digested(segment, kind.select)


def _common(before: list[Layer], codec: Codec, prefix: str, which: str, r: int) -> Block:
    """What run r of a plane shares with the same one of its group's earlier layers, all of which the last of them has."""
    if not before or not codec.shared:
        return {}
    g, c = (int(x) for x in prefix.split("."))
    segment = list(before[-1].groups[g].segments.values())[c]
    run = (segment.key if which == "key" else segment.value).runs[r]
    return {name: x for name, x in run.block.items() if name in codec.shared}


def _block(
    codec: Codec, const: Const, n: int, h: int, dim: int, site: Site, take: Any, prefix: str, common: Block, place: int
) -> Block:
    """The fields of a run of n slots, but those that it has in `common` with another layer."""
    checked("half a unit", n % codec.unit == 0, n)
    block = dict(common)
    for name, (heads, row, dtype) in fields_of(codec, h, dim, site.dtype, const, place).items():
        if name in common:
            continue
        per = codec.per[name]
        wide = (None,) * len(row) if codec.joint else row  # how wide may hang on how many layers there are
        shape = (heads, n // per, *wide) if per else (heads, *(None for _ in range(len(row) + 1)))
        block[name] = take(f"{prefix}.{name}", shape, dtype)
    return block


def fields_of(
    codec: Codec, h: int, dim: int, dtype: torch.dtype, const: Const, place: int = 0
) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    """Of every field of a codec's block: heads, the shape behind heads and rows, dtype. As the codec makes them.

    `place`: that of the layer in its group, for codecs that encode layers together.
    """
    if codec.exact:
        return {"x": (h, (dim,), dtype)}
    zeros, known = torch.zeros(h, codec.unit, dim, dtype=dtype), {name: x.cpu() for name, x in const.items()}
    sample = (
        codec.encode_together([zeros] * (place + 1), [known] * (place + 1))[-1]
        if codec.joint
        else codec.encode(zeros, known)
    )
    return {name: (x.shape[0], tuple(x.shape[2:]), x.dtype) for name, x in sample.items()}

"""`kvloom bench coding` on the bundled model: its conditions, and what CacheGen promises of real keys and values."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from kvloom.bench import coding
from kvloom.bench.coding import Row, at_equal_kl
from kvloom.cli import main
from kvloom.lab.demo import TEXT
from kvloom.lab.measure import load_model
from kvloom.store import pack
from kvloom.store.cachegen import BINS, CacheGen
from kvloom.store.frame import Frame

TOKENS = 256


@pytest.fixture(scope="module")
def real() -> tuple[Any, torch.Tensor, coding.Planes, torch.Tensor]:
    model, tokenizer = load_model("nano")
    text = TEXT.read_text(encoding="utf-8")[200_000:204_000]
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False)[: TOKENS + 32])
    with torch.no_grad():
        planes, base = coding._full(model, ids, TOKENS)
    return model, ids, planes, base


@torch.no_grad()
def test_kl_falls_with_the_level_and_level_0_gives_the_same_logits(real: Any) -> None:
    model, ids, planes, base = real
    costs = {}
    for level in (0, *BINS):
        codec = CacheGen(level)
        logp = coding._behind(model, ids, TOKENS, codec.decode(codec.encode(planes)[0]))
        costs[level] = float((base.exp() * (base - logp)).sum(-1).mean())
        assert level or torch.equal(logp, base)
    assert 0 < costs[1] < costs[2] < costs[3] < costs[4] < 0.2


def test_anchors_save_bits_of_real_keys_at_the_same_step(real: Any) -> None:
    """And none of this model's values, whose tokens are not alike: the fitted form leaves anchors out there."""
    _, ids, planes, _ = real
    key = coding._keys(ids[:TOKENS].tolist(), TOKENS, planes)[0]
    keys = {place: x for place, x in planes.items() if place.plane == "key" and place.layer}
    with_anchors, alone = (len(pack(key, CacheGen(2, group=g).encode(keys)[0], coding="rans")) for g in (10, 1 << 20))
    assert with_anchors < alone
    stored = CacheGen(2).encode(planes)[0]
    assert not [place for place in stored if place.field == "anchors" and place.plane == "value"]


def test_bits_are_those_of_the_file(real: Any) -> None:
    """float16 takes 16 bits of pages, and what is counted is the length of the frames."""
    _, ids, planes, _ = real
    keys = coding._keys(ids[:TOKENS].tolist(), 128, planes)
    numbers = sum(x.numel() for x in planes.values())
    ways = coding.contenders()
    got, whole, pages = coding._round_trip(planes, keys, ways["float32"], 128)
    assert all(torch.equal(got[place], x) for place, x in planes.items()) and 8 * pages == 32 * numbers
    _, whole, pages = coding._round_trip(planes, keys, ways["float16"], 128)
    assert 8 * pages == 16 * numbers
    frames = [
        pack(key, {place: x[:, i * 128 : (i + 1) * 128].half() for place, x in planes.items()})
        for i, key in enumerate(keys)
    ]
    assert whole == sum(len(frame) for frame in frames) == sum(Frame.open(frame).nbytes for frame in frames)


def test_equal_kl_lies_between_rows_and_is_never_extrapolated() -> None:
    def row(name: str, bits: float, kl: float) -> Row:
        return Row(name, bits, bits, kl, kl, kl, 0.0, 0.0)

    curve = [row("min-max 4 bits/32, zstd", 4.0, 0.001), row("min-max 2 bits/32, zstd", 2.0, 0.1)]
    ours = [
        row("cachegen 1 fitted", 2.0, 0.01),
        row("cachegen 4 fitted", 1.0, 0.2),
        row("cachegen 2 fitted", 3.0, 0.0005),
    ]
    ((name, other, saved),) = at_equal_kl([*curve, *ours])
    assert (name, other) == ("cachegen 1 fitted", "min-max/32, zstd") and saved == pytest.approx(1 / 3)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--texts", "1", "--tokens", "128", "--ahead", "16", "--block", "64", "--rounds", "0"]
    main(["bench", "coding", "nano", *arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == set(coding.contenders()) and rows["float32"]["kl"] == 0.0
    assert rows["cachegen 3 fitted"]["bits"] < rows["min-max 3 bits/32"]["bits"] < rows["bfloat16, rans"]["bits"] < 16
    assert rows["min-max 2 bits/32"]["kl"] > rows["min-max 4 bits/32"]["kl"] > 0


@pytest.mark.parametrize("arguments", [["--tokens", "100"], ["--block", "32", "--tokens", "64"], ["--texts", "0"]])
def test_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "coding", "nano", *arguments, "--json"])
    assert arguments[0] in capsys.readouterr().err

"""What a cache is told of its tokens: by row, counted from the first real token, and through a model that sees images."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from kvloom import CacheError, KVCache
from kvloom.policies.modality import relevance
from tests.families import build, prompt
from tests.reference import held

IMAGE = 299


def llava() -> Any:
    """A small random LLaVA: images of 32 x 32 become 16 tokens."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_token_index=IMAGE, image_seq_length=16
    )
    return LlavaForConditionalGeneration(config).eval()


def read(ids: torch.Tensor) -> torch.Tensor:
    """0 for text, i for the i-th image."""
    image = ids == IMAGE
    starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    return starts.cumsum(1) * image


def example() -> dict[str, torch.Tensor]:
    one = torch.cat(
        [
            prompt(20),
            torch.full((1, 32), IMAGE),
            prompt(12, seed=2)[:, 1:],
            torch.full((1, 16), IMAGE),
            prompt(9)[:, 1:],
        ],
        1,
    )
    return {"input_ids": one, "attention_mask": torch.ones_like(one), "pixel_values": torch.randn(3, 3, 32, 32)}


def test_a_model_that_sees_images() -> None:
    model, inputs = llava(), example()
    kinds = read(inputs["input_ids"])
    assert kinds.max() == 2
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(**inputs, **options)
    full = model.generate(**inputs, past_key_values=KVCache(model), **options)
    torch.testing.assert_close(torch.stack(full.logits), torch.stack(want.logits), atol=1e-3, rtol=1e-3)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    cache = KVCache(model, "vidkv(group=8, protect=0.5)").tokens(kinds, relevance(embeddings, kinds))
    out = model.generate(**inputs, past_key_values=cache, **options)
    assert bool(torch.isfinite(torch.stack(out.logits)).all())
    for layer in held(cache):
        for head in layer:
            assert len(head["clear"]) == 24 and all(kinds[0, i] > 0 for i in head["clear"])


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_padding_and_beams(beams: int) -> None:
    """Each row of a padded batch goes by its own map, from its first real token on; so do its beams and copies."""
    model = build("llama")
    ids, mask = torch.cat([prompt(60), prompt(60, seed=1)]), torch.ones(2, 60, dtype=torch.long)
    ids[1, :20], mask[1, :20] = 0, 0
    kinds = torch.zeros(2, 60, dtype=torch.long)
    kinds[0, 30:50], kinds[1, 5:25] = 1, 2
    cache = KVCache(model, "vidkv(group=8, protect=1.0)").tokens(kinds)
    model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False, num_beams=beams
    )
    for each in (cache, copy.deepcopy(cache)):
        for row in range(2 * beams):
            wanted = kinds[row // beams].nonzero()[:, 0].tolist()
            for layer in held(each, row):
                for head in layer:
                    assert len(head["clear"]) == 16 and set(head["clear"]) <= set(wanted)


def test_what_is_told_is_checked() -> None:
    model = build("llama")
    for wrong in (torch.rand(5), torch.zeros(1, 2, 3, dtype=torch.long), torch.tensor([-1])):
        with pytest.raises(CacheError, match="tokens"):
            KVCache(model).tokens(wrong)
    with pytest.raises(CacheError, match="relevance"):
        KVCache(model).tokens(torch.zeros(5, dtype=torch.long), torch.zeros(4))
    cache = KVCache(model).tokens(torch.zeros(3, 9, dtype=torch.long))
    with pytest.raises(CacheError, match="3 rows"):
        model(prompt(9).expand(2, -1), past_key_values=cache)
    cache = KVCache(model)
    model(prompt(9), past_key_values=cache)
    with pytest.raises(CacheError, match="already"):
        cache.tokens(torch.zeros(9, dtype=torch.long))

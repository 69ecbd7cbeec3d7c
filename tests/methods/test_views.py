"""Samples of text alone and images in tiles through both methods: the language side reads what is there, no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.helpers import CLIP_FIELDS, VOCAB, noise_batch, tiny_experts
from visexpert.data import pack
from visexpert.language import PrefixLM
from visexpert.methods import Method, MoVEKD, ToVE
from visexpert.types import Batch
from visexpert.vision import ClipEncoder, MoLESettings, TiledClipEncoder

LLAMA = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def model_of(method: str, *, tiles: bool = False) -> Method:
    torch.manual_seed(0)
    mole = MoLESettings(num_experts=2, rank=2, dropout=0.0) if method == "movekd" else None
    clip = (TiledClipEncoder if tiles else ClipEncoder)(config=CLIP_FIELDS, mole=mole)
    language = PrefixLM(config=LLAMA, image_newline=tiles)
    if method == "movekd":
        return MoVEKD(clip=clip, experts=tiny_experts(), language=language).eval()
    return ToVE(clip=clip, experts=tiny_experts(), language=language).eval()


def mixed(*, pixels: int = 0) -> Batch:
    """Two images of which the second stands for a sample of text alone."""
    batch = noise_batch()
    images = batch.images_BCHW.clone()
    images[1] = pixels
    return replace(batch, images_BCHW=images, has_image_B=torch.tensor([True, False]))


def logits(model: Method, batch: Batch) -> Tensor:
    assert batch.text is not None
    found: Tensor = model.language(model.encode(batch), batch.text)
    return found


@pytest.mark.parametrize("method", ["tove", "movekd"])
def test_text_alone_reads_no_placeholder(method: str) -> None:
    model = model_of(method)
    with torch.no_grad():
        black, white = logits(model, mixed(pixels=0)), logits(model, mixed(pixels=255))
        assert torch.equal(black[:-3], white[:-3])  # the first image's texts
        torch.testing.assert_close(black, white)
        with_image = logits(model, replace(mixed(pixels=255), has_image_B=None))
    assert not torch.allclose(with_image[-3:], white[-3:])


@pytest.mark.parametrize("method", ["tove", "movekd"])
def test_a_step_on_mixed_samples_has_a_gradient(method: str) -> None:
    model = model_of(method)
    loss = model.step(mixed()).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert float(loss) == pytest.approx(
        float(model.step(mixed(pixels=255)).loss), abs=1e-5
    )  # placeholders mean nothing


def test_placeholders_take_no_part_in_distillation() -> None:
    model = model_of("movekd")
    with torch.no_grad():
        parts = [model.step(mixed(pixels=pixels)).parts for pixels in (0, 255)]
    for name in ("kd_loss", "balance_loss"):
        assert float(parts[0][name]) == pytest.approx(float(parts[1][name]), abs=1e-6), name


@pytest.mark.parametrize("method", ["tove", "movekd"])
def test_tiles_reach_the_language_side(method: str) -> None:
    model = model_of(method, tiles=True)
    batch = noise_batch(size=32)
    wide = replace(batch, original_hw_B2=torch.tensor([[32, 64], [64, 32]]))
    with torch.no_grad():
        vision = model.encode(wide)
    # 16 tokens of the whole image and 2 tiles of 16; a newline after each row of the joined tiles: 4 rows, or 8.
    assert vision.lengths_B is not None and vision.lengths_B.tolist() == [16 + 32 + 4, 16 + 32 + 8]
    loss = model.step(wide).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_text_alone_needs_no_image_at_all() -> None:
    text = pack([[([5, 6, 7, 8], 2)], [([9, 10, 11], 1)]], 0)
    batch = Batch(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2), "train", text=text,
        has_image_B=torch.tensor([False, False]),
    )  # fmt: skip
    model = model_of("movekd")
    assert torch.isfinite(model.step(batch).loss)
    language: Any = model.language
    alone: Tensor = language.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, 1:3]
    torch.testing.assert_close(logits(model, batch)[:2], alone)

"""LoRA on encoders: identity at the start, exact when folded in, gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.methods.helpers import CLIP_FIELDS
from tests.vision.test_encoder_families import SMALL, TRANSFORMERS
from visexpert.errors import ConfigError
from visexpert.methods.tove.merging import ClipLora
from visexpert.vision import ClipEncoder, TimmEncoder, TransformersEncoder, VisionEncoder


def make() -> tuple[ClipEncoder, torch.Tensor]:
    torch.manual_seed(0)
    return ClipEncoder(config=CLIP_FIELDS).eval(), torch.rand(2, 3, 32, 32)


def test_a_fresh_update_changes_nothing_and_a_folded_one_leaves_no_trace() -> None:
    clip, images = make()
    before, keys = clip(images).tokens_BTD, {key: value.shape for key, value in clip.state_dict().items()}
    lora = ClipLora(clip, rank=4, alpha=8)
    assert torch.equal(clip(images).tokens_BTD, before)
    for module in lora.modules():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    updated = clip(images).tokens_BTD
    assert not torch.allclose(updated, before, atol=1e-2)
    lora.merge()
    assert torch.allclose(clip(images).tokens_BTD, updated, atol=1e-5)
    assert {key: value.shape for key, value in clip.state_dict().items()} == keys
    assert not any("lora" in type(module).__module__ for module in clip.modules())


def test_the_update_is_alpha_over_rank_times_b_a() -> None:
    clip, _ = make()
    name = "model.encoder.layers.0.mlp.fc1"
    weight = clip.get_parameter(f"{name}.weight").detach().clone()
    lora = ClipLora(clip, rank=2, alpha=6)
    first, second = (clip.get_parameter(f"{name}.lora_{side}.default.weight") for side in "AB")
    with torch.no_grad():
        second.normal_()
    expected = weight + 3.0 * second @ first
    lora.merge()
    assert torch.allclose(clip.get_parameter(f"{name}.weight"), expected, atol=1e-6)


def test_only_layers_that_are_read_train() -> None:
    clip, images = make()  # reads hidden state -2 of two layers: the first one only
    lora = ClipLora(clip, rank=2, alpha=2)
    assert len(lora.modules()) == 2 * 6
    clip(images).tokens_BTD.sum().backward()
    chosen = {id(p) for module in lora.modules() for p in module.parameters()}
    reached = {id(p) for p in clip.parameters() if p.grad is not None}
    assert reached == chosen


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        ClipLora(make()[0], rank=0, alpha=1)


FAMILIES: dict[str, Any] = {
    "siglip": lambda: _of_transformers("siglip"),
    "dinov2": lambda: _of_transformers("dinov2"),
    "dinov2 swiglu": lambda: _of_transformers("dinov2 swiglu"),
    "dinov3 gated": lambda: _of_transformers("dinov3 gated"),
    "vit": lambda: TimmEncoder(model="vit_tiny_patch16_224", arguments=SMALL, image_size=32),
    "eva02": lambda: TimmEncoder(model="eva02_tiny_patch14_224", arguments={"depth": 3}, image_size=28),
    "beit": lambda: TimmEncoder(model="beit_base_patch16_224", arguments=SMALL, image_size=32),
}
LINEARS = {"siglip": 6, "dinov2": 6, "dinov2 swiglu": 7, "dinov3 gated": 7, "vit": 4, "eva02": 3, "beit": 3}
"""Linear layers of a block; BEiT and EVA with biases apart do not call qkv as one."""


def _of_transformers(name: str) -> VisionEncoder:
    fields = TRANSFORMERS[name].to_dict()
    size = fields["image_size"]
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}}
    return TransformersEncoder(config=fields, processor=processor, image_size=size)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_any_family_learns_and_is_folded_exactly(family: str) -> None:
    encoder, images = FAMILIES[family]().eval(), torch.rand(2, 3, 32, 32)
    before, keys = encoder(images).tokens_BTD, list(encoder.state_dict())
    lora = ClipLora(encoder, rank=2, alpha=4)
    assert len(lora.modules()) == 2 * LINEARS[family] * len(encoder.read_blocks())
    torch.testing.assert_close(encoder(images).tokens_BTD, before, atol=1e-6, rtol=1e-5)  # BEiT: another kernel
    factors = [parameter for module in lora.modules() for parameter in module.parameters()]
    for parameter in factors:
        nn.init.normal_(parameter, std=0.2)
    updated = encoder(images).tokens_BTD
    updated.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in factors)
    lora.merge()
    torch.testing.assert_close(encoder(images).tokens_BTD, updated, atol=1e-4, rtol=1e-4)
    assert list(encoder.state_dict()) == keys and not torch.allclose(updated, before, atol=1e-2)

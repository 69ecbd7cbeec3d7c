"""LoRA on CLIP: identity at the start, exact when folded in, gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.methods.helpers import CLIP_FIELDS
from visexpert.errors import ConfigError
from visexpert.methods.tove.merging import ClipLora
from visexpert.vision import ClipEncoder


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

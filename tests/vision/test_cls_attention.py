"""The [CLS] row that is computed alone against eager attention of Hugging Face's model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.vision.test_clip import FIELDS
from visexpert.errors import ConfigError
from visexpert.vision import ClipEncoder, Saliency, add_mole

QK = ("q_proj", "k_proj")


def make(layer: int) -> ClipEncoder:
    clip = ClipEncoder(config=FIELDS, layer=layer).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return clip


@torch.no_grad()
def test_packing_loses_nothing() -> None:
    clip = make(-2)
    found = clip.attend(torch.rand(2, 3, 24, 24))
    packed_BNF = found.packed()
    assert packed_BNF.shape == (2, 10, clip.width + 2)  # [CLS] and 9 patches; two heads
    again = Saliency.unpacked(packed_BNF, width=clip.width, grid_hw=clip.grid_hw)
    assert again.tokens.cls_BD is not None and found.tokens.cls_BD is not None
    assert torch.equal(again.logits_BHN, found.logits_BHN)
    assert torch.equal(again.tokens.tokens_BTD, found.tokens.tokens_BTD)
    assert torch.equal(again.tokens.cls_BD, found.tokens.cls_BD)


@pytest.mark.parametrize("layer", [-1, -2, -3])
@torch.no_grad()
def test_it_is_the_row_of_the_block_that_makes_the_tokens(layer: int) -> None:
    clip, images = make(layer), torch.rand(2, 3, 24, 24)
    eager = CLIPVisionModel(CLIPVisionConfig(**FIELDS)).eval()
    eager.set_attn_implementation("eager")
    eager.load_state_dict(clip.model.state_dict())
    expected = eager(clip.preprocess(images), output_attentions=True).attentions
    assert len(expected) == 3
    found = clip.attend(images)
    assert found.logits_BHN.shape == (2, 2, 10)
    torch.testing.assert_close(found.logits_BHN.softmax(-1), expected[layer][:, :, 0], atol=1e-6, rtol=1e-5)
    plain = clip(images)
    assert torch.equal(found.tokens.tokens_BTD, plain.tokens_BTD)
    assert found.tokens.cls_BD is not None and plain.cls_BD is not None
    assert torch.equal(found.tokens.cls_BD, plain.cls_BD)


def test_it_takes_one_forward_pass_and_leaves_attention_fused() -> None:
    clip = make(-2)
    runs: list[Any] = []
    clip.model.embeddings.register_forward_hook(lambda *_: runs.append(1))
    clip.attend(torch.rand(1, 3, 24, 24))
    assert runs == [1] and clip.config._attn_implementation == "sdpa"
    assert not any(clip.model.get_submodule(f"encoder.layers.1.self_attn.{name}")._forward_hooks for name in QK)


def test_a_student_with_experts_has_it_too_with_gradient() -> None:
    clip = make(-2)
    add_mole(clip, rank=2)
    clip.attend(torch.rand(1, 3, 24, 24)).logits_BHN.square().sum().backward()
    for name in ("1.self_attn.q_proj.weight", "0.mlp.fc1_experts.B_weight"):
        assert clip.model.get_parameter(f"encoder.layers.{name}").grad is not None


def test_embeddings_have_no_attention() -> None:
    with pytest.raises(ConfigError, match=r"layer=-4 reads the embeddings; use a layer from -3 to -1"):
        make(-4).attend(torch.rand(1, 3, 24, 24))

"""The papers' encoders and language model, whole and on ``meta``: GFLOP and parameters known from elsewhere.

The figures were measured apart from this code: of open_clip, timm, transformers and, for EVA-02 with windows, of the
class that MoVE-KD's release ships. 1 multiply-add is 2 FLOP; attention counts in full.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from visexpert.experts.timm import TimmExpert
from visexpert.experts.transformers import TransformersExpert
from visexpert.planning.counting import StepCost, count_step
from visexpert.planning.meta import weightless
from visexpert.vision import ClipEncoder

CLOSE = 0.02


def pixels(size: int) -> Tensor:
    return torch.empty(1, 3, size, size, device="meta")


def gflop(model: nn.Module, size: int) -> float:
    """Forward pass of an encoder."""
    with torch.no_grad():
        return count_step(lambda: model(pixels(size)), model, {"all": [model]}).total("all") / 1e9


def clip(*, width: int, depth: int, heads: int, size: int, patch: int) -> ClipEncoder:
    fields = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    fields |= {"num_attention_heads": heads, "image_size": size, "patch_size": patch}
    with weightless():
        return ClipEncoder(config=fields, layer=-1)


def timm_expert(**settings: Any) -> nn.Module:
    with weightless():
        return TimmExpert(weights="random", **settings).network


def test_clip_l_14_336_forward_and_with_the_gradient_of_its_inputs() -> None:
    model = clip(width=1024, depth=24, heads=16, size=336, patch=14).requires_grad_(False)
    image = pixels(336).requires_grad_()
    cost = count_step(lambda: model(image).tokens_BTD, model, {"all": [model]})
    assert cost.forward["all"] / 1e9 == pytest.approx(381.9, rel=CLOSE)
    assert cost.total("all") / 1e9 == pytest.approx(795.9, rel=CLOSE)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(303.5, rel=1e-3)


@pytest.mark.parametrize(
    ("sizes", "expected", "millions"),
    [
        ({"width": 1024, "depth": 24, "heads": 16, "patch": 14}, 162.0, 303.2),
        ({"width": 768, "depth": 12, "heads": 12, "patch": 16}, 35.1, 85.8),
        ({"width": 768, "depth": 12, "heads": 12, "patch": 32}, 8.8, 87.5),
    ],
)
def test_clip_at_224(sizes: dict[str, int], expected: float, millions: float) -> None:
    model = clip(size=224, **sizes)
    assert gflop(model, 224) == pytest.approx(expected, rel=CLOSE)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


class Windowed(nn.Module):
    """A block of a ViT on 64 x 64 tokens, run on windows of 16 x 16."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, rope: Tensor, **_: Any) -> Tensor:
        windows = tokens.unflatten(1, (4, 16, 4, 16)).transpose(2, 3).reshape(-1, 256, tokens.shape[-1])
        out: Tensor = self.block(windows, rope=rope[:256])
        return out.view(1, 4, 4, 16, 16, -1).transpose(2, 3).reshape(tokens.shape)


def test_eva_02_with_attention_in_windows_and_without() -> None:
    whole = timm_expert(
        model="eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", image_size=1024, arguments={"patch_size": 16}
    )
    assert gflop(whole, 1024) == pytest.approx(4131, rel=CLOSE)
    model = whole.get_submodule("model")
    model.cls_token, model.num_prefix_tokens = None, 0  # type: ignore[assignment]
    model.pos_embed = nn.Parameter(model.pos_embed[:, 1:])  # type: ignore[index]
    blocks = model.get_submodule("blocks")
    for index, block in list(blocks.named_children()):
        block.attn.num_prefix_tokens = 0  # type: ignore[union-attr]
        if (int(index) + 1) % 3:  # 16 of 24, as in its detector; every third is global
            blocks.register_module(index, Windowed(block))
    assert gflop(whole, 1024) == pytest.approx(3098, rel=CLOSE)


@pytest.mark.parametrize(
    ("settings", "size", "expected", "millions"),
    [
        ({"model": "convnext_xxlarge.clip_laion2b_soup_ft_in1k", "image_size": 1024}, 1024, 6335, 843.4),
        ({"model": "vit_large_patch14_dinov2.lvd142m"}, 518, 1014, 304),
        ({"model": "vit_large_patch14_dinov2.lvd142m", "image_size": 336}, 336, 381.9, 304),
        ({"model": "vit_large_patch14_dinov2.lvd142m", "image_size": 224}, 224, 162.0, 304),
    ],
)
def test_experts_of_timm(settings: dict[str, Any], size: int, expected: float, millions: float) -> None:
    network = timm_expert(**settings)
    assert gflop(network, size) == pytest.approx(expected, rel=CLOSE)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, rel=CLOSE)


def test_sam() -> None:
    fields = {"model_type": "sam_vision_model", "hidden_size": 1024, "num_hidden_layers": 24}
    fields |= {"num_attention_heads": 16, "global_attn_indexes": [5, 11, 17, 23], "mlp_dim": 4096}
    with weightless():
        expert = TransformersExpert(config=fields)
    assert gflop(expert.network, 1024) == pytest.approx(2986, rel=CLOSE)
    assert sum(parameter.numel() for parameter in expert.parameters()) / 1e6 == pytest.approx(308.3, rel=CLOSE)


def vicuna(*, trained: bool) -> StepCost:
    """Costs of 700 embedded tokens, all of which the output layer reads."""
    with weightless():
        config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008)
        model = LlamaForCausalLM(config).requires_grad_(trained)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6738415616
    embeds = torch.empty(1, 700, 4096, device="meta", requires_grad=True)
    return count_step(lambda: model(inputs_embeds=embeds, use_cache=False).logits, model, {"all": [model]})


def test_vicuna_7b() -> None:
    frozen = vicuna(trained=False)
    assert frozen.forward["all"] / 1e9 == pytest.approx(9507, rel=CLOSE)
    assert frozen.total("all") / 1e9 == pytest.approx(19271, rel=CLOSE)
    assert vicuna(trained=True).total("all") / 1e9 == pytest.approx(28520, rel=CLOSE)

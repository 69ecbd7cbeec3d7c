"""MoLE beside the MLPs of encoders of transformers and timm, against these libraries' own forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.layers.mlp import GluMlp
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.vision import MoLEFeedForward, add_mole, collect_routing

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
WIDE = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 0}


def hf(kind: str, **settings: object) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **IMAGE, **settings)
    return getattr(transformers, f"{kind}Model")(config).eval()  # type: ignore[no-any-return]


def of_timm(name: str, **settings: Any) -> nn.Module:
    options: dict[str, Any] = {**WIDE, **settings}
    return timm.create_model(name, **options).eval()


def whole_clip() -> nn.Module:
    text, vision = SIZES | {"vocab_size": 9}, SIZES | IMAGE
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "CLIP": lambda: hf("CLIPVision"),
    "SigLIP": lambda: hf("SiglipVision"),
    "DINOv2": lambda: hf("Dinov2", mlp_ratio=2),
    "DINOv3, whose layers have other names": lambda: hf("DINOv3ViT"),
    "ViT": lambda: hf("ViT"),
    "timm ViT": lambda: of_timm("vit_tiny_patch16_224"),
    "timm ViT with a norm between": lambda: of_timm("vit_tiny_patch16_224", scale_mlp_norm=True),
    "timm DeiT III": lambda: of_timm("deit3_small_patch16_224"),
}


def outputs_of(encoder: nn.Module, images: Tensor) -> Tensor:
    given = encoder(images)
    return given if isinstance(given, Tensor) else given.last_hidden_state


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_an_encoder_gives_what_it_gave_before_to_the_bit_and_then_learns(name: str) -> None:
    encoder, images = ENCODERS[name](), torch.rand(2, 3, 16, 16)
    before, keys = outputs_of(encoder, images), set(encoder.state_dict())
    moles = add_mole(encoder, rank=2)
    assert len(moles) == 2
    assert torch.equal(outputs_of(encoder, images), before)
    new = set(encoder.state_dict()) - keys
    assert keys < set(encoder.state_dict()) and all("_experts." in key or ".router." in key for key in new)
    with torch.enable_grad():
        outputs_of(encoder, images).square().mean().backward()
    assert all(mole.fc2_experts.B_weight.grad.abs().max() > 0 for mole in moles)  # type: ignore[union-attr]
    for mole in moles:
        nn.init.normal_(mole.fc1_experts.B_weight)
    assert not torch.equal(outputs_of(encoder, images), before)


@pytest.mark.parametrize("name", ["DINOv3, whose layers have other names", "timm ViT with a norm between", "SigLIP"])
@torch.no_grad()
def test_each_token_goes_through_the_librarys_own_mlp_with_its_experts_weights(name: str) -> None:
    mlp = next(module for path, module in ENCODERS[name]().named_modules() if path.endswith("mlp"))
    own = copy.deepcopy(mlp)
    mole = MoLEFeedForward(mlp, num_experts=2, rank=2, alpha=3.0).eval()
    for parameter in (*mole.fc1_experts.parameters(), *mole.fc2_experts.parameters(), *mole.router.parameters()):
        nn.init.normal_(parameter)
    tokens_ND = torch.randn(7, 16)
    weights = mole.merged_weights()
    each = []
    for e in range(2):
        first, second = own.get_submodule(mole.order.first), own.get_submodule(mole.order.second)
        first.load_state_dict({"weight": weights.fc1_EHD[e], "bias": weights.fc1_bias_EH[e]})
        second.load_state_dict({"weight": weights.fc2_EDH[e], "bias": weights.fc2_bias_ED[e]})
        each.append(own(tokens_ND))
    choice_N = mole.router(tokens_ND).choice_BN
    assert choice_N.unique().numel() == 2
    expected = torch.stack(each)[choice_N, torch.arange(7)]
    torch.testing.assert_close(mole(tokens_ND), expected, atol=1e-4, rtol=1e-4)


def test_blocks_can_be_named_and_decisions_recorded() -> None:
    encoder = of_timm("vit_tiny_patch16_224", depth=3)
    moles = add_mole(encoder, layers=[0, 2], num_experts=4, rank=2)
    blocks = encoder.get_submodule("blocks")
    assert [isinstance(block.mlp, MoLEFeedForward) for block in blocks.children()] == [True, False, True]
    assert [blocks.get_submodule(index + ".mlp") for index in ("0", "2")] == list(moles)
    with collect_routing(encoder) as routing:
        encoder(torch.rand(2, 3, 16, 16))
    record = routing.record()
    assert record is not None and record.probs_LBNE.shape == (2, 2, 5, 4)
    with pytest.raises(ConfigError, match=r"\[3\].*0\.\.2.*VisionTransformer"):
        add_mole(encoder, layers=[3])
    with pytest.raises(ConfigError, match="MoLE already"):
        add_mole(encoder)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolutions": (lambda: timm.create_model("resnet18", num_classes=0), r"ResNet .*\d+ Conv2d"),
    "a gate of three layers": (
        lambda: hf("Dinov2", mlp_ratio=2, use_swiglu_ffn=True),
        r"Dinov2SwiGLUFFN has 3 .*gate_proj: Linear",
    ),
    "a gate in one layer": (
        lambda: of_timm("vit_tiny_patch16_224", mlp_layer=GluMlp),
        r"GluMlp \(fc1: Linear, .* something else",
    ),
    "two towers": (
        whole_clip,
        r"text_model\.encoder\.layers\.\*\.mlp, vision_model\.encoder\.layers\.\*\.mlp",
    ),
    "no encoder": (lambda: nn.Linear(2, 2), r"Linear has no MLPs .*1 Linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_by_what_was_found_in_it_and_left_as_it_was(name: str) -> None:
    make, words = REFUSED[name]
    encoder = make()
    keys = set(encoder.state_dict())
    with pytest.raises(ConfigError, match=words):
        add_mole(encoder)
    assert set(encoder.state_dict()) == keys

"""MoLE beside the MLPs of encoders of transformers and timm, against these libraries' own forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.layers.mlp import GlobalResponseNormMlp, GluMlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.vision import MoLEFeedForward, add_mole, collect_routing
from visexpert.vision.mole import MOLE_KEY

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
    "DINOv2 with SwiGLU": lambda: hf("Dinov2", mlp_ratio=2, use_swiglu_ffn=True),
    "DINOv2 with registers and SwiGLU": lambda: hf("Dinov2WithRegisters", mlp_ratio=2, use_swiglu_ffn=True),
    "DINOv3 with SwiGLU": lambda: hf("DINOv3ViT", use_gated_mlp=True, hidden_act="silu"),
    "timm EVA-02, with a norm in its SwiGLU": lambda: of_timm("eva02_tiny_patch14_224", num_heads=4),
    "timm EVA-02 with a packed SwiGLU": lambda: of_timm("eva02_base_patch14_224", scale_mlp=False, num_heads=4),
    "timm ViT with a packed SwiGLU": lambda: of_timm("vit_tiny_patch16_224", mlp_layer=SwiGLUPacked),
    "timm ViT with SwiGLU": lambda: of_timm("vit_tiny_patch16_224", mlp_layer=SwiGLU),
    "timm ViT with a gate in the second half": lambda: of_timm("vit_tiny_patch16_224", mlp_layer=GluMlp),
}


def mixing_mlp(in_features: int, hidden_features: int, **_: object) -> nn.Module:
    return GlobalResponseNormMlp(in_features, hidden_features)


def outputs_of(encoder: nn.Module, images: Tensor) -> Tensor:
    given = encoder(images)
    return given if isinstance(given, Tensor) else given.last_hidden_state


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_an_encoder_gives_what_it_gave_before_to_the_bit_and_then_learns(name: str) -> None:
    encoder, images = ENCODERS[name](), torch.rand(2, 3, 16, 16)
    before, keys = outputs_of(encoder, images), set(encoder.state_dict())
    moles = add_mole(encoder, rank=2)
    assert len(moles) == 2 and not any(module.training for module in encoder.modules())
    assert torch.equal(outputs_of(encoder, images), before)
    new = set(encoder.state_dict()) - keys
    assert keys < set(encoder.state_dict()) and {key for key in encoder.state_dict() if MOLE_KEY.search(key)} == new
    with torch.enable_grad():
        outputs_of(encoder, images).square().mean().backward()
    assert all(part.B_weight.grad.abs().max() > 0 for mole in moles for part in mole.experts())  # type: ignore[union-attr]
    for mole in moles:
        nn.init.normal_(mole.experts()[0].B_weight)
    assert not torch.equal(outputs_of(encoder, images), before)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_folded_mlps_leave_the_librarys_own_model(name: str) -> None:
    encoder, images = ENCODERS[name](), torch.rand(2, 3, 16, 16)
    fresh, keys = copy.deepcopy(encoder), list(encoder.state_dict())
    moles = add_mole(encoder, rank=2)
    for mole in moles:
        for module in mole.added_modules():
            for parameter in module.parameters():
                nn.init.normal_(parameter)
        mole.router.weight.zero_()
        mole.router.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    expected = outputs_of(encoder, images)
    for path in [path for path, module in encoder.named_modules() if module in moles]:
        equipped = encoder.get_submodule(path)
        assert isinstance(equipped, MoLEFeedForward)
        encoder.set_submodule(path, equipped.folded(torch.tensor([0.0, 0.0, 1.0])))
    assert repr(encoder) == repr(fresh) and list(encoder.state_dict()) == keys
    fresh.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(outputs_of(fresh, images), expected, atol=1e-4, rtol=1e-4)


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
    "a norm over the tokens": (
        lambda: of_timm("vit_tiny_patch16_224", mlp_layer=mixing_mlp),
        r"GlobalResponseNormMlp \(fc1: Linear, .*grn: GlobalResponseNorm.* something else",
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

"""Every family of encoders against its own library: tokens of a layer, pooled output, attention, MoLE, gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visexpert.errors import ConfigError, WeightsError
from visexpert.networks.huggingface import patches_of
from visexpert.vision import MoLESettings, TimmEncoder, TransformersEncoder, VisionEncoder

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE: dict[str, Any] = {"intermediate_size": 64, "patch_size": 8, "image_size": 32}

TRANSFORMERS: dict[str, Any] = {
    "clip": hf.CLIPVisionConfig(**TINY, **WIDE),
    "siglip": hf.SiglipVisionConfig(**TINY, **WIDE),
    "siglip2": hf.Siglip2VisionConfig(**TINY, intermediate_size=64, patch_size=8, num_patches=16),
    "dinov2": hf.Dinov2Config(**TINY, image_size=28, patch_size=14, mlp_ratio=2),
    "dinov2 swiglu": hf.Dinov2Config(**TINY, image_size=28, patch_size=14, mlp_ratio=2, use_swiglu_ffn=True),
    "dinov2 registers": hf.Dinov2WithRegistersConfig(**TINY, image_size=28, patch_size=14, mlp_ratio=2),
    "dinov3": hf.DINOv3ViTConfig(**TINY, **WIDE, num_register_tokens=4),
    "dinov3 gated": hf.DINOv3ViTConfig(**TINY, **WIDE, num_register_tokens=4, use_gated_mlp=True),
}

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2}
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "deit3_small_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "eva02_tiny_patch14_224": {"depth": 3},
    "beit_base_patch16_224": SMALL,
}


@dataclass(frozen=True)
class Case:
    """An encoder with a checkpoint that its library wrote, and that library's own forward."""

    encoder: VisionEncoder
    reference: Callable[[Tensor, int], Tensor]
    pooled: Callable[[Tensor], Tensor]


def shaken(model: nn.Module) -> nn.Module:
    """Give every parameter a random value, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def of_transformers(name: str, folder: Path, **options: Any) -> Case:
    config = TRANSFORMERS[name]
    model: Any = shaken(hf.AutoModel.from_config(config))
    model.save_pretrained(folder)
    kind = hf.SiglipImageProcessor if "siglip" in name else hf.BitImageProcessor
    kind(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    asked = {"interpolate_pos_encoding": True} if name in ("siglip", "clip") else {}

    def run(pixels: Tensor) -> Any:
        inputs = patches_of(pixels, model) if name == "siglip2" else {"pixel_values": pixels, **asked}
        return model(**inputs, output_hidden_states=True)

    encoder = TransformersEncoder(source=str(folder), **options)
    return Case(encoder, lambda x, layer: run(x).hidden_states[layer], lambda x: run(x).pooler_output)


def of_timm(name: str, folder: Path, *, image_size: int, **options: Any) -> Case:
    arguments = {"img_size": 112, **TIMM[name]}
    model: Any = shaken(timm.create_model(name, **arguments))
    timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    twin: Any = model
    if image_size != 112:
        options["image_size"] = image_size
        state = {"state_dict": model.state_dict(), "custom_load": False}
        twin = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=state, img_size=image_size, **TIMM[name]
        ).eval()
    encoder = TimmEncoder(source=str(folder), **(options | {"image_size": image_size}))

    def reference(pixels: Tensor, layer: int) -> Tensor:
        given = {"norm": False, "output_fmt": "NLC", "intermediates_only": True, "return_prefix_tokens": True}
        (found,) = twin.forward_intermediates(pixels, indices=[encoder.depth + layer], **given)
        return found if isinstance(found, Tensor) else torch.cat([found[1], found[0]], dim=1)

    return Case(encoder, reference, lambda x: twin.forward_head(twin.forward_features(x), pre_logits=True))


def check(case: Case, *, layer: int) -> None:
    encoder = case.encoder.eval()
    images = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = encoder(images)
        pixels = encoder.preprocess(images)
        expected = case.reference(pixels, layer)
        torch.testing.assert_close(tokens.tokens_BTD, expected[:, encoder.prefix :], atol=1e-5, rtol=0)
        assert tokens.tokens_BTD.shape[1] == encoder.grid_hw[0] * encoder.grid_hw[1]
        if encoder.saliency == "cls":
            torch.testing.assert_close(tokens.cls_BD, expected[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.pooled(images), case.pooled(pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1, 1.5], ids=["own size", "another size"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tokens_and_pooled_output_are_those_of_transformers(name: str, scale: float, tmp_path: Path) -> None:
    size = None if scale == 1 else int(scale * 4) * TRANSFORMERS[name].patch_size
    for layer in (-1, -2):
        check(of_transformers(name, tmp_path / str(layer), layer=layer, image_size=size), layer=layer)


@pytest.mark.parametrize("size", [112, 224], ids=["own size", "another size"])
@pytest.mark.parametrize("name", TIMM)
def test_tokens_and_pooled_output_are_those_of_timm(name: str, size: int, tmp_path: Path) -> None:
    check(of_timm(name, tmp_path, image_size=size, layer=-2), layer=-2)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_network_of_transformers_reads_another_size_for_a_while(name: str, tmp_path: Path) -> None:
    case = of_transformers(name, tmp_path, layer=-2)
    own, size = case.encoder.grid_hw, 6 * TRANSFORMERS[name].patch_size
    case.encoder.require_size(size)
    with case.encoder.at_size(size):
        assert case.encoder.grid_hw == (6, 6)
        check(case, layer=-2)
    assert case.encoder.grid_hw == own != (6, 6)


@pytest.mark.parametrize("name", [name for name in TIMM if "beit" not in name])
def test_a_network_of_timm_does_so_if_it_is_built_for_it(name: str) -> None:
    given = {**TIMM[name], "dynamic_img_size": True}
    encoder = TimmEncoder(model=name, arguments=given, image_size=112, layer=-2)
    model: Any = shaken(encoder.model)
    size = 10 * encoder.patch_size

    def reference(pixels: Tensor, layer: int) -> Tensor:
        given = {"norm": False, "output_fmt": "NLC", "intermediates_only": True, "return_prefix_tokens": True}
        (found,) = model.forward_intermediates(pixels, indices=[encoder.depth + layer], **given)
        return found if isinstance(found, Tensor) else torch.cat([found[1], found[0]], dim=1)

    encoder.require_size(size)
    with encoder.at_size(size):
        check(Case(encoder, reference, model), layer=-2)
    assert encoder.image_size == 112


@pytest.mark.parametrize("name", [name for name in TIMM if "dinov3" not in name])
def test_a_network_of_timm_refuses_it_otherwise(name: str) -> None:
    encoder = TimmEncoder(model=name, arguments=TIMM[name], image_size=112)
    with pytest.raises(ConfigError, match="112 px only" + ("" if "beit" in name else ".*dynamic_img_size: true")):
        encoder.require_size(10 * encoder.patch_size)


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if "siglip" not in name])
def test_saliency_is_the_cls_tokens_attention(name: str, tmp_path: Path) -> None:
    encoder = of_transformers(name, tmp_path).encoder.eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = encoder.attend(images)
        model: Any = encoder.model
        model.set_attn_implementation("eager")  # fused attention returns no weights
        rows = model(encoder.preprocess(images), output_attentions=True).attentions[encoder.layer][:, :, 0]
    patches = rows[..., encoder.prefix :]
    expected = patches / patches.sum(-1, keepdim=True)
    torch.testing.assert_close(found.logits_BHN[..., 1:].softmax(-1), expected, atol=1e-5, rtol=0)
    assert encoder.saliency == "cls"


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_saliency_without_a_cls_token_is_the_pooling_heads_attention(name: str, tmp_path: Path) -> None:
    encoder = of_transformers(name, tmp_path).encoder.eval()
    images, seen = torch.rand(2, 3, 32, 32), []
    attention: Any = encoder.model.get_submodule("head.attention")
    handle = attention.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    with torch.no_grad():
        encoder.pooled(images)  # torch's own forward, whose weights are the mean over heads
        handle.remove()
        found = encoder.attend(images)
    shares_BT = found.logits_BHN[..., 1:].softmax(-1).mean(1)
    torch.testing.assert_close(shares_BT, seen[0][:, 0], atol=1e-6, rtol=0)
    assert encoder.saliency == "pool"
    summary = (shares_BT[..., None] * found.tokens.tokens_BTD).sum(1)
    torch.testing.assert_close(found.tokens.cls_BD, summary, atol=1e-5, rtol=0)
    assert float(found.logits_BHN.softmax(-1)[..., 0].max()) == 0.0


def test_saliency_without_cls_token_and_pooling_head_is_the_agreement_with_the_mean_token() -> None:
    encoder = TimmEncoder(model="vit_base_patch16_siglip_gap_224", arguments=SMALL, image_size=48).eval()
    with torch.no_grad():
        found = encoder.attend(torch.rand(1, 3, 48, 48))
    tokens = found.tokens.tokens_BTD[0]
    mean = tokens.mean(0)
    cosines = torch.stack([token @ mean / token.norm() / mean.norm() for token in tokens])
    assert encoder.saliency == "mean" and found.logits_BHN.shape == (1, 1, 10)
    torch.testing.assert_close(found.logits_BHN[0, 0, 1:], 10 * cosines)


@pytest.mark.parametrize("name", ["siglip", "dinov2", "dinov3", "vit_base_patch16_siglip_224", "beit_base_patch16_224"])
def test_gradients_reach_what_trains_and_nothing_else(name: str, tmp_path: Path) -> None:
    if name in TRANSFORMERS:
        encoder = of_transformers(name, tmp_path, mole=MoLESettings(rank=2, num_experts=2)).encoder
    else:
        encoder = of_timm(name, tmp_path, image_size=112, mole=MoLESettings(rank=2, num_experts=2)).encoder
    encoder(torch.rand(2, 3, 32, 32)).tokens_BTD.square().sum().backward()
    reached = {key for key, parameter in encoder.named_parameters() if parameter.grad is not None}
    ids = {id(parameter): key for key, parameter in encoder.named_parameters()}
    added = {id(p) for mole in encoder.mole_layers() for part in mole.added_modules() for p in part.parameters()}
    plain = {ids[id(p)] for module in encoder.plain_modules() for p in module.parameters()}
    unused = {"mask_token"}  # of masked pre-training
    trained = {key for key in plain if key.rsplit(".", 1)[-1] not in unused}
    assert trained <= reached
    assert {key for key in reached if id(encoder.get_parameter(key)) not in added} == trained
    assert not any("head" in key or ".2." in key for key in plain)


@pytest.mark.parametrize("name", ["siglip", "dinov2 registers", "dinov3"])
def test_mole_changes_nothing_at_first_and_weights_load_beside_it(name: str, tmp_path: Path) -> None:
    plain = of_transformers(name, tmp_path / "plain").encoder.eval()
    student = TransformersEncoder(source=str(tmp_path / "plain"), mole=MoLESettings(rank=2)).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(student(images).tokens_BTD, plain(images).tokens_BTD)
    assert torch.equal(student.plain_copy()(images).tokens_BTD, plain(images).tokens_BTD)
    assert plain.fingerprint() == student.plain_copy().fingerprint()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TimmEncoder(model="convnext_atto"), ("convnext_atto", "ConvNeXt", "TimmExpert")),
        (lambda: TimmEncoder(model="vit_tiny_r_s16_p8_224"), ("vit_tiny_r_s16_p8_224", "ConvNet", "TimmExpert")),
        (lambda: TransformersEncoder(config={"model_type": "resnet"}, image_size=64), ("ResNetModel", "Siglip")),
        (lambda: TimmEncoder(model="vit_tiny_patch16_224", layer=-14), ("layer=-14", "-13..-1")),
        (lambda: TimmEncoder(), ("source", "model")),
        (lambda: TransformersEncoder(), ("source", "config")),
    ],
)
def test_encoders_that_cannot_be_taught_are_refused_by_name(make: Callable[[], object], named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert all(name in str(caught.value) for name in named)


def test_a_folder_of_another_library_is_refused_with_the_class_that_reads_it(tmp_path: Path) -> None:
    of_transformers("siglip", tmp_path)
    with pytest.raises(WeightsError, match="siglip_vision_model.*TransformersEncoder"):
        TimmEncoder(source=str(tmp_path))


def test_an_unknown_family_is_refused_with_the_families_and_the_way_to_add_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "my_own_vit"}', encoding="utf-8")
    with pytest.raises(WeightsError) as caught:
        TransformersEncoder(source=str(tmp_path))
    for named in ("my_own_vit", "SiglipVisionModel", "Eva", "open_clip", "docs/encoders.md", "--as expert"):
        assert named in str(caught.value)
    with pytest.raises(ConfigError, match=r"my_own_vit.*list_models"):
        TimmEncoder(model="my_own_vit")


@pytest.mark.parametrize(
    ("model", "theirs"),
    [("beit_base_patch16_224", "vit_base_patch16_clip_224"), ("vit_tiny_patch16_224", "eva02_tiny_patch14_224")],
)
def test_weights_of_another_family_of_timm_are_refused_with_file_and_model(
    model: str, theirs: str, tmp_path: Path
) -> None:
    save_file(timm.create_model(theirs, **TIMM[theirs]).state_dict(), tmp_path / "other.safetensors")
    encoder = TimmEncoder(source=str(tmp_path / "other.safetensors"), model=model, arguments=TIMM[model])
    with pytest.raises(WeightsError, match=f"other.safetensors.*{model}"):
        encoder.load_weights()


def test_a_pooling_head_that_the_weights_lack_is_not_left_random(tmp_path: Path) -> None:
    of_transformers("siglip", tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    kept = {key: value for key, value in load_file(path).items() if not key.startswith(("head.", "vision_model.head."))}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"head\..*vision_use_head"):
        TransformersEncoder(source=str(tmp_path)).load_weights()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vision_use_head": False}))
    encoder = TransformersEncoder(source=str(tmp_path)).eval()
    with torch.no_grad():
        assert encoder.attend(torch.rand(1, 3, 32, 32)).logits_BHN.shape == (1, 1, 17)
    assert encoder.saliency == "mean"
    with pytest.raises(ConfigError, match="no pooled output"):
        encoder.pooled(torch.rand(1, 3, 32, 32))

"""Experts at another ``image_size`` than their weights are for, against their own library's forward at that size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from open_clip import CLIP
from safetensors.torch import save_file
from timm.models import _registry
from torch import Tensor

from tests.experts.tiny_models import randomized, saved
from visexpert.errors import ConfigError, WeightsError
from visexpert.experts import DepthExpert, OpenClipExpert, SegmentationExpert, TimmExpert, VisionExpert
from visexpert.networks.open_clip import STUB_TEXT

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2}
SMALL_SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (2, 1, 1, 2), "num_heads": (1, 1, 2, 2)}


@dataclass(frozen=True)
class OfTimm:
    """A model of timm.

    Args:
        name: With its tag.
        arguments: What makes it small.
        size: Side of the images in pixels.
        grid: Side of the grid, by hand.
        own: How timm itself reads such images: arguments of a model with the same weights, or ``set_input_size``.
    """

    name: str
    arguments: dict[str, Any]
    size: int
    grid: int
    own: dict[str, Any] | None


OF_TIMM = {
    "deit3": OfTimm("deit3_small_patch16_224.fb_in1k", SMALL, 96, 6, {"dynamic_img_size": True}),
    "eva02 with RoPE": OfTimm("eva02_tiny_patch14_224.mim_in22k", SMALL, 112, 8, {"dynamic_img_size": True}),
    "DINOv3 with RoPE": OfTimm("vit_small_patch16_dinov3.lvd1689m", SMALL, 96, 6, {}),
    "beit": OfTimm("beit_base_patch16_224.in22k_ft_in22k_in1k", SMALL, 96, 6, None),
    # Windows of 7 x 7 at every size: no weight changes with it.
    "swin": OfTimm("swin_tiny_patch4_window7_224.ms_in1k", SMALL_SWIN, 448, 14, {"img_size": 448}),
    "convnext": OfTimm("convnext_atto.d2_in1k", {"depths": (1,) * 4, "dims": (8, 8, 12, 16)}, 96, 3, {}),
}


def as_tokens(features: Tensor, count: int, *, channels_last: bool = False) -> Tensor:
    """(B, S, E) of maps, or of the tokens behind those without a place."""
    if features.ndim == 4:
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    return features[:, -count:]


def same(expert: VisionExpert, images_BCHW: Tensor, reference_BSE: Tensor) -> None:
    with torch.no_grad():
        tokens_BSE = expert(images_BCHW).tokens_BSE
    scale = reference_BSE.abs().amax()
    assert reference_BSE.std() > 1e-3 * scale
    torch.testing.assert_close(tokens_BSE / scale, reference_BSE / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(OF_TIMM))
def test_of_timm(tmp_path: Path, name: str) -> None:
    case = OF_TIMM[name]
    model: Any = randomized(timm.create_model(case.name, pretrained=False, **case.arguments))
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    expert = TimmExpert(model=case.name, weights=str(tmp_path), arguments=case.arguments, image_size=case.size).eval()
    expert.load_weights()
    if case.own is None:
        model.set_input_size(case.size)
    else:
        other: Any = timm.create_model(case.name, pretrained=False, **case.arguments, **case.own).eval()
        other.load_state_dict(model.state_dict())
        model = other
    images_BCHW = torch.rand(1, 3, case.size, case.size)
    with torch.no_grad():
        features = model.forward_features((images_BCHW - expert.mean) / expert.std)
    assert expert.grid_hw == (case.grid, case.grid)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    same(expert, images_BCHW, as_tokens(features, case.grid**2, channels_last=channels_last))


def test_what_timm_does_not_fit_is_refused_with_the_size_that_works(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"embed_dim": 8, "stages": (1, 1, 1, 1)}
    model: Any = timm.create_model("hiera_tiny_224", pretrained=False, **arguments)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    expert = TimmExpert(
        model="hiera_tiny_224.mae_in1k_ft_in1k", weights=str(tmp_path), arguments=arguments, image_size=96
    )
    with pytest.raises(WeightsError, match=r"do not fit hiera_tiny_224.* at 96 px .*; use .*image_size 224"):
        expert.load_weights()


PLAIN: dict[str, Any] = {"image_size": 64, "patch_size": 16, "layers": 2, "width": 24, "head_width": 12}
TRUNKS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("vit_base_patch16_siglip_224", SMALL),
    "eva02": ("eva02_tiny_patch14_224", SMALL),
    "beit": ("beit_base_patch16_224", SMALL),
    "swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
}
OF_OPEN_CLIP: dict[str, tuple[dict[str, Any], int, int]] = {
    "openai": (PLAIN, 96, 6),
    "siglip": ({"image_size": 224, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"}, 96, 6),
    "eva02": ({"image_size": 224, "timm_model_name": "tiny_eva02", "timm_pool": "token", "timm_proj": None}, 112, 8),
    "beit": ({"image_size": 224, "timm_model_name": "tiny_beit", "timm_pool": "token", "timm_proj": None}, 96, 6),
    "swin": ({"image_size": 224, "timm_model_name": "tiny_swin", "timm_pool": "", "timm_proj": "linear"}, 448, 14),
}
"""``vision_cfg``, side of the images, side of the grid by hand."""


@pytest.fixture
def tiny_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models in timm's list, for open_clip names its trunks and passes no sizes on."""
    entrypoints: dict[str, Any] = _registry._model_entrypoints
    for name, (of, arguments) in TRUNKS.items():
        monkeypatch.setitem(entrypoints, f"tiny_{name}", partial(entrypoints[of], **arguments))


@pytest.mark.usefixtures("tiny_trunks")
@pytest.mark.parametrize("name", list(OF_OPEN_CLIP))
def test_of_open_clip(tmp_path: Path, name: str) -> None:
    """open_clip loads the weights first and then has timm's trunk change its size."""
    vision, size, grid = OF_OPEN_CLIP[name]
    model: Any = randomized(CLIP(24, vision, STUB_TEXT))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": STUB_TEXT}
    written = {"model_cfg": settings, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
    expert = OpenClipExpert(model="any", weights=str(tmp_path), image_size=size).eval()
    expert.load_weights()
    assert expert.grid_hw == (grid, grid)
    visual: Any = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=size).eval().visual
    images_BCHW = torch.rand(1, 3, size, size)
    with torch.no_grad():
        found = visual.forward_intermediates(
            (images_BCHW - expert.mean) / expert.std, indices=1, normalize_intermediates=True
        )
    same(expert, images_BCHW, as_tokens(found["image_intermediates"][-1], grid**2))


VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
BEIT = VIT | {
    "model_type": "beit",
    "use_relative_position_bias": True,
    "out_indices": [1, 2, 3, 4],
    "reshape_hidden_states": False,
}
STAGES: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "depths": [1] * 4}
SWIN = STAGES | {"model_type": "swin", "embed_dim": 8, "num_heads": [1, 1, 2, 2], "image_size": 32, "window_size": 2}
BIT: dict[str, Any] = {
    "model_type": "bit",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16],
    "depths": [1, 1, 1],
    "num_groups": 4,
    "layer_type": "bottleneck",
    "global_padding": "same",
    "out_features": ["stage1", "stage2", "stage3"],
}
NECK: dict[str, Any] = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
DPT = VIT | NECK | {"backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False}
HYBRID = DPT | {
    "patch_size": 16,
    "is_hybrid": True,
    "backbone_config": BIT,
    "backbone_featmap_shape": [1, 16, 2, 2],
    "neck_ignore_stages": [0, 1],
}
ZOE = NECK | {"backbone_config": BEIT, "bottleneck_features": 8, "num_attractors": [4, 2, 2, 1], "bin_embedding_dim": 8}
UPER: dict[str, Any] = {"hidden_size": 16, "auxiliary_in_channels": 32, "num_labels": 5}
PYRAMID = BEIT | {"reshape_hidden_states": True, "add_fpn": True}
LABELS = {"num_labels": 5}

DENSE: dict[str, tuple[str, dict[str, Any], int]] = {
    "DPT": ("DPTForDepthEstimation", DPT, 48),
    "DPT on BEiT": ("DPTForDepthEstimation", NECK | {"backbone_config": BEIT, "hidden_size": 16, "patch_size": 8}, 48),
    "ZoeDepth on BEiT": ("ZoeDepthForDepthEstimation", ZOE, 48),
    "BEiT": ("BeitForSemanticSegmentation", BEIT | LABELS, 48),
    "BEiT, absolute": ("BeitForSemanticSegmentation", BEIT | LABELS | {"use_absolute_position_embeddings": True}, 48),
    "DPT, classes": ("DPTForSemanticSegmentation", DPT | LABELS, 48),
    "UperNet on Swin": ("UperNetForSemanticSegmentation", UPER | {"backbone_config": SWIN}, 96),
    "UperNet on BEiT": (
        "UperNetForSemanticSegmentation",
        UPER | {"backbone_config": PYRAMID, "auxiliary_in_channels": 16},
        64,
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], int]] = {
    "DPT-hybrid": ("DPTForDepthEstimation", HYBRID, 48),
    "Data2Vec": ("Data2VecVisionForSemanticSegmentation", BEIT | LABELS | {"model_type": "data2vec-vision"}, 48),
    "UperNet on Swin, absolute": (
        "UperNetForSemanticSegmentation",
        UPER | {"backbone_config": SWIN | {"use_absolute_embeddings": True}},
        96,
    ),
}


def dense(folder: Path, kind: str, fields: dict[str, Any]) -> tuple[Any, type[Any], dict[str, Any]]:
    """A model in a folder, the expert that predicts with it, and what it is given."""
    model: Any = getattr(transformers, kind)
    fields = {key: value for key, value in fields.items() if key != "model_type"}
    whole = randomized(model(model.config_class(**fields)))
    depth = kind.endswith("DepthEstimation")
    processor = transformers.DPTImageProcessor if depth else transformers.SegformerImageProcessor
    saved(whole, processor(size={"height": 32, "width": 32}), folder)
    options = {"source": str(folder), "tokens": "prediction", **({"scale": "raw"} if depth else {})}
    return whole, DepthExpert if depth else SegmentationExpert, options


@pytest.mark.parametrize("name", list(DENSE))
def test_predictions_of_transformers(tmp_path: Path, name: str) -> None:
    kind, fields, size = DENSE[name]
    model, expert_class, options = dense(tmp_path, kind, fields)
    expert = expert_class(**options, image_size=size).eval()
    expert.load_weights()
    images_BCHW = torch.rand(1, 3, size, size)
    with torch.no_grad():
        output = model((images_BCHW - expert.mean) / expert.std)
    found = output.predicted_depth[:, None] if "predicted_depth" in output else output.logits.softmax(dim=1)
    same(expert, images_BCHW, as_tokens(found, found[0, 0].numel()))


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_transformers_does_not_predict_at_another_size_is_refused(tmp_path: Path, name: str) -> None:
    kind, fields, size = REFUSED[name]
    model, expert_class, options = dense(tmp_path, kind, fields)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        model(torch.rand(1, 3, size, size))
    with pytest.raises(ConfigError, match=f" {size} px .*image_size"):
        expert_class(**options, image_size=size)
    own = expert_class(**options, image_size=32).eval()
    own.load_weights()

"""What a model's own code and configuration say is used: interpolation, grids, chance, preparation of images."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from open_clip import CLIP
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from tests.experts.tiny_models import CLIP_VISION, DINOV2, randomized, saved
from visexpert.errors import ConfigError
from visexpert.experts import OpenClipExpert, TimmExpert, TransformersExpert
from visexpert.networks.open_clip import STUB_TEXT
from visexpert.vision.published import describe_clip

VIT = {**CLIP_VISION, "model_type": "vit"}
YOLOS = {**CLIP_VISION, "model_type": "yolos", "image_size": [32, 48], "num_detection_tokens": 5}
FAMILIES: list[tuple[dict[str, Any], int, int]] = [
    ({"model_type": "clip_vision_model", **CLIP_VISION}, 1, 0),
    ({"model_type": "siglip_vision_model", **CLIP_VISION}, 0, 0),
    (DINOV2, 1, 0),
    ({**DINOV2, "model_type": "dinov2_with_registers", "num_register_tokens": 4}, 5, 0),
    ({**DINOV2, "model_type": "dinov3_vit", "num_register_tokens": 4}, 5, 0),
    (VIT, 1, 0),
    ({**VIT, "model_type": "deit"}, 2, 0),
    ({**VIT, "model_type": "vit_msn"}, 1, 0),
    ({**VIT, "model_type": "ijepa"}, 0, 0),
    ({**VIT, "model_type": "beit", "use_absolute_position_embeddings": True}, 1, 0),
    ({**VIT, "model_type": "beit", "use_relative_position_bias": True}, 1, 0),
    ({**VIT, "model_type": "data2vec-vision", "use_shared_relative_position_bias": True}, 1, 0),
    ({**VIT, "model_type": "dpt", "backbone_out_indices": [0, 1, 2, 2]}, 1, 0),
    (YOLOS, 1, 5),
]


def folder(config: dict[str, Any], path: Path) -> Any:
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = randomized(AutoModel.from_config(AutoConfig.for_model(config["model_type"], **fields)))
    saved(model, transformers.BitImageProcessor(), path)
    return model


@pytest.mark.parametrize(("config", "prefix", "suffix"), FAMILIES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("grid", [2, 7])
def test_another_size_equals_the_librarys_own_forward(
    tmp_path: Path, config: dict[str, Any], prefix: int, suffix: int, grid: int
) -> None:
    model = folder(config, tmp_path)
    size = grid * int(config["patch_size"])
    expert = TransformersExpert(source=str(tmp_path), image_size=size).eval()
    expert.load_weights()
    images_BCHW = torch.rand(2, 3, size, size)
    takes = inspect.signature(model.forward).parameters
    asked = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    with torch.no_grad():
        expected_BNE = model((images_BCHW - expert.mean) / expert.std, **asked).last_hidden_state
        tokens = expert(images_BCHW)
    assert tokens.grid_hw == (grid, grid)
    expected_BSE = expected_BNE[:, prefix : expected_BNE.shape[1] - suffix]
    torch.testing.assert_close(tokens.tokens_BSE, expected_BSE, atol=1e-5, rtol=1e-5)


SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32}
STAGES = {"depths": [1, 1, 1, 1], "image_size": 64}
PYRAMIDS: list[dict[str, Any]] = [
    {**SWIN, "model_type": "swin", "window_size": 2},
    {**SWIN, "model_type": "swin", "window_size": 4, "use_absolute_embeddings": True},
    {**SWIN, "model_type": "swinv2", "window_size": 4},
    {**STAGES, "model_type": "convnext", "hidden_sizes": [8, 8, 12, 16]},
    {"model_type": "resnet", "hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1], "embedding_size": 8},
    {**STAGES, "model_type": "pvt_v2", "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4},
]


@pytest.mark.parametrize("config", PYRAMIDS, ids=lambda config: config["model_type"])
def test_pyramids_at_another_size_equal_the_librarys_own_forward(tmp_path: Path, config: dict[str, Any]) -> None:
    model = folder(config, tmp_path)
    expert = TransformersExpert(source=str(tmp_path), image_size=96).eval()
    expert.load_weights()
    images_BCHW = torch.rand(2, 3, 96, 96)
    takes = inspect.signature(model.forward).parameters
    asked = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    with torch.no_grad():
        expected = model((images_BCHW - expert.mean) / expert.std, **asked).last_hidden_state
        found_BSE = expert(images_BCHW).tokens_BSE
    expected_BSE = expected if expected.ndim == 3 else expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found_BSE, expected_BSE, atol=1e-5, rtol=1e-5)


def test_what_the_library_cannot_do_at_another_size_is_refused() -> None:
    """PVT's own interpolation is broken, and that of Swin v2 with absolute embeddings counts one too many."""
    pvt = {**STAGES, "model_type": "pvt", "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4}
    absolute = {**SWIN, "model_type": "swinv2", "window_size": 4, "use_absolute_embeddings": True}
    for config in (pvt, absolute):
        with pytest.raises(ConfigError, match=r" 96 px .*image_size"):
            TransformersExpert(config=config, image_size=96)


@pytest.mark.parametrize("side", [32, 64])
def test_siglip2_reads_patches_as_its_own_processor_cuts_them(tmp_path: Path, side: int) -> None:
    """At its own size and another; the images go through the library's processor, which pads them."""
    fields = {key: value for key, value in CLIP_VISION.items() if key != "image_size"}
    model = randomized(AutoModel.from_config(AutoConfig.for_model("siglip2_vision_model", num_patches=16, **fields)))
    processor: Any = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=64, do_resize=False)
    saved(model, processor, tmp_path)
    assert TransformersExpert(source=str(tmp_path)).image_size == 32
    expert = TransformersExpert(source=str(tmp_path), image_size=side).eval()
    expert.load_weights()
    images_BCHW = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        prepared = processor(list(images_BCHW), return_tensors="pt", patch_size=8)
        expected_BNE = model(**prepared).last_hidden_state
        tokens = expert(images_BCHW / 255)
    assert tokens.grid_hw == (side // 8, side // 8)
    count = (side // 8) ** 2
    torch.testing.assert_close(tokens.tokens_BSE, expected_BNE[:, :count], atol=1e-4, rtol=1e-4)


def test_the_grid_is_the_configurations() -> None:
    """5 + 4 tokens are no grid of 3 x 3."""
    config = {"model_type": "dinov3_vit", **CLIP_VISION, "patch_size": 16, "num_register_tokens": 4}
    assert TransformersExpert(config=config, image_size=32).grid_hw == (2, 2)


def test_a_class_token_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"class token.*layer.*-1"):
        TimmExpert(model="pit_ti_224", weights="random")


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    config = {**CLIP_VISION, "model_type": "vit_mae", "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    with pytest.raises(ConfigError, match=r"random numbers \(rand.*vit_base_patch16_224\.mae"):
        TransformersExpert(config=config)


def test_an_open_clip_folder_says_how_it_computes(tmp_path: Path) -> None:
    settings = {
        "embed_dim": 10,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 24, "head_width": 6},
    }
    model: Any = randomized(CLIP(10, settings["vision_cfg"], STUB_TEXT, quick_gelu=True))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    prepared = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": prepared}))
    expert = OpenClipExpert(model="ViT-B-16", weights=str(tmp_path), framing="own").eval()
    expert.load_weights()
    assert expert.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert (expert.preprocessing.interpolation, expert.preprocessing.framing, expert.image_size) == (
        "bilinear",
        "squash",
        32,
    )
    images_BCHW = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        found = model.visual.forward_intermediates(
            (images_BCHW - expert.mean) / expert.std, indices=1, normalize_intermediates=True, output_fmt="NCHW"
        )
        expected = found["image_intermediates"][0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, expected, atol=1e-4, rtol=1e-4)


def test_a_file_gets_its_models_own_mean() -> None:
    expert = OpenClipExpert(model="MobileCLIP2-S0", weights="random")
    assert expert.mean.flatten().tolist() == [0.0, 0.0, 0.0]
    assert list(describe_clip(None, architecture="ViT-B-16").mean) == pytest.approx([0.48145466, 0.4578275, 0.40821073])

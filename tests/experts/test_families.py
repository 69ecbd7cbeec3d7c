"""Families of transformers as experts: folders of whole models, against the library's own forward of their vision part.

Folders are written by ``save_pretrained``, the whole model with the image processor of its family.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.experts.test_hubs import build
from tests.experts.tiny_models import DEPTH, SAM, randomized, saved
from visexpert.errors import ConfigError, WeightsError
from visexpert.experts import TransformersExpert, VisionExpert
from visexpert.networks.huggingface import interpolates

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = SIZES | {"image_size": 32, "patch_size": 8}
LISTED = VIT | {"image_size": [32, 32], "patch_size": [8, 8]}
TEXT = SIZES | {
    "vocab_size": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "max_position_embeddings": 16,
}
LLAMA = TEXT | {"model_type": "llama", "num_key_value_heads": 1}
SMALL = {"projection_dim": 8}
CLIP_LIKE: dict[str, Any] = {"vision_config": VIT, "text_config": TEXT, **SMALL}
STAGES: dict[str, Any] = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
HIERA: dict[str, Any] = {
    "embed_dim": 8,
    "image_size": [32, 32],
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 2],
    "masked_unit_size": [4, 4],
    "num_query_pool": 1,
}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 2}
HIERA_DET: dict[str, Any] = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "num_attention_heads": 1,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1] * 4,
    "global_attention_blocks": [3],
    "window_size_per_stage": [4, 2, 2, 2],
    "window_positional_embedding_background_size": [2, 2],
    "image_size": [64, 64],
}
SAM2: dict[str, Any] = {
    "vision_config": {"backbone_config": HIERA_DET, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16},
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 8, "num_attention_heads": 1, "iou_head_hidden_dim": 8},
}
FLORENCE: dict[str, Any] = {
    "vision_config": {
        "embed_dim": [8, 8, 16, 16],
        "depths": [1] * 4,
        "num_heads": [1, 1, 2, 2],
        "num_groups": [1, 1, 2, 2],
        "window_size": 2,
        "projection_dim": 16,
    },
    "text_config": {
        "model_type": "bart",
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
        "vocab_size": 32,
        "max_position_embeddings": 16,
    },
    "image_token_id": 3,
}
MBART: dict[str, Any] = {
    "model_type": "mbart",
    "d_model": 16,
    "decoder_layers": 1,
    "decoder_ffn_dim": 8,
    "decoder_attention_heads": 1,
    "encoder_layers": 1,
    "encoder_ffn_dim": 8,
    "encoder_attention_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "is_decoder": True,
    "add_cross_attention": True,
}
CROSS = {"encoder_hidden_size": 16}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        model: Class of the whole model.
        config: Fields of its configuration.
        tower: Where its vision part is; empty for all of it.
        prefix: Tokens before the grid, by hand.
        grid: Side of the grid, by hand.
        processor: Class of its image processor, Fast or not.
        size: Side to ask for where nothing in the files is small enough; None for the model's own.
    """

    model: str
    config: dict[str, Any]
    tower: str = "vision_model"
    prefix: int = 1
    grid: int = 4
    processor: str = "CLIPImageProcessor"
    size: int | None = None


SIGLIP = VIT | {"model_type": "siglip_vision_model"}
VICUNA: dict[str, Any] = {"text_config": LLAMA, "image_token_index": 3}
FAMILIES = {
    "metaclip_2": Family("MetaClip2Model", CLIP_LIKE),
    "altclip": Family("AltCLIPModel", CLIP_LIKE | {"text_config": TEXT | {"project_dim": 8}}),
    "chinese_clip": Family("ChineseCLIPModel", CLIP_LIKE, processor="ChineseCLIPImageProcessor"),
    "clipseg": Family(
        "CLIPSegForImageSegmentation",
        CLIP_LIKE | {"extract_layers": [0, 1], "reduce_dim": 8, "decoder_num_attention_heads": 2},
        tower="clip.vision_model",
        processor="ViTImageProcessor",
    ),
    "blip": Family(
        "BlipForConditionalGeneration", CLIP_LIKE | {"text_config": TEXT | CROSS}, processor="BlipImageProcessor"
    ),
    "blip-2": Family(
        "Blip2ForConditionalGeneration",
        {"vision_config": VIT, "text_config": LLAMA, "qformer_config": TEXT | CROSS, "num_query_tokens": 2},
        processor="BlipImageProcessor",
    ),
    "owlvit": Family(
        "OwlViTForObjectDetection", CLIP_LIKE, tower="owlvit.vision_model", processor="OwlViTImageProcessor"
    ),
    "owlv2": Family("Owlv2Model", CLIP_LIKE, processor="Owlv2ImageProcessor"),
    "aimv2": Family("Aimv2Model", CLIP_LIKE, prefix=0),
    "flava": Family(
        "FlavaModel",
        {
            "image_config": VIT,
            "text_config": TEXT,
            "multimodal_config": SIZES,
            **SMALL,
            "hidden_size": 16,
            "image_codebook_config": {"num_groups": 4, "num_blocks_per_group": 1, "hidden_size": 8},
        },
        tower="image_model",
        processor="FlavaImageProcessor",
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        {"vision_config": VIT, "text_config": LLAMA, "image_token_id": 3},
        tower="model.vision_tower",
        processor="GotOcr2ImageProcessor",
    ),
    "internvl_lists": Family(
        "InternVLForConditionalGeneration",
        {"vision_config": LISTED, "text_config": LLAMA, "image_token_id": 3},
        tower="model.vision_tower",
        processor="GotOcr2ImageProcessor",
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        VICUNA | {"vision_config": VIT | {"model_type": "clip_vision_model"}},
        tower="model.vision_tower",
        processor="LlavaNextImageProcessor",
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": SIGLIP,
            "image_token_index": 3,
            **SMALL,
            "text_config": TEXT | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8},
        },
        tower="model.vision_tower",
        prefix=0,
        processor="SiglipImageProcessor",
    ),
    "florence2": Family(
        "Florence2ForConditionalGeneration", FLORENCE, tower="model.vision_tower", prefix=0, grid=2, size=64
    ),
    "donut": Family(
        "VisionEncoderDecoderModel",
        {"encoder": SWIN | {"model_type": "donut-swin"}, "decoder": MBART},
        tower="encoder",
        prefix=0,
        processor="DonutImageProcessor",
    ),
    "dual": Family(
        "VisionTextDualEncoderModel",
        {"vision_config": VIT | {"model_type": "vit"}, "text_config": TEXT | {"model_type": "bert"}, **SMALL},
        processor="ViTImageProcessor",
    ),
    "sam": Family(
        "SamModel",
        {
            "vision_config": {**SAM, "output_channels": 16, "num_pos_feats": 8},
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 8},
            "mask_decoder_config": SAM2["mask_decoder_config"],
        },
        tower="vision_encoder",
        prefix=0,
        grid=8,
        processor="SamImageProcessor",
    ),
    "sam2": Family("Sam2Model", SAM2, tower="vision_encoder", prefix=0, grid=2, processor="Sam2ImageProcessor"),
    "yolos": Family(
        "YolosForObjectDetection",
        VIT | {"image_size": [32, 48], "num_detection_tokens": 5},
        tower="vit",
        processor="YolosImageProcessor",
        size=32,
    ),
    "glpn": Family(
        "GLPNForDepthEstimation",
        STAGES | {"decoder_hidden_size": 8},
        tower="glpn",
        prefix=0,
        grid=2,
        processor="GLPNImageProcessor",
        size=64,
    ),
    "cvt": Family(
        "CvtForImageClassification",
        {"embed_dim": [8, 16, 16], "depth": [1, 2, 3], "num_heads": [1, 2, 2]},
        tower="cvt",
        prefix=0,
        processor="ConvNextImageProcessor",
        size=64,
    ),
    "dpt": Family(
        "DPTForDepthEstimation",
        VIT
        | {
            "backbone_out_indices": [0, 0, 1, 1],
            "neck_hidden_sizes": [8] * 4,
            "fusion_hidden_size": 8,
            "is_hybrid": False,
        },
        tower="dpt",
        processor="DPTImageProcessor",
    ),
    "pvt": Family(
        "PvtForImageClassification", STAGES | {"image_size": 64}, tower="pvt", grid=2, processor="PvtImageProcessor"
    ),
}


def whole(family: Family) -> Any:
    """The model, every weight drawn anew."""
    model: Any = getattr(transformers, family.model)
    fields = dict(family.config)
    if family.model in ("VisionEncoderDecoderModel", "VisionTextDualEncoderModel"):  # built of configurations
        names = ("encoder", "decoder") if "encoder" in fields else ("vision_config", "text_config")
        parts = [transformers.AutoConfig.for_model(**fields.pop(name)) for name in names]
        how = "from_encoder_decoder_configs" if "encoder" in names else "from_vision_text_configs"
        return randomized(model(getattr(model.config_class, how)(*parts, **fields)))
    return randomized(model(model.config_class(**fields)))


def loaded(folder: Path, **options: Any) -> VisionExpert:
    """The expert as a configuration names it."""
    arguments = {"source": str(folder), **options}
    named = {"class_path": "visexpert.experts.TransformersExpert", "init_args": arguments}
    expert = build({"expert": named})["expert"].eval()
    expert.load_weights()
    return expert


def written(name: str, folder: Path) -> Any:
    family = FAMILIES[name]
    model = whole(family)
    saved(model, getattr(transformers, family.processor)(), folder)
    return model.get_submodule(family.tower)


def expected(tower: Any, pixels_BCHW: Tensor, prefix: int, count: int, **options: Any) -> Tensor:
    with torch.no_grad():
        features: Tensor = tower(pixels_BCHW, **options).last_hidden_state
    if features.ndim == 4:
        features = features.permute(0, 3, 1, 2) if features.shape[1] == features.shape[2] else features
        features = features.flatten(2).transpose(1, 2)
    return features[:, prefix : prefix + count]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_folder_of_a_whole_model(tmp_path: Path, name: str) -> None:
    family, tower = FAMILIES[name], written(name, tmp_path)
    expert = loaded(tmp_path, **({} if family.size is None else {"image_size": family.size}))
    assert expert.grid_hw == (family.grid, family.grid)
    images_BCHW = torch.rand(2, 3, expert.image_size, expert.image_size)
    with torch.no_grad():
        tokens_BSE = expert(images_BCHW).tokens_BSE
    pixels_BCHW = (images_BCHW - expert.mean) / expert.std
    reference = expected(tower, pixels_BCHW, family.prefix, family.grid**2)
    assert tokens_BSE.std() > 1e-3
    torch.testing.assert_close(tokens_BSE, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["metaclip_2", "clipseg", "blip", "owlvit", "flava", "internvl", "internvl_lists"])
def test_another_size_equals_the_librarys_interpolation(tmp_path: Path, name: str) -> None:
    tower = written(name, tmp_path)
    expert = loaded(tmp_path, image_size=48)
    assert expert.grid_hw == (6, 6)
    images_BCHW = torch.rand(1, 3, 48, 48)
    asked = {"interpolate_pos_encoding": True} if interpolates(tower) else {}
    with torch.no_grad():
        tokens_BSE = expert(images_BCHW).tokens_BSE
    reference = expected(tower, (images_BCHW - expert.mean) / expert.std, 1, 36, **asked)
    torch.testing.assert_close(tokens_BSE, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [None, 0, 1, -1])
def test_tokens_of_hiera_are_row_by_row(tmp_path: Path, layer: int | None) -> None:
    """Inside, they are sorted by window: 4 x 4 patches, of which 2 x 2 tokens are left behind the only pooling.

    As many channels as rows, as Hiera has them at 384 px, do not make rows of channels.
    """
    config = transformers.HieraConfig(**HIERA)
    model = randomized(transformers.HieraModel(config))
    saved(model, transformers.BitImageProcessor(), tmp_path)
    expert = loaded(tmp_path, layer=layer)
    images_BCHW = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        output = model((images_BCHW - expert.mean) / expert.std, output_hidden_states=True)
        tokens_BSE = expert(images_BCHW).tokens_BSE
    reference_BHWE = output.reshaped_hidden_states[-1 if layer is None else layer]
    assert expert.grid_hw == reference_BHWE.shape[1:3]
    torch.testing.assert_close(tokens_BSE, reference_BHWE.flatten(1, 2), atol=1e-5, rtol=1e-5)
    assert not torch.equal(output.hidden_states[-1 if layer is None else layer], tokens_BSE)


def test_a_processor_without_a_mean_leaves_pixels_as_they_are(tmp_path: Path) -> None:
    written("glpn", tmp_path)
    expert = loaded(tmp_path, image_size=64)
    images_BCHW = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(expert.preprocess(images_BCHW), images_BCHW)


@pytest.mark.parametrize("before", ["", "clip_model.", "model.teacher.vision_model."])
def test_weights_are_found_by_what_stands_before_their_names(tmp_path: Path, before: str) -> None:
    written("blip", tmp_path)
    first = loaded(tmp_path).fingerprint()
    path = tmp_path / "model.safetensors"
    state = {before + name: value for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    assert loaded(tmp_path).fingerprint() == first


def test_a_split_file_of_torch(tmp_path: Path) -> None:
    model = whole(FAMILIES["metaclip_2"])
    saved(model, transformers.CLIPImageProcessor(), tmp_path)
    first = loaded(tmp_path).fingerprint()
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert loaded(tmp_path).fingerprint() == first


def test_two_encoders_of_a_kind_are_refused(tmp_path: Path) -> None:
    tower = written("metaclip_2", tmp_path)
    state = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in tower.state_dict().items()}
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"several such encoders, under \['student.', 'teacher.'\]"):
        loaded(tmp_path)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    tower = written("blip", tmp_path)
    state = {f"visual.{key}x": value.clone() for key, value in tower.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"model.safetensors .* lacks \['embeddings.class_embedding'.* this model"):
        loaded(tmp_path)


def test_what_was_given_must_agree_with_the_vision_part(tmp_path: Path) -> None:
    written("flava", tmp_path)
    wrong = {"model_type": "flava", "image_config": VIT | {"num_attention_heads": 4}}
    with pytest.raises(ConfigError, match="were made with num_attention_heads=2, not 4"):
        TransformersExpert(source=str(tmp_path), config=wrong)
    right = {"model_type": "flava", "image_config": VIT}
    assert TransformersExpert(source=str(tmp_path), config=right).grid_hw == (4, 4)


VIDEO = VIT | {"num_frames": 2}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "depth_anything": (DEPTH, "model_type 'depth_anything'; use visexpert.experts.DepthExpert"),
    "upernet": (
        {"model_type": "upernet", "backbone_config": {"model_type": "convnext", "hidden_sizes": [8] * 4}},
        "model_type 'upernet'; use visexpert.experts.SegmentationExpert",
    ),
    "vitpose": ({"model_type": "vitpose"}, r"model_type 'vitpose'.*docs/own-expert\.md"),
    "idefics": ({"model_type": "idefics"}, "model_type 'idefics_vision'; use another model"),
    "groupvit": (
        {
            "model_type": "groupvit",
            "vision_config": VIT | {"depths": [1] * 3, "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]},
        },
        "groups of patches",
    ),
    "xclip": ({"model_type": "xclip", "vision_config": VIDEO}, "it reads videos of 2 frames"),
    "videomae": ({"model_type": "videomae", **VIDEO}, "it reads videos of 2 frames"),
    "vjepa2": ({"model_type": "vjepa2", **VIT, "crop_size": 32, "frames_per_clip": 4}, "it reads videos of 4 frames"),
    "bridgetower": (
        {"model_type": "bridgetower", "vision_config": {"hidden_size": 64, "num_hidden_layers": 1, "image_size": 32}},
        "output, Tensor,",
    ),
    "idefics2": ({"model_type": "idefics2", "vision_config": VIT}, "values of pixels"),
    "qwen2_5_vl": ({"model_type": "qwen2_5_vl", "vision_config": {"depth": 1}}, "besides pixels .*grid_thw"),
    "vit_mae": ({"model_type": "vit_mae", **VIT}, "draws random numbers"),
    "remote": (
        {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling.Chat"}},
        r"model_type 'internvl_chat' .*\(auto_map\)",
    ),
    "timm": ({"architecture": "resnet18", "num_classes": 0}, "'resnet18'.*TimmExpert"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_encoder_of_images_is_refused_with_a_next_step(tmp_path: Path, name: str) -> None:
    fields, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    transformers.BitImageProcessor().save_pretrained(tmp_path)
    options = {} if "image_size" in json.dumps(fields) else {"image_size": 32}
    with torch.device("meta"), pytest.raises(ConfigError, match=message) as caught:
        TransformersExpert(source=str(tmp_path), **options)
    assert "\n" not in str(caught.value)

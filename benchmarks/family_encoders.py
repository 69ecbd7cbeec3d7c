"""Tiny random image encoders of many families, written in the real formats of transformers, timm and open_clip."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

from benchmarks.family_languages import shaken, small_fields
from visexpert.commands.trial import Request

SIDE = 96
"""Side of the images for encoders with a coarse final grid."""

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Encoder:
    """A family of encoders.

    Args:
        title: Title in the table.
        library: transformers, timm or open_clip.
        write: Writes a random model to a folder and returns how to ask for it.
    """

    title: str
    library: str
    write: Callable[[Path], Request]


def encoders() -> list[Encoder]:
    """Return all encoders, in the order of the table."""
    return [*map(_of_transformers, TRANSFORMERS), *map(of_timm, TIMM), *map(_of_open_clip, OPEN_CLIP)]


# -- transformers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A family in transformers.

    Args:
        title: Title in the table.
        kind: ``model_type``.
        fields: Fields of its configuration, on top of those that the general recipe sets.
        processor: Class of its image processor; None for the one that transformers lists for the family.
        auto: Class that builds the model in its checkpoints.
        size: Size of the processor's images, if the configuration does not have one.
    """

    title: str
    kind: str
    fields: Options = field(default_factory=dict)
    processor: str | None = None
    auto: str = "AutoModel"
    size: int | None = None


DINO = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "out_indices": [1, 2, 3, 4],
    "reshape_hidden_states": False,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
DEPTH, SEGMENTATION = "AutoModelForDepthEstimation", "AutoModelForSemanticSegmentation"
UNIVERSAL = "AutoModelForUniversalSegmentation"
SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 2}

TRANSFORMERS = [
    Published("CLIP", "clip"),
    Published("CLIP, vision part alone", "clip_vision_model", processor="CLIPImageProcessor"),
    Published("MetaCLIP 2", "metaclip_2"),
    Published("AltCLIP", "altclip"),
    Published("Chinese CLIP", "chinese_clip"),
    Published("CLIPSeg", "clipseg"),
    Published("SigLIP", "siglip"),
    Published("SigLIP 2, fixed size", "siglip_vision_model", processor="SiglipImageProcessor"),
    Published("SigLIP 2, NaFlex", "siglip2", {"vision_config": {"num_patches": 16}}),
    Published("BLIP", "blip"),
    Published("BLIP-2", "blip-2", processor="BlipImageProcessor"),
    Published("ALIGN", "align"),
    Published("FLAVA", "flava"),
    Published("GroupViT", "groupvit"),
    Published("X-CLIP", "xclip"),
    Published("OWL-ViT", "owlvit", {"vision_config": {"patch_size": 16}}),
    Published("OWLv2", "owlv2", {"vision_config": {"patch_size": 16}}),
    Published("LLaVA 1.5", "llava", processor="CLIPImageProcessor"),
    Published("PaliGemma", "paligemma", processor="SiglipImageProcessor"),
    Published("Gemma 3", "gemma3"),
    Published("InternVL", "internvl", {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}}),
    Published(
        "InternVL, vision part alone",
        "internvl_vision",
        {"image_size": [32, 32], "patch_size": [8, 8]},
        processor="ViTImageProcessor",
    ),
    Published("AIMv2", "aimv2"),
    Published("AIMv2, vision part alone", "aimv2_vision_model", processor="CLIPImageProcessor"),
    Published("MLCD", "mlcd_vision_model", processor="CLIPImageProcessor"),
    Published("ViT", "vit"),
    Published("DeiT", "deit"),
    Published("BEiT", "beit", {"use_relative_position_bias": True}),
    Published("Data2Vec", "data2vec-vision", {"use_relative_position_bias": True}),
    Published("ViTMAE", "vit_mae"),
    Published("ViT MSN", "vit_msn"),
    Published("ViTDet", "vitdet", {"pretrain_image_size": 32}, processor="ViTImageProcessor"),
    Published("I-JEPA", "ijepa"),
    Published("DINOv2", "dinov2", {**DINO, "out_indices": [4]}),
    Published(
        "DINOv2 with registers", "dinov2_with_registers", {"num_register_tokens": 4}, processor="BitImageProcessor"
    ),
    Published("DINOv3 ViT", "dinov3_vit", {"num_register_tokens": 4}),
    Published("DINOv3 ConvNeXt", "dinov3_convnext", STAGES | {"image_size": SIDE}, processor="DINOv3ViTImageProcessor"),
    Published("YOLOS", "yolos", {"num_detection_tokens": 5, "image_size": [32, 32]}),
    Published("Swin", "swin", SWIN | {"image_size": SIDE}),
    Published("Swin V2", "swinv2", SWIN | {"image_size": SIDE}),
    Published(
        "Hiera",
        "hiera",
        {
            "image_size": [64, 64],
            "embed_dim": 16,
            "num_heads": [1, 2, 2, 4],
            "depths": [1, 1, 2, 1],
            "patch_size": [7, 7],
        },
    ),
    Published("PVT", "pvt", {"image_size": SIDE}),
    Published("PVT v2", "pvt_v2", {"image_size": SIDE}),
    Published("CvT", "cvt", {"embed_dim": [8, 16, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 4]}, size=SIDE),
    Published("ConvNeXt", "convnext", STAGES | {"image_size": SIDE}),
    Published("ConvNeXt V2", "convnextv2", STAGES | {"image_size": SIDE}),
    Published("ResNet", "resnet", STAGES | {"embedding_size": 8}, size=SIDE),
    Published("RegNet", "regnet", STAGES | {"embedding_size": 8, "groups_width": 8}, size=SIDE),
    Published("BiT", "bit", STAGES | {"embedding_size": 8, "num_groups": 4}, size=SIDE),
    Published(
        "EfficientNet", "efficientnet", {"image_size": SIDE, "width_coefficient": 0.25, "hidden_dim": 320}, size=SIDE
    ),
    Published("MobileNet V2", "mobilenet_v2", {"depth_multiplier": 0.25, "image_size": SIDE}, size=SIDE),
    Published("MobileViT", "mobilevit", {"image_size": SIDE}, size=SIDE),
    Published(
        "LeViT",
        "levit",
        {
            "image_size": SIDE,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "key_dim": [8, 8, 8],
            "depths": [1, 1, 1],
            "patch_size": 16,
        },
    ),
    Published("PoolFormer", "poolformer", STAGES, size=SIDE),
    Published("FocalNet", "focalnet", {"image_size": SIDE, "embed_dim": 8, "depths": [1, 1, 1, 1]}),
    Published(
        "SAM",
        "sam",
        {
            "vision_config": {
                "global_attn_indexes": [1],
                "output_channels": 16,
                "mlp_dim": 64,
                "window_size": 3,
                "num_hidden_layers": 2,
                "image_size": SIDE,
            }
        },
    ),
    Published(
        "SAM, vision part alone",
        "sam_vision_model",
        {
            "global_attn_indexes": [1],
            "output_channels": 16,
            "mlp_dim": 64,
            "window_size": 3,
            "num_hidden_layers": 2,
            "image_size": SIDE,
        },
        processor="SamImageProcessor",
    ),
    Published(
        "SAM 2",
        "sam2",
        {
            "vision_config": {
                "model_type": "sam2_vision_model",
                "fpn_hidden_size": 16,
                "backbone_channel_list": [32, 24, 16, 8],
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model",
                    "hidden_size": 8,
                    "image_size": [64, 64],
                    "blocks_per_stage": [1, 1, 2, 1],
                    "embed_dim_per_stage": [8, 16, 24, 32],
                    "num_attention_heads_per_stage": [1, 2, 2, 4],
                    "window_size_per_stage": [2, 2, 2, 2],
                    "global_attention_blocks": [3],
                    "window_positional_embedding_background_size": [2, 2],
                },
            }
        },
    ),
    Published(
        "Depth Anything",
        "depth_anything",
        {
            "backbone_config": DINO,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "reassemble_hidden_size": 32,
            "patch_size": 14,
            "depth_estimation_type": "metric",
            "max_depth": 10,
        },
        processor="DPTImageProcessor",
        auto=DEPTH,
    ),
    Published(
        "DPT",
        "dpt",
        {
            "backbone_out_indices": [0, 1, 2, 3],
            "num_hidden_layers": 4,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
        auto=DEPTH,
    ),
    Published(
        "ZoeDepth",
        "zoedepth",
        {
            "backbone_config": {
                "model_type": "beit",
                "hidden_size": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "image_size": 64,
                "patch_size": 16,
                "reshape_hidden_states": False,
                "use_relative_position_bias": True,
                "out_indices": [1, 2, 3, 4],
            },
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "bottleneck_features": 8,
            "num_attractors": [4, 2, 2, 1],
            "bin_embedding_dim": 8,
        },
        auto=DEPTH,
    ),
    Published(
        "GLPN", "glpn", {**STAGES, "decoder_hidden_size": 8, "num_attention_heads": [1, 2, 3, 4]}, auto=DEPTH, size=SIDE
    ),
    Published(
        "SegFormer",
        "segformer",
        {**STAGES, "decoder_hidden_size": 8, "num_attention_heads": [1, 2, 3, 4], "num_labels": 5},
        auto=SEGMENTATION,
        size=SIDE,
    ),
    Published(
        "BEiT, segmentation",
        "beit",
        {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "num_labels": 5, "image_size": SIDE, "patch_size": 16},
        auto=SEGMENTATION,
    ),
    Published(
        "UperNet",
        "upernet",
        {
            "backbone_config": {
                "model_type": "convnext",
                **STAGES,
                "image_size": SIDE,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "hidden_size": 16,
            "auxiliary_in_channels": 24,
            "num_labels": 5,
        },
        processor="SegformerImageProcessor",
        auto=SEGMENTATION,
        size=SIDE,
    ),
    Published(
        "Mask2Former",
        "mask2former",
        {
            "backbone_config": {
                "model_type": "swin",
                **SWIN,
                "image_size": SIDE,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 32,
            "dim_feedforward": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "num_queries": 5,
            "num_labels": 5,
        },
        auto=UNIVERSAL,
        size=SIDE,
    ),
]


def _of_transformers(family: Published) -> Encoder:
    def write(folder: Path) -> Request:
        torch.manual_seed(0)
        kind = CONFIG_MAPPING[family.kind]
        config = kind(**_merged(small_fields(kind()), family.fields))
        shaken(getattr(transformers, family.auto).from_config(config)).save_pretrained(folder)
        listed: Any = IMAGE_PROCESSOR_MAPPING_NAMES.get(family.kind)
        name = family.processor or (next(iter(listed.values())) if isinstance(listed, dict) else listed) or ""
        processor = getattr(transformers, name.removesuffix("Fast").removesuffix("Pil"))
        sized = {} if family.size is None else {"size": {"height": family.size, "width": family.size}}
        processor(**sized).save_pretrained(folder)
        return Request(str(folder))

    return Encoder(f"{family.title} (`{family.kind}`)", "transformers", write)


def _merged(below: Options, above: Options) -> dict[str, Any]:
    """Merge fields of a configuration into others, recursively."""
    found = dict(below)
    for name, value in above.items():
        own = found.get(name)
        found[name] = _merged(own, value) if isinstance(own, dict) and isinstance(value, Mapping) else value
    return found


# -- timm -------------------------------------------------------------------------------------------------------------

SMALLER = {
    "vit_small_patch14_dinov2": 224,
    "vit_small_patch14_reg4_dinov2": 224,
    "vit_base_patch16_siglip_224": 64,
    "beit_base_patch16_224": 64,
    "sam2_hiera_tiny": 256,
}
"""Sides of the input for models that are slow at their own."""

TIMM: list[tuple[str, str]] = [
    ("ViT", "test_vit"),
    ("ViT with registers", "test_vit3"),
    ("ViT, relative positions", "test_vit_relpos"),
    ("DeiT, distilled", "deit_tiny_distilled_patch16_224"),
    ("EVA-02", "eva02_tiny_patch14_224"),
    ("DINOv2", "vit_small_patch14_dinov2"),
    ("DINOv2 with registers", "vit_small_patch14_reg4_dinov2"),
    ("DINOv3", "vit_small_patch16_dinov3"),
    ("PE-Core", "vit_pe_core_tiny_patch16_384"),
    ("Swin", "swin_tiny_patch4_window7_224"),
    ("Hiera", "hiera_tiny_224"),
    ("SAM 2's Hiera", "sam2_hiera_tiny"),
    ("PiT", "pit_ti_224"),
    ("LeViT", "levit_128s"),
    ("CaiT", "cait_xxs24_224"),
    ("XCiT", "xcit_nano_12_p16_224"),
    ("PVT v2", "pvt_v2_b0"),
    ("CoAtNet", "test_coatnet"),
    ("MaxViT", "test_maxvit"),
    ("MobileCLIP (FastViT)", "fastvit_mci0"),
    ("MobileViT", "mobilevit_xxs"),
    ("TinyViT", "tiny_vit_5m_224"),
    ("MambaOut", "test_mambaout"),
    ("ConvNeXt", "test_convnext"),
    ("ConvNeXt V2", "convnextv2_atto"),
    ("ResNet", "test_resnet"),
    ("ResNeSt", "resnest14d"),
    ("SKResNet", "skresnet18"),
    ("ReXNet", "rexnet_100"),
    ("RegNet", "regnety_002"),
    ("NFNet", "test_nfnet"),
    ("EfficientNet", "test_efficientnet"),
    ("MobileNet V4", "mobilenetv4_conv_small"),
    ("ByobNet", "test_byobnet"),
]
"""Title and name of the smallest model of each family in timm."""


def of_timm(family: tuple[str, str]) -> Encoder:
    """Return how a model of timm is written, from its title and name."""
    title, name = family

    def write(folder: Path) -> Request:
        import timm

        torch.manual_seed(0)
        model = shaken(timm.create_model(name, pretrained=False))
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
        return Request(name, weights=str(folder / "model.safetensors"), image_size=SMALLER.get(name))

    return Encoder(f"{title} (`{name}`)", "timm", write)


# -- open_clip --------------------------------------------------------------------------------------------------------

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}


def trunk(name: str, size: int, **more: Any) -> dict[str, Any]:
    """Return the configuration of a timm encoder inside open_clip."""
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": size,
        **more,
    }


OPEN_CLIP: list[tuple[str, dict[str, Any]]] = [
    ("ViT", {"vision_cfg": VIT}),
    ("ViT, QuickGELU", {"vision_cfg": VIT, "quick_gelu": True}),
    (
        "ViT, average pool (CLIPA)",
        {"vision_cfg": {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
    ),
    (
        "CoCa",
        {
            "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**TEXT, "attn_pooler_heads": 4},
            "custom_text": True,
        },
    ),
    (
        "SigLIP",
        {"vision_cfg": trunk("test_vit", 160, timm_pool="map", timm_proj="none"), "embed_dim": 64, "custom_text": True},
    ),
    ("PE-Core", {"vision_cfg": trunk("vit_pe_core_tiny_patch16_384", 384, timm_pool="map"), "custom_text": True}),
    ("EVA-02", {"vision_cfg": trunk("eva02_tiny_patch14_224", 224, timm_pool="token"), "custom_text": True}),
    ("MobileCLIP", {"vision_cfg": trunk("fastvit_mci0", 256, timm_proj=None), "embed_dim": 512, "custom_text": True}),
    ("ViTamin", {"vision_cfg": trunk("vitamin_small_224", 224), "custom_text": True}),
    ("ConvNeXt", {"vision_cfg": trunk("test_convnext", 160)}),
    ("ResNet", {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}),
]
"""Title of each family, and how its configuration differs from that of the plain ViT."""


def _of_open_clip(family: tuple[str, dict[str, Any]]) -> Encoder:
    title, changes = family

    def write(folder: Path) -> Request:
        import open_clip

        torch.manual_seed(0)
        settings = {"embed_dim": 16, "text_cfg": TEXT, **changes}
        kind = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CLIP
        if settings.get("custom_text") and kind is open_clip.CLIP:
            kind = open_clip.CustomTextCLIP
        options = {key: value for key, value in settings.items() if key != "custom_text"}
        state = shaken(kind(**options)).state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "open_clip_model.safetensors")
        written = {"model_cfg": settings, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        (folder / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
        return Request(str(folder))

    return Encoder(title, "open_clip", write)

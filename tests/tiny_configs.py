"""What the files under configs/ name, at tiny size: random models, some records in the real formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    DPTImageProcessor,
    RobertaConfig,
    RobertaForMaskedLM,
    SamImageProcessor,
    SamVisionConfig,
    SamVisionModel,
)

from tests.data.formats import (
    annotation,
    statement,
    tokenizer_folder,
    write_coco,
    write_jpeg,
    write_json_lines,
    write_karpathy,
    write_shards,
    write_vqa,
)
from tests.end_to_end_parts import COLORS, TIMM, write_chats, write_parts
from tests.experts.tiny_models import DEPTH, SAM
from tests.tiny_encoders import write_siglip

CONFIGS = Path(__file__).parents[1] / "configs"

CONVNEXT = "test_convnext.r160_in1k"
"""timm's own small ConvNeXt, made for tests."""

SIGLIPS = ("google/siglip2-so400m-patch14-384", "google/siglip2-base-patch16-224")

DINOV3 = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def write_models(root: Path) -> dict[str, str]:
    """Write random models; folders or files by the names that configurations have for them."""
    parts = write_parts(root)
    torch.manual_seed(0)
    save_file(timm.create_model(CONVNEXT).state_dict(), root / "convnext.safetensors")
    SamVisionModel(SamVisionConfig(**_fields(SAM))).save_pretrained(root / "sam")
    SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(root / "sam")
    DepthAnythingForDepthEstimation(DepthAnythingConfig(**_fields(DEPTH))).save_pretrained(root / "depth")
    DPTImageProcessor(size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(
        root / "depth"
    )
    write_siglip(root / "siglip")
    dinov3 = {**_fields(DINOV3), "num_register_tokens": 4}
    DINOv3ViTModel(DINOv3ViTConfig(**dinov3)).save_pretrained(root / "dinov3")
    DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "dinov3")
    tiny: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
    student = timm.create_model("vit_base_patch16_dinov3", num_classes=0, **tiny)
    timm.models.save_for_hf(student, str(root / "student"), model_args=tiny, safe_serialization=True)
    tokenizer_folder(root / "roberta")  # whole words, so that questions fit into 40 tokens
    roberta = RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=130,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    RobertaForMaskedLM(roberta).save_pretrained(root / "roberta")
    names = ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14", "openai/clip-vit-base-patch16")
    return {
        **dict.fromkeys(names, parts.clip),
        **dict.fromkeys(("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-13b-v1.5"), parts.llama),
        "FacebookAI/roberta-base": str(root / "roberta"),
        "facebook/sam-vit-large": str(root / "sam"),
        **dict.fromkeys(SIGLIPS, str(root / "siglip")),
        "facebook/dinov3-vitl16-pretrain-lvd1689m": str(root / "dinov3"),
        "timm/vit_base_patch16_dinov3.lvd1689m": str(root / "student"),
        "depth-anything/Depth-Anything-V2-Small-hf": str(root / "depth"),
        TIMM: parts.expert,
        CONVNEXT: str(root / "convnext.safetensors"),
    }


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "model_type"}


def write_data(root: Path) -> None:
    """Write the data sets that configurations name, each with a few records, under ``root`` (their ``data/``)."""
    write_chats(root / "llava-pretrain", "blip_laion_cc_sbu_558k.json", style="plain", images="images")
    write_chats(root / "llava-instruct", "llava_v1_5_mix665k.json", style="vicuna_v1", count=8)
    splits = [("train", "train2014")] * 4 + [("restval", "val2014"), ("val", "val2014"), ("test", "val2014")]
    images = [(part, folder, COLORS[place % 3], ["a square.", "it is"]) for place, (part, folder) in enumerate(splits)]
    write_karpathy(root / "coco", images)
    write_shards(root / "cc3m", (3, 3))
    write_jpeg(root / "nocaps" / "val" / "1.jpg", "red")
    nocaps = [{"id": 1, "file_name": "1.jpg", "width": 12, "height": 8, "domain": "in-domain", "open_images_id": "1"}]
    write_coco(root / "nocaps" / "nocaps_val_4500_captions.json", nocaps, [(1, "a square.")])
    for name in "abcdefgh":
        write_jpeg(root / "images" / "train" / f"{name}.jpg", "red")
    _write_questions(root)


def _write_questions(root: Path) -> None:
    """VQA v2, POPE and VSR, on images of COCO."""
    for part, count in (("train", 4), ("val", 2)):
        for image in range(1, count + 1):
            write_jpeg(root / "coco" / f"{part}2014" / f"COCO_{part}2014_{100 + image:012d}.jpg", "green")
        asked = [
            {"image_id": 100 + image, "question": "What is it?", "question_id": image} for image in range(1, count + 1)
        ]
        answered = [
            annotation(image, 100 + image, ["red"] * 7 + ["blue"] * 3, "other") for image in range(1, count + 1)
        ]
        write_vqa(root / "vqav2", part, asked, answered)
    for kind in ("random", "popular", "adversarial"):
        probe = {"question_id": 1, "image": "COCO_val2014_000000000101.jpg", "text": "Is it a dog?", "label": "no"}
        write_json_lines(root / "pope" / f"coco_pope_{kind}.json", [probe])
    for folder in ("train2017", "val2017"):
        write_jpeg(root / "coco" / folder / "000000000009.jpg", "blue")
    for name, folder in (("train", "train2017"), ("dev", "train2017"), ("test", "val2017")):
        said = [
            statement("000000000009.jpg", folder, f"It is {place} the mat.", place == "on", place)
            for place in ("on", "by")
        ]
        write_json_lines(
            root / "vsr" / "zeroshot" / f"{name}.jsonl", [{**line, "label": int(line["label"])} for line in said]
        )

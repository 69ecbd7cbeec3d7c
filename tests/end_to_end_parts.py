"""Small models and data on disk, in the formats of the real ones, for runs from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tests.data.formats import write_jpeg, write_json, write_json_lines, write_karpathy, write_shards
from tests.language.tokenizers_made import written_to

TIMM = "test_vit.r160_in1k"
"""timm's own small ViT: 64 wide, 6 blocks, made for tests."""

EXPERT_SIZE = 32
COLORS = ("red", "green", "blue")


@dataclass(frozen=True)
class Parts:
    """Folders and files of pretrained models.

    Args:
        clip: A ``CLIPVisionModel`` in ``save_pretrained`` form.
        llama: A ``LlamaForCausalLM`` and its tokenizer, likewise.
        expert: Weights of :data:`TIMM` at :data:`EXPERT_SIZE`.
    """

    clip: str
    llama: str
    expert: str

    def model(self, method: str, *, clip: Mapping[str, Any], language: Mapping[str, Any], **options: Any) -> Any:
        """Settings of a method that is made of these parts."""
        expert = {"model": TIMM, "weights": self.expert, "image_size": EXPERT_SIZE}
        return {
            "class_path": f"visexpert.methods.{method}",
            "init_args": {
                "clip": {"class_path": "visexpert.vision.ClipEncoder", "init_args": {"source": self.clip, **clip}},
                "experts": {
                    "vit": {"class_path": "visexpert.experts.TimmExpert", "init_args": expert},
                    "edges": {"class_path": "visexpert.experts.KorniaEdges", "init_args": {"image_size": 32}},
                },
                "language": {
                    "class_path": "visexpert.language.PrefixLM",
                    "init_args": {"source": self.llama, **language},
                },
                "projector": {"kind": "mlp2x_gelu", "norm": False},  # LLaVA's, for the export as one
                "optimizer": {"warmup_steps": 1},
                "evaluation": {"meteor": False, "caption_images": 1},
                **options,
            },
        }


def write_parts(root: Path) -> Parts:
    """Write random encoders and a random language model."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes["num_attention_heads"] = 2
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(root / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(root / "clip")
    tokenizer = written_to(root / "llama")
    config = LlamaConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=0, eos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    expert = timm.create_model(TIMM, img_size=EXPERT_SIZE)
    save_file(expert.state_dict(), root / "expert.safetensors")
    return Parts(str(root / "clip"), str(root / "llama"), str(root / "expert.safetensors"))


def write_captions(root: Path) -> Any:
    """COCO in Karpathy's form and two shards of CC3M; settings that train on both and score COCO."""
    splits = [("train", "train2014")] * 5 + [("restval", "val2014"), ("val", "val2014"), ("test", "val2014")]
    images = [
        (split, folder, COLORS[number % 3], [f"a {COLORS[number % 3]} square.", f"all {COLORS[number % 3]}"])
        for number, (split, folder) in enumerate(splits)
    ]
    write_karpathy(root / "coco", images)
    write_shards(root / "cc3m", (3, 3))
    return {
        "class_path": "visexpert.data.MixedData",
        "init_args": {
            "sources": {
                "coco": {"class_path": "visexpert.data.COCOCaptions", "init_args": {"root": str(root / "coco")}},
                "cc3m": {
                    "class_path": "visexpert.data.CC3M",
                    "init_args": {"root": str(root / "cc3m"), "train": "{00000..00001}.tar"},
                },
            },
            "train": {"coco": None, "cc3m": None},
            "val": ["coco"],
            "test": ["coco"],
        },
    }


def write_chats(root: Path, name: str, *, style: str, images: str = ".", count: int = 6) -> None:
    """LLaVA's conversations and their images; every other one is of text alone, but for ``plain``."""
    records = []
    for number in range(count):
        image = {} if number % 2 and style != "plain" else {"image": f"coco/{number}.jpg"}
        mark = "<image>\n" if image else ""
        said = [("human", f"{mark}what colour is it?"), ("gpt", COLORS[number % 3])]
        said += [] if style == "plain" else [("human", "are you sure?"), ("gpt", "yes, I am.")]
        turns = [{"from": who, "value": text} for who, text in said]
        records.append({"id": str(number), **image, "conversations": turns})
        if image:
            write_jpeg(root / images / image["image"], COLORS[number % 3])
    write_json(root / name, records)


def write_conversations(root: Path, *, style: str, name: str) -> Any:
    """LLaVA's conversations and POPE's probes; settings that use both."""
    write_chats(root, name, style=style)
    probe = {"image": "COCO_val2014_000000000007.jpg", "text": "Is there a dog in the image?", "label": "no"}
    write_json_lines(root / "pope" / "coco_pope_random.json", [{"question_id": 1, **probe}])
    write_jpeg(root / "pope" / "val2014" / probe["image"], "blue")
    pope = {"root": str(root / "pope"), "kinds": ["random"]}
    return {
        "class_path": "visexpert.data.MixedData",
        "init_args": {
            "sources": {
                "llava": {
                    "class_path": "visexpert.data.LLaVAInstruct",
                    "init_args": {"root": str(root), "annotations": name, "num_val": 2, "resize": "pad"},
                },
                "pope": {"class_path": "visexpert.data.POPE", "init_args": pope},
            },
            "train": {"llava": None},
            "val": ["llava"],
            "test": ["pope"],
            "template": {"class_path": "visexpert.language.LlavaTemplate", "init_args": {"style": style}},
        },
    }

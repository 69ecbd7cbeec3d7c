"""Tiny random LLaVA-1.5 and LLaVA-NeXT of transformers, and our parts with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from tests.language.helpers import VOCAB, llama
from visexpert.language import PrefixLM, Projector
from visexpert.types import IMAGE_TOKEN, VisionTokens
from visexpert.vision import ClipEncoder

IMAGE_ID = VOCAB - 1
SIDE, PATCH = 32, 8
CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
}


@dataclass(frozen=True)
class Parts:
    """Our side of a LLaVA."""

    clip: ClipEncoder
    projector: Projector
    language: PrefixLM

    def see(self, images_BCHW: Tensor) -> VisionTokens:
        """Images to tokens in the language width."""
        tokens: VisionTokens = self.clip(images_BCHW)
        return VisionTokens(self.projector(tokens.tokens_BTD), tokens.grid_hw)


def llava_15() -> Any:
    """LLaVA-1.5 as transformers has it."""
    fields = {name: value for name, value in llama().items() if name != "model_type"} | {"max_position_embeddings": 256}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**fields),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return randomize(LlavaForConditionalGeneration(config))


def llava_next(pinpoints: list[list[int]]) -> Any:
    """LLaVA-NeXT as transformers has it; pinpoints are tiles (rows, columns)."""
    fields = {name: value for name, value in llama().items() if name != "model_type"} | {"max_position_embeddings": 512}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**fields),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for rows, columns in pinpoints],
    )
    return randomize(LlavaNextForConditionalGeneration(config))


def randomize(model: Any) -> Any:
    """Weights wide enough that nothing is nearly constant."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def parts_of(model: Any, clip: ClipEncoder) -> Parts:
    """Our modules with the weights of a LLaVA."""
    newline = getattr(model.model, "image_newline", None)
    fields = llama() | {"max_position_embeddings": model.config.text_config.max_position_embeddings}
    language = PrefixLM(config=fields, image_newline=newline is not None)
    projector = Projector(in_dim=clip.width, out_dim=language.width, kind="mlp2x_gelu")
    clip.model.load_state_dict(model.model.vision_tower.state_dict())
    state = {f"model.{key}": value for key, value in model.model.language_model.state_dict().items()}
    language.model.load_state_dict(state | {"lm_head.weight": model.lm_head.weight})
    if newline is not None and language.image_newline is not None:
        language.image_newline.weight.data[0] = newline.data
    first, last = projector.layers[0], projector.layers[2]  # type: ignore[index]
    first.load_state_dict(model.model.multi_modal_projector.linear_1.state_dict())
    last.load_state_dict(model.model.multi_modal_projector.linear_2.state_dict())
    return Parts(clip.eval(), projector.eval(), language.eval())


def words(count: int) -> list[int]:
    """Random ids, none special."""
    return torch.randint(3, IMAGE_ID - 1, (count,)).tolist()


def widened(ids: list[int], count: int) -> list[int]:
    """Ids as transformers wants them: as many image ids as the image has tokens."""
    place = ids.index(IMAGE_TOKEN)
    return [*ids[:place], *[IMAGE_ID] * count, *ids[place + 1 :]]

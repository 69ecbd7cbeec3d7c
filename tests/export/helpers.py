"""Tiny random models to export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from visexpert.data import TextPacker
from visexpert.export import Dtype, ExportSource, LanguageParts, Projection
from visexpert.language import PrefixLM, Projector
from visexpert.types import IGNORE_INDEX, TextBatch, VisionTokens
from visexpert.vision import ClipEncoder, TransformersEncoder, VisionEncoder

FIELDS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WIDTH = 24
WORDS = ("<bos>", "<eos>", "<unk>", "red", "blue", "cube", "ball", "left", "right", "near", "far")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def tiny_clip(layer: int = -2, **fields: Any) -> ClipEncoder:
    """A random CLIP in which every weight matters, with a normalization of its own."""
    clip = ClipEncoder(config=FIELDS | fields, layer=layer).eval().requires_grad_(False)
    scramble(clip.model)
    clip.preprocessing = replace(clip.preprocessing, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    clip.mean.copy_(torch.tensor(clip.preprocessing.mean).view(1, 3, 1, 1))
    clip.std.copy_(torch.tensor(clip.preprocessing.std).view(1, 3, 1, 1))
    return clip


def scramble(module: nn.Module) -> None:
    """Weights wide enough that no two of them could be swapped unseen, biases and norms included."""
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)


def tiny_source(**fields: Any) -> ExportSource:
    """That CLIP, two layers asked for."""
    licenses = {"clip": "MIT", "expert depth": "CC-BY-NC-4.0"}
    left = Projection(10, "org/clip")
    return ExportSource(tiny_clip(**fields), (-2, -1), False, licenses, {"run": "runs/tiny"}, projection=left)


def words_only() -> PreTrainedTokenizerFast:
    """A tokenizer without ``<image>`` and without ``<pad>``."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def tiny_siglip(**options: Any) -> TransformersEncoder:
    """A random SigLIP that resizes bilinearly."""
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2}
    clip = TransformersEncoder(config=FIELDS | {"model_type": "siglip_vision_model"}, processor=processor, **options)
    scramble(clip.model)
    return clip.eval().requires_grad_(False)


def tiny_llava(dtype: Dtype = "float32", clip: VisionEncoder | None = None) -> ExportSource:
    """An encoder with projector and prefix LM, whose weights are of a dtype of its own."""
    clip, language = clip or tiny_clip(), PrefixLM(config=LLAMA, dtype=dtype).eval()
    projector = Projector(in_dim=clip.width, out_dim=WIDTH, kind="mlp2x_gelu").eval()
    scramble(language)
    scramble(projector)

    def logits(images_BCHW: Tensor, ids_BN: Tensor) -> Tensor:
        labels_BN = ids_BN.clone()
        labels_BN[:, 0] = IGNORE_INDEX
        text = TextBatch(ids_BN, labels_BN, torch.ones_like(ids_BN), torch.arange(ids_BN.shape[1]).expand_as(ids_BN))
        vision = VisionTokens(projector(clip(images_BCHW).tokens_BTD), clip.grid_hw)
        found: Tensor = language(vision, text).logits_MV
        return found.view(len(ids_BN), -1, len(WORDS))

    layers = projector.layers
    assert isinstance(layers, nn.Sequential)
    first, last = layers[0], layers[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    tokenizer = words_only()
    parts = LanguageParts(language.model, first, last, tokenizer, TextPacker(tokenizer), language, logits)
    return ExportSource(clip, (-2, -1), None, {"clip": "MIT"}, {}, parts)

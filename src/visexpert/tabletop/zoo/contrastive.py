"""Contrastive training of the tiny CLIP on object words: semantic and spatially weak, like the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.io.run_files import write_json, write_text
from visexpert.io.weights import write_weights
from visexpert.tabletop.texts import tabletop_tokenizer
from visexpert.tabletop.tiny import half_state
from visexpert.tabletop.zoo.base import ZooModule, images_of, parameter_count
from visexpert.types import Batch, TextBatch
from visexpert.vision.clip import ClipEncoder

CLIP_MEAN = (0.5, 0.5, 0.5)
CLIP_STD = (0.25, 0.25, 0.25)


class ContrastiveCLIP(ZooModule):
    """HF's ``CLIPVisionModel`` and a bag-of-n-grams text tower under open_clip's ``ClipLoss``.

    A word classifier on the pooled image token (which words are in the caption?) speeds up training; it is not shipped.

    Args:
        vision: Fields of ``CLIPVisionConfig``.
        text_width: Width of the word embeddings.
        text_hidden: Channels of the n-gram convolution.
        embed_dim: Width of the shared space.
        word_weight: Weight of the word classification beside the contrastive loss.
        flip: Chance of a horizontal flip of the image (captions name no sides).
        gallery: Images per retrieval test.
        lr: Highest learning rate.
        weight_decay: AdamW weight decay.
        warmup: Share of the steps in which the rate rises.
    """

    headline = "recall_at_1"

    def __init__(
        self,
        *,
        vision: dict[str, Any],
        text_width: int = 64,
        text_hidden: int = 256,
        embed_dim: int = 96,
        word_weight: float = 1.0,
        flip: float = 0.5,
        gallery: int = 100,
        lr: float = 1.5e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, warmup=warmup)
        tokenizer = tabletop_tokenizer()
        self.clip = ClipEncoder(config=vision, layer=-1)
        # The shipped folder has its own normalization; the encoder's default is OpenAI's.
        self.clip.mean.copy_(torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.clip.std.copy_(torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        self.text = NgramTextTower(vocabulary=len(tokenizer), width=text_width, hidden=text_hidden, embed_dim=embed_dim)
        self.projection = nn.Linear(self.clip.width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.65926))  # log(1 / 0.07), CLIP's initial value
        self.words = nn.Linear(self.clip.width, len(tokenizer))
        self.special_ids = sorted(tokenizer.all_special_ids)
        self.word_weight = word_weight
        self.flip = flip
        self.gallery = gallery
        self.contrastive = ClipLoss()
        self.score_definition = (
            f"image-to-text recall@1 (%) among {gallery} held-out scenes with one caption each; captions name 1-4 of a "
            "scene's objects at random, so several may fit an image and the ceiling is well under 100; higher is better"
        )
        self._images: list[Tensor] = []
        self._texts: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Contrast images with captions, and name the captions' words."""
        images_BCHW = images_of(batch).clone()
        flipped_B = torch.rand(len(batch)) < self.flip
        images_BCHW[flipped_B] = images_BCHW[flipped_B].flip(-1)
        pooled_BD, text = self.pool(images_BCHW), text_of(batch)
        pair = self.contrastive(
            F.normalize(self.projection(pooled_BD), dim=-1),
            F.normalize(self.text(text.ids_BN, text.segments_BN), dim=-1),
            self.logit_scale.clamp(max=4.6052).exp(),
        )
        words = F.cross_entropy(self.words(pooled_BD), self._word_shares(text))
        loss: Tensor = pair + self.word_weight * words
        parts = {"train/loss": loss, "train/contrastive": pair, "train/words": words}
        self.log_dict(parts, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed held-out pairs."""
        text = text_of(batch)
        self._images.append(F.normalize(self.projection(self.pool(images_of(batch))), dim=-1))
        self._texts.append(F.normalize(self.text(text.ids_BN, text.segments_BN), dim=-1))

    def on_validation_epoch_end(self) -> None:
        """Log recall@1 over galleries of held-out pairs."""
        images_ND, texts_ND = torch.cat(self._images), torch.cat(self._texts)
        self._images, self._texts = [], []
        self.log(f"val/{self.headline}", recall_at_1(images_ND, texts_ND, gallery=self.gallery), prog_bar=True)

    def pool(self, images_BCHW: Tensor) -> Tensor:
        """Return CLIP's pooled token: post-LayerNorm of [CLS], shape (B, D)."""
        pooled_BD: Tensor = self.clip.model.post_layernorm(self.clip(images_BCHW).cls_BD)
        return pooled_BD

    def ship(self, folder: Path, name: str) -> list[Path]:
        """Write the vision tower as a ``save_pretrained`` folder and the text tower beside it."""
        target = folder / name
        # Weights are fp16 on disk; the config says float32, so that transformers computes in float32.
        config = {**self.clip.config.to_dict(), "architectures": ["CLIPVisionModel"], "dtype": "float32"}
        write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_weights(half_state(self.clip.model), target / "model.safetensors")
        side = self.clip.image_size
        preprocessor = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"height": side, "width": side},
            "resample": 3,
            "do_center_crop": False,
            "do_convert_rgb": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        }
        path = target / "preprocessor_config.json"
        write_json(path, preprocessor)
        text_path = folder / f"{name}_text.safetensors"
        state = {f"text.{key}": value for key, value in half_state(self.text).items()}
        state["projection.weight"] = self.projection.weight.detach().half()
        state["logit_scale"] = self.logit_scale.detach().half()
        write_weights(state, text_path)
        return [target / "config.json", target / "model.safetensors", path, text_path]

    def facts(self) -> dict[str, Any]:
        """Return kind, sizes and training target for the card."""
        side = self.clip.grid_hw[0]
        return {
            "kind": "CLIPVisionModel",
            "input_px": self.clip.image_size,
            "grid": [side, side],
            "token_dim": self.clip.width,
            "parameters": parameter_count(self.clip.model),
            "text_parameters": parameter_count(self.text) + self.projection.weight.numel() + 1,
            "license": "Apache-2.0",
            "trained_on": "captions that name objects (colour and shape), no position, size or relation",
        }

    def _word_shares(self, text: TextBatch) -> Tensor:
        """Return an equal share for each distinct word of the caption (B, V)."""
        present_BV = torch.zeros(len(text.ids_BN), self.words.out_features)
        present_BV.scatter_reduce_(1, text.ids_BN, (text.segments_BN > 0).float(), reduce="amax")
        present_BV[:, self.special_ids] = 0
        return present_BV / present_BV.sum(1, keepdim=True).clamp(min=1)


class NgramTextTower(nn.Module):
    """Word embeddings, a width-3 convolution, ReLU and a mean over the words: a bag of trigrams.

    Args:
        vocabulary: Number of token ids.
        width: Width of the embeddings.
        hidden: Channels of the convolution.
        embed_dim: Width of the output.
    """

    def __init__(self, *, vocabulary: int, width: int, hidden: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.ngrams = nn.Conv1d(width, hidden, 3, padding=1)
        self.norm = nn.LayerNorm(hidden)
        self.projection = nn.Linear(hidden, embed_dim, bias=False)

    def forward(self, ids_BN: Tensor, segments_BN: Tensor) -> Tensor:
        """Embed captions (B, N) of token ids, padding where ``segments_BN`` is 0, into (B, embed_dim)."""
        mask_B1N = (segments_BN > 0).float()[:, None]
        words_BWN = self.embedding(ids_BN).transpose(1, 2) * mask_B1N
        grams_BHN = F.relu(self.ngrams(words_BWN)) * mask_B1N
        pooled: Tensor = self.projection(self.norm(grams_BHN.sum(2) / mask_B1N.sum(2).clamp(min=1)))
        return pooled


def text_of(batch: Batch) -> TextBatch:
    """Return the batch's captions, one per image.

    Raises:
        ConfigError: There are none, or several per image.
    """
    if batch.text is None or int(batch.text.segments_BN.max()) != 1:
        raise ConfigError(
            "ContrastiveCLIP needs exactly one caption per image; set texts.train and texts.eval to {objects: 1} on "
            "TabletopData."
        )
    return batch.text


def recall_at_1(images_ND: Tensor, texts_ND: Tensor, *, gallery: int) -> float:
    """Return the percentage of images whose own text is the nearest in its gallery; a short last gallery is left out.

    Args:
        images_ND: Unit image embeddings.
        texts_ND: Unit text embeddings of the same rows.
        gallery: Rows per gallery; fewer rows than that make one gallery.
    """
    gallery = min(gallery, len(images_ND))
    usable = len(images_ND) // gallery * gallery
    image_GND = images_ND[:usable].unflatten(0, (-1, gallery))
    text_GND = texts_ND[:usable].unflatten(0, (-1, gallery))
    nearest_GN = (image_GND @ text_GND.transpose(1, 2)).argmax(2)
    return 100 * float((nearest_GN == torch.arange(gallery)).float().mean())

"""Text towers of published encoders, read from the source of the encoder: transformers' and open_clip's own code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from visexpert.errors import WeightsError
from visexpert.io.source import ModelSource
from visexpert.networks.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES

OWNER = "text tower"
FAMILIES = ("clip", "siglip", "siglip2")
"""Values of ``model_type`` of transformers' models with a text tower."""

_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


BROKEN = (OSError, ValueError, KeyError, IndexError, ImportError, RuntimeError, AttributeError, TypeError)
"""What libraries raise for files that do not go together."""


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn a library's errors while it reads texts into one sentence."""
    try:
        yield
    except BROKEN as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"The text tower in {folder} cannot read texts ({reason}); its tokenizer may not go with it."
        ) from error


class TextTower(Protocol):
    """Embeds texts into the space of the image embeddings."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (N, E), float32, of any length."""

    def class_text(self, name: str) -> str:
        """Return the text of a class, for zero-shot classification."""


class _PhotoTexts:
    """Words the text of a class as CLIP's paper does (arXiv 2103.00020, section 3.1.4)."""

    def class_text(self, name: str) -> str:
        """Return ``a photo of a NAME.``, underscores as spaces."""
        return f"a photo of a {name.replace('_', ' ')}."


class TransformersTextTower(_PhotoTexts):
    """The text tower of a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``.

    Args:
        folder: Folder with the whole model and its tokenizer.

    Raises:
        WeightsError: Weights of the text tower are missing, or files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        from transformers import AutoModel, AutoTokenizer

        try:
            model, report = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except BROKEN as error:
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"The text tower in {folder} cannot be read ({reason}).") from error
        absent = sorted(key for key in report["missing_keys"] if key.startswith("text"))
        if absent:
            raise WeightsError(f"The text tower in {folder} lacks {absent[:3]}; use the weights of the whole model.")
        self._model: Any = model.eval()
        config: Any = model.config
        self._length = int(config.text_config.max_position_embeddings)
        self._pads = config.model_type != "clip"  # SigLIP was trained on texts padded to full length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See :class:`TextTower`."""
        with _told(self._folder):
            given = self._tokenizer(
                list(texts),
                padding="max_length" if self._pads else True,
                max_length=self._length,
                truncation=True,
                return_tensors="pt",
            )
            inputs = {"input_ids": given["input_ids"]}
            if not self._pads:
                inputs["attention_mask"] = given["attention_mask"]
            found: Any = self._model.get_text_features(**inputs)
        features = found if isinstance(found, Tensor) else found.pooler_output
        return features.float()


class OpenClipTextTower(_PhotoTexts):
    """The text tower of a folder that open_clip wrote.

    Args:
        folder: Folder with ``open_clip_config.json`` and weights.

    Raises:
        WeightsError: Files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        import open_clip

        try:
            model: Any = open_clip.create_model(f"local-dir:{folder}")
            self._tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
        except BROKEN as error:
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"The text tower in {folder} cannot be read ({reason}).") from error
        self._model = model.eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """See :class:`TextTower`."""
        with _told(self._folder):
            features: Tensor = self._model.encode_text(self._tokenizer(list(texts)))
        return features.float()


def text_tower_of(source: str | None) -> TextTower | None:
    """Return the text tower of an encoder's source, from files on this machine; None if it has none there.

    Shipped encoders have theirs in :mod:`visexpert.tabletop.text_tower`.

    Args:
        source: Source of the encoder.

    Raises:
        WeightsError: There is one, but it cannot be read.
    """
    files = None if source is None else ModelSource.parse(source)
    if files is None or files.file is not None:
        return None
    config = files.find(OPEN_CLIP_CONFIG)
    if config is not None and files.find(*OPEN_CLIP_FILES) is not None:
        return OpenClipTextTower(config.parent)
    settings = files.read_json("config.json", owner=OWNER) or {}
    at = files.find("config.json")
    whole = settings.get("model_type") in FAMILIES and "text_config" in settings
    if at is None or not whole or files.find(*_TOKENIZERS) is None:
        return None
    return TransformersTextTower(at.parent)

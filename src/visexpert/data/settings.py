"""Settings shared by all sources on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from visexpert.data.resize import ImageReader, Resize
from visexpert.errors import ConfigError
from visexpert.types import TextEncoder

Template: TypeAlias = Callable[[PreTrainedTokenizerBase], TextEncoder]
"""What makes an encoder of texts, given the tokenizer: a class, with its other arguments filled in."""


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Random augmentation of training images. With it, their tokens cannot be stored.

    Args:
        crop_scale: Least share of the area of random crops, in (0, 1]; null for none.
        flip: Mirror every other image, which makes left and right meaningless.
    """

    crop_scale: float | None = None
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a source is read; :class:`~visexpert.data.source.SourceData` documents each setting.

    Raises:
        ConfigError: A value is out of range.
    """

    tokenizer: str | None
    template: Template | None
    max_tokens: int | None
    image_size: int
    resize: Resize
    augment: AugmentSettings
    batch_size: int
    eval_batch_size: int
    train_fraction: float
    num_val: int | None
    num_test: int | None
    seed: int
    order_seed: int
    num_workers: int
    max_broken: float

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "eval_batch_size": 1, "num_val": 1, "num_test": 1, "num_workers": 0, "max_tokens": 3}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} is {value}, but must be at least {low}; raise it.")
        for name, low_open in (("train_fraction", True), ("max_broken", False)):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (low_open and value == 0):
                raise ConfigError(f"{name} must be in [0, 1], got {value}.")
        self.reader()

    def reader(self) -> ImageReader:
        """Return what decodes and resizes images."""
        return ImageReader(size=self.image_size, resize=self.resize, **vars(self.augment))

    def most(self, part: str) -> int | None:
        """Return most rows of a part that are used."""
        return {"val": self.num_val, "test": self.num_test}.get(part)

    def share(self, part: str) -> float:
        """Return the share of a part that is used."""
        return self.train_fraction if part == "train" else 1.0

"""Images that ``visexpert export`` folds, flattens and measures on: the run's validation images, or others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from visexpert.commands.data import build_data
from visexpert.commands.image_files import find_images
from visexpert.data.images import ImageReader, Resize
from visexpert.errors import ConfigError
from visexpert.runs import SavedRun
from visexpert.types import Batch

Part = Literal["validation", "training", "named"]


class PartImages(LightningDataModule):
    """Batches of one part of a data module, in the place of validation batches.

    Args:
        data: The data module.
        part: ``validation``, or ``training`` for data without validation images.
    """

    def __init__(self, data: LightningDataModule, part: Part) -> None:
        super().__init__()
        self.data, self.part = data, part

    def prepare_data(self) -> None:
        """As the data itself does."""
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Open the part."""
        self.data.trainer = self.trainer
        self.data.setup("fit" if self.part == "training" else stage)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        """Return the part's batches."""
        return self.data.train_dataloader() if self.part == "training" else self.data.val_dataloader()

    def train_dataloader(self) -> Any:
        """Return the data's own training batches."""
        return self.data.train_dataloader()


class FolderImages(LightningDataModule):
    """Images of a folder, with no text: for validation and, in the same order again and again, for training.

    Args:
        folder: Holds images.
        image_size: Side that they are resized to.
        resize: How.
        batch_size: Images of a batch.
    """

    def __init__(self, folder: Path, *, image_size: int, resize: Resize = "crop", batch_size: int = 8) -> None:
        super().__init__()
        self.paths = find_images([str(folder)])
        self.reader = ImageReader(size=image_size, resize=resize)
        self.batch_size = batch_size

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return all images, sorted by name."""
        starts = range(0, len(self.paths), self.batch_size)
        return DataLoader(starts, batch_size=None, collate_fn=self._batch)  # type: ignore[arg-type]

    train_dataloader = val_dataloader

    def _batch(self, start: int) -> Batch:
        paths = self.paths[start : start + self.batch_size]
        images = [self.reader.read(str(path), name=str(path)).image_CHW for path in paths]
        return Batch(torch.stack(images), torch.arange(start, start + len(images)), split="named")


def with_images(saved: SavedRun, named: Path | None) -> SavedRun:
    """The run with the images that ``--data`` names in the place of its own.

    Args:
        saved: The run.
        named: A folder of images, or a YAML file with ``data``; None keeps the run's own.

    Raises:
        ConfigError: It is neither.
    """
    if named is None:
        return saved
    if named.is_dir():
        how: Any = getattr(getattr(saved.data, "settings", None), "resize", "crop")
        return replace(saved, data=FolderImages(named, image_size=saved.model.clip.image_size, resize=how))
    try:
        return replace(saved, data=build_data([named]))
    except ConfigError as error:
        raise ConfigError(
            f"--data {named}: {str(error).rstrip('.')}; name a folder of images, or a configuration that has data."
        ) from error

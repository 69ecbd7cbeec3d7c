"""Images for folding, flattening and measuring in ``visexpert export``: the run's validation images, or others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from visexpert.callbacks import TrainingProgress
from visexpert.callbacks.phase import saved_settings
from visexpert.commands.data import build_data
from visexpert.commands.image_files import find_images
from visexpert.data.images import ImageReader, Resize
from visexpert.errors import ConfigError
from visexpert.runs import SavedRun
from visexpert.types import Batch

Part = Literal["validation", "training", "named"]


class PartImages(LightningDataModule):
    """A data module that offers one part of another as its validation batches.

    Args:
        data: Data module to read.
        part: ``validation``, or ``training`` for data without validation images.
        most: Number of validation images after whose batch the part ends; None for all.
    """

    def __init__(self, data: LightningDataModule, part: Part, *, most: int | None = None) -> None:
        super().__init__()
        self.data, self.part, self.most = data, part, most

    def prepare_data(self) -> None:
        """Prepare the data."""
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the part."""
        self.data.trainer = self.trainer
        self.data.setup("fit" if self.part == "training" else stage)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        """Return the part's batches."""
        batches = self.data.train_dataloader() if self.part == "training" else self.data.val_dataloader()
        return batches if self.most is None else _First(batches, self.most)

    def train_dataloader(self) -> Any:
        """Return the data's training batches."""
        return self.data.train_dataloader()


class _First:
    """Batches until a number of images is reached."""

    def __init__(self, batches: Iterable[Batch], most: int) -> None:
        self.batches, self.most = batches, most

    def __iter__(self) -> Iterator[Batch]:
        seen = 0
        for batch in self.batches:
            yield batch
            seen += len(batch)
            if seen >= self.most:
                return


class FolderImages(LightningDataModule):
    """Images of a folder, without text: for validation and, in the same order in every epoch, for training.

    Args:
        folder: Folder of images.
        image_size: Side to resize them to, pixels.
        resize: How to resize them, see :class:`~visexpert.data.images.ImageReader`.
        batch_size: Images per batch.
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


def run_on_images(
    saved: SavedRun, module: L.LightningModule, data: LightningDataModule, *, steps: int = 0, batches: int | None = None
) -> None:
    """Train for ``steps`` steps, or validate if 0, on one device of the run's kind with weights in float32.

    Args:
        saved: The run.
        module: What trains or measures.
        data: The images.
        steps: Optimizer steps.
        batches: Number of validation batches; None for all.

    Raises:
        UserError: The images cannot be read.
    """
    settings = saved_settings(saved.folder)
    precision: Any = settings.precision if str(settings.precision).endswith("mixed") else "32-true"
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=precision,
        max_steps=max(steps, 1),
        limit_val_batches=0 if steps else batches,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=gettempdir(),
        callbacks=[TrainingProgress()],
    )
    if steps:
        trainer.fit(module, datamodule=data)
    else:
        trainer.validate(module, datamodule=data, verbose=False)


def with_images(saved: SavedRun, named: Path | None) -> SavedRun:
    """Replace the data of a run by the images that ``--data`` names.

    Args:
        saved: The run.
        named: Folder of images, or YAML file with ``data``; None keeps the run's own data.

    Raises:
        ConfigError: ``named`` is neither.
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

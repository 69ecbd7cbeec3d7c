"""How much a configuration reads and stores: samples, steps, batch size, tokens in the feature store, data files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule

from visexpert.data import MixedData, SourceData
from visexpert.data.base import DataModule
from visexpert.data.division import Division
from visexpert.errors import ConfigError
from visexpert.methods import Method
from visexpert.store import StoreDtype, bytes_per_image


@dataclass(frozen=True)
class Amount:
    """What a fit reads.

    Args:
        batch_size: Samples per process and batch.
        rows: Training images; None if the data is not here and nobody gave the number.
        samples: Images that training reads in all epochs; None if unknown.
        steps: Optimizer steps; None if unknown.
        per_step: Samples per optimizer step over all processes.
        by_steps: Whether ``max_steps`` ends the fit, however many epochs that is.
        epochs: ``max_epochs``, if it is given.
    """

    batch_size: int
    rows: int | None
    samples: int | None
    steps: int | None
    per_step: int = 1
    by_steps: bool = False
    epochs: int | None = None

    def accumulated(self, gpus: int) -> int:
        """Return the batches of each process that make a step."""
        return self.per_step // (self.batch_size * gpus)

    @property
    def uneven(self) -> str | None:
        """What is wrong with ``max_steps``, in one line; None if it reads ``max_epochs``, or whole epochs."""
        if not self.by_steps or not self.rows or not self.steps:
            return None
        least, most = self.rows // self.per_step, math.ceil(self.rows / self.per_step)
        read = f"max_steps: {self.steps} reads {self.steps * self.per_step / self.rows:.2f} epochs"
        if self.epochs is not None:
            if least * self.epochs <= self.steps <= most * self.epochs:
                return None
            return f"{read}, but max_epochs is {self.epochs}, which is max_steps: {most * self.epochs}."
        whole = max(1, round(self.steps * self.per_step / self.rows))
        if least * whole <= self.steps <= most * whole:
            return None
        return f"{read} of {self.rows:,} samples; {_epochs(whole)} would be max_steps: {most * whole}."

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps per epoch; None if the number of images is unknown."""
        return None if self.rows is None else math.ceil(self.rows / self.per_step)


def amount_of(
    data: LightningDataModule, trainer: Mapping[str, Any], *, gpus: int, samples: int | None = None
) -> Amount:
    """Return the amount that data and trainer ask for.

    Args:
        data: The data, not prepared.
        trainer: Settings of the trainer: ``max_steps`` (optimizer steps), else ``max_epochs``.
        gpus: Number of processes.
        samples: Number of training images, if the data is not here to be counted.

    Raises:
        ConfigError: The data does not tell its batch size, or its ``global_batch_size`` does not fit so many GPUs.
    """
    rows = training_rows(data) if samples is None else samples
    division = division_of(data, gpus=gpus, accumulate=int(trainer.get("accumulate_grad_batches") or 1))
    batch, per_step = division.batch_size, division.step_size
    max_steps, epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    epochs = None if epochs is None or epochs < 0 else epochs
    if max_steps is not None and max_steps >= 0:
        return Amount(batch, rows, max_steps * per_step, max_steps, per_step, by_steps=True, epochs=epochs)
    if rows is None or epochs is None:
        return Amount(batch, rows, None, None, per_step)
    return Amount(batch, rows, epochs * rows, epochs * math.ceil(rows / per_step), per_step)


def _epochs(number: int) -> str:
    return "one epoch" if number == 1 else f"{number} epochs"


def configured_gpus(trainer: Mapping[str, Any]) -> int | None:
    """Return the number of processes that the trainer asks for, ``devices`` x ``num_nodes``; None if left open."""
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    if isinstance(devices, str) and "," in devices:  # indices of devices, as in a list
        devices = [number for number in devices.split(",") if number.strip()]
    text = str(devices)
    count = len(devices) if isinstance(devices, list | tuple) else int(text) if text.isdigit() else 0
    return count * int(nodes) or None


def division_of(data: LightningDataModule, *, gpus: int = 1, accumulate: int = 1) -> Division:
    """Return how the images of an optimizer step are divided.

    Args:
        data: The data.
        gpus: Number of processes.
        accumulate: The trainer's ``accumulate_grad_batches``.

    Raises:
        ConfigError: The data does not tell its batch size, or its ``global_batch_size`` does not fit so many GPUs.
    """
    if isinstance(data, DataModule):
        return data.division(processes=gpus, accumulate=accumulate)
    size = getattr(getattr(data, "settings", data), "batch_size", None)
    if not isinstance(size, int):
        raise ConfigError(f"{type(data).__name__} has no batch_size that plan can read; give it one as an attribute.")
    return Division(size, gpus, accumulate)


def image_size_of(data: LightningDataModule) -> int | None:
    """Return the side of the images in a batch, in pixels; None if the data does not tell."""
    first = next(iter(data.sources.values())) if isinstance(data, MixedData) else data
    size = getattr(getattr(first, "settings", first), "image_size", None)
    return size if isinstance(size, int) else None


def training_rows(data: LightningDataModule) -> int | None:
    """Return the number of training images; None if they cannot be counted without reading them."""
    count = getattr(data, "training_rows", None)
    return None if count is None else count()


@dataclass(frozen=True)
class DataNeed:
    """A file that the data needs.

    Args:
        what: Description of the file.
        size: Approximate size, in words.
        is_here: Whether the file is on this machine.
    """

    what: str
    size: str
    is_here: bool


def data_needs(data: LightningDataModule) -> list[DataNeed]:
    """Return the files of the training and validation data, one entry for each kind."""
    if isinstance(data, MixedData):
        parts = [(source, ["train"]) for name, source in data.sources.items() if name in data.weights]
    elif isinstance(data, SourceData):
        parts = [(data, ["train"] if "train" in data.parts else [])]
    else:
        return []
    needs = [need for source, names in parts for name in names for need in source.needs(name)]
    found: dict[tuple[str, str], bool] = {}
    for need in needs:
        key = (need.what, need.size)
        found[key] = found.get(key, True) and need.found is not None
    return [DataNeed(what, size, is_here) for (what, size), is_here in found.items()]


def stored_bytes(method: Method, *, dtype: StoreDtype) -> dict[str, int]:
    """Return the bytes per image of the tokens in a feature store, by name of the part."""
    return {name: bytes_per_image(kept.rows, kept.width, dtype) for name, kept in method.stored_tokens().items()}

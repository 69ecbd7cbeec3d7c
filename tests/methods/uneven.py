"""Training batches of very unlike lengths, and the gradients that a fit makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.methods.helpers import VOCAB, bare_trainer, merging_of, shake, tiny_tove
from tests.methods.movekd.helpers import PAPER, shaken, tiny_movekd
from visexpert.data import StepLoader, pack
from visexpert.methods import MergeStudent, Method
from visexpert.types import Batch
from visexpert.vision import MoLESettings

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A sample: answers of these lengths, with an image or without."""

    answers: tuple[int, ...]
    has_image: bool = True


# Two rows make a small batch: the third of them has no image, the fifth nothing to write.
ROWS = (
    Row((1,)),
    Row((9, 7)),
    Row((2,), has_image=False),
    Row((1, 1)),
    Row((5,), has_image=False),
    Row((1,), has_image=False),
    Row((3,)),
    Row((12,)),
    Row(()),
    Row(()),
    Row((2,)),
    Row((1,), has_image=False),
)


def batch_of(first: int, last: int) -> Batch:
    """Rows ``first`` to ``last`` of :data:`ROWS`; a row is the same in whatever batch it lies."""
    images, texts = [], []
    for number, row in enumerate(ROWS[first:last], first):
        generator = torch.Generator().manual_seed(number)
        images.append(torch.randint(0, 256, (3, 20, 20), generator=generator, dtype=torch.uint8))
        lengths = [(2 + length, 2) for length in row.answers]
        texts.append([(torch.randint(5, VOCAB, (n,), generator=generator).tolist(), prompt) for n, prompt in lengths])
    there_B = torch.tensor([row.has_image for row in ROWS[first:last]])
    return Batch(torch.stack(images), torch.arange(first, last), "train", text=pack(texts, 0), has_image_B=there_B)


def batches_of(size: int, *, rows: int = len(ROWS), rank: int = 0, world: int = 1) -> list[Batch]:
    """All rows in batches of ``size``, those of one process."""
    return [batch_of(first, min(first + size, rows)) for first in range(0, rows, size)][rank::world]


class ListData(L.LightningDataModule):
    """Hands out these batches; with ``counted`` they say what their step counts."""

    def __init__(self, batches: Sequence[Batch], *, counted: bool = True) -> None:
        super().__init__()
        self.batches, self.counted = list(batches), counted

    def train_dataloader(self) -> Any:
        loader: Any = _Listed(self.batches)
        return StepLoader(loader, trainer=self.trainer) if self.counted else loader


class _Listed:
    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class GradientRecorder(L.Callback):
    """Keeps the gradients of each optimizer step, before any clipping."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: value.grad.clone() for name, value in named if value.grad is not None})


def gradients(folder: Path, model: Method, batches: Sequence[Batch], **options: Any) -> list[Gradients]:
    """Those of each step of one epoch; weights all but stay."""
    recorder = GradientRecorder()
    trainer = bare_trainer(folder, steps=-1, max_epochs=1, callbacks=[recorder], enable_checkpointing=False, **options)
    trainer.fit(model, datamodule=ListData(batches))
    return recorder.steps


def distance(found: Gradients, expected: Gradients) -> float:
    """Norm of the difference over the norm of what is expected, over all parameters."""
    assert found.keys() == expected.keys()
    apart = torch.stack([(found[name] - value).norm() for name, value in expected.items()]).norm()
    return float(apart / torch.stack([value.norm() for value in expected.values()]).norm())


STILL: dict[str, Any] = {"lr": 1e-12, "warmup_steps": 0}


def still_tove() -> Method:
    return shake(tiny_tove(language_lr=1e-12, balance_weight=0.0, **STILL))


def still_movekd() -> Method:
    return shaken(tiny_movekd(language_lr=1e-12, clip_lr=1e-12, balance_weight=0.3, **STILL, **PAPER))


def still_merging() -> Method:
    student = MergeStudent(mole=MoLESettings(num_experts=3, rank=2, dropout=0.0, init="released"), balance_weight=0.3)
    return merging_of(teacher=shake(tiny_tove()), student=student, lm_weight=0.7, language_lr=1e-12, **STILL)


MODELS: dict[str, Callable[[], Method]] = {"ToVE": still_tove, "MoVEKD": still_movekd, "Merging": still_merging}

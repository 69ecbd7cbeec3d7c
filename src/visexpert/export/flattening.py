"""Turn a student with MoLE into one plain encoder: measure how its experts are used, distill, measure the error."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from visexpert.losses import token_distance
from visexpert.metrics.tokens import TokenError
from visexpert.optim import ParameterGroup, adamw_and_cosine
from visexpert.precision import ClippedModule
from visexpert.types import Batch, VisionTokens, imaged
from visexpert.vision import UsageMeter, VisionEncoder


class RouterUse(L.LightningModule):
    """Measures in validation how much each expert of a student is used; nothing trains.

    Args:
        student: A CLIP with MoLE.
    """

    def __init__(self, student: VisionEncoder) -> None:
        super().__init__()
        self.student = student.eval()
        self.meter = UsageMeter(student)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        images_BCHW = images_of(batch)
        if len(images_BCHW):
            self.meter.update(images_BCHW)


class Flattening(ClippedModule):
    """Trains a plain encoder to give the tokens of a student, [CLS] included: mean squared error at the layer read.

    Only images are needed, no text and no teacher. Blocks behind that layer stay unchanged.

    Args:
        student: The student, frozen.
        plain: The CLIP to train in place; a fold of the student is a good start.
        lr: Peak learning rate.
        warmup_steps: Steps of linear warm-up, before cosine decay to zero.
        weight_decay: Weight decay of matrices.
    """

    def __init__(
        self,
        *,
        student: VisionEncoder,
        plain: VisionEncoder,
        lr: float = 1e-4,
        warmup_steps: int = 20,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.student, self.plain = student.requires_grad_(False).eval(), plain.requires_grad_(False)
        self.lr, self.warmup_steps, self.weight_decay = lr, warmup_steps, weight_decay
        for module in plain.read_modules():
            module.requires_grad_(True)
        self.error = TokenError()

    def train(self, mode: bool = True) -> Flattening:
        """Set the mode of the plain CLIP; the student stays in eval mode."""
        super().train(mode)
        self.student.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the distance of the tokens; None for a batch without images."""
        images_BCHW = images_of(batch)
        if not len(images_BCHW):
            return None
        with torch.no_grad():
            target_BND = _with_cls(self.student(images_BCHW))
        loss = token_distance(_with_cls(self.plain(images_BCHW)), target_BND)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images_BCHW))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the error."""
        self.error.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Compare patch tokens, which a language model reads."""
        images_BCHW = images_of(batch)
        if len(images_BCHW):
            self.error.update(self.plain(images_BCHW).tokens_BTD, self.student(images_BCHW).tokens_BTD)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with warm-up and cosine decay by step."""
        groups = [ParameterGroup("plain", self.plain.read_modules(), self.lr)]
        return adamw_and_cosine(
            groups, lr=self.lr, weight_decay=self.weight_decay, warmup_steps=self.warmup_steps, trainer=self.trainer
        )


def images_of(batch: Batch) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] of the samples that have one."""
    return imaged(batch.images_01(), batch.has_image_B)


def _with_cls(tokens: VisionTokens) -> Tensor:
    if tokens.cls_BD is None:
        return tokens.tokens_BTD
    return torch.cat([tokens.cls_BD[:, None], tokens.tokens_BTD], dim=1)

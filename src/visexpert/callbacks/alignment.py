"""Text alignment of a run's encoder: what training did to retrieval and zero-shot use through its text tower."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from visexpert.errors import ConfigError, UserError
from visexpert.methods import Method
from visexpert.methods.alignment import AlignmentProbe
from visexpert.types import Batch
from visexpert.vision import VisionEncoder
from visexpert.vision.text_towers import TextTower, text_tower_of

log = logging.getLogger(__name__)

STUDENT, FROZEN = "student", "frozen"


class TextAlignment(Callback):
    """Logs ``test/alignment/student/...`` and ``.../frozen/...``: recall and zero-shot accuracy, in [0, 1].

    ``image_to_text/R1``, ``R5``, ``R10``, the same of ``text_to_image``, and ``zero_shot`` over the classes that
    occur, on the first ``evaluation.alignment_images`` test images, through the text tower of the encoder's source;
    see :class:`~visexpert.methods.alignment.AlignmentProbe`. A log line says why where nothing is measured.
    """

    def __init__(self) -> None:
        self._probe: AlignmentProbe | None = None
        self._tower: TextTower | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say before hours of training what the test will not measure, and why."""
        if not (trainer.is_global_zero and isinstance(pl_module, Method) and pl_module.evaluation.alignment_images):
            return
        try:
            alignment_tower(pl_module.clip, trainer.datamodule)  # type: ignore[attr-defined]
        except UserError as error:
            log.info("Text alignment will not be measured: %s", error)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._probe = self._tower = None
        if not isinstance(pl_module, Method) or pl_module.evaluation.alignment_images == 0:
            return
        try:
            self._tower = alignment_tower(pl_module.clip, trainer.datamodule)  # type: ignore[attr-defined]
            encoders = {STUDENT: pl_module.clip, FROZEN: pl_module.pooled_teacher()}
        except UserError as error:
            log.info("Text alignment is not measured: %s", error)
            return
        self._probe = AlignmentProbe(encoders, most=pl_module.evaluation.alignment_images)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *place: Any
    ) -> None:
        if self._probe is not None:
            self._probe.add(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        probe, tower = self._probe, self._tower
        self._probe = self._tower = None
        if probe is None or tower is None:
            return
        try:
            scores = probe.scores(tower)
        except UserError as error:
            log.warning("Text alignment is not measured: %s", error)
            return
        if not scores:
            log.info(
                "Text alignment is not measured: the test images have neither captions nor classes, or all the same."
            )
        elif trainer.is_global_zero:
            log.info("Text alignment is measured on %d images by this process (alignment_images).", probe.num_images)
        for encoder, found in scores.items():
            # Some loggers, such as MLflow's, refuse "@" in names.
            named = {f"test/alignment/{encoder}/{name.replace('@', '')}": value for name, value in found.items()}
            pl_module.log_dict(named, batch_size=1)


def alignment_tower(encoder: VisionEncoder, data: object) -> TextTower:
    """Return the text tower of an encoder's source: the data's own for encoders that come with it, else the source's.

    Raises:
        ConfigError: The source has none, or the encoder has no pooled output.
        WeightsError: It cannot be read.
    """
    encoder.require_pooled()
    own = getattr(data, "text_tower", None)
    tower: TextTower | None = None if own is None else own(encoder.source)
    tower = tower or text_tower_of(encoder.source)
    if tower is None:
        if encoder.source is None:
            raise ConfigError("the encoder began with random weights, which no text tower goes with.")
        raise ConfigError(f"the encoder's source, {encoder.source!r}, has no text tower, or no tokenizer, beside it.")
    return tower

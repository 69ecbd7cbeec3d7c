"""Measure for ``visexpert export`` what training did to the encoder's alignment with its text tower."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import lightning as L
from torch import nn

from visexpert.callbacks.alignment import alignment_tower
from visexpert.commands.export_images import PartImages, run_on_images
from visexpert.commands.export_source import start_of
from visexpert.errors import UserError
from visexpert.export import ExportSource, TextAlignmentReport
from visexpert.methods.alignment import AlignmentProbe
from visexpert.runs import SavedRun
from visexpert.types import Batch
from visexpert.vision import VisionEncoder

log = logging.getLogger(__name__)

BEFORE = "before"


class AlignmentUse(L.LightningModule):
    """Embeds validation images by several encoders; nothing trains.

    Args:
        encoders: The encoders by name.
        most: Number of images, the first ones.
    """

    def __init__(self, encoders: Mapping[str, VisionEncoder], *, most: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: encoder.eval() for name, encoder in encoders.items()})
        self.probe = AlignmentProbe(encoders, most=most)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed one batch."""
        self.probe.add(batch)


def with_alignment(saved: SavedRun, sources: Mapping[str, ExportSource], *, images: int) -> dict[str, ExportSource]:
    """Return the exports with their text alignment, before training and now, on the run's validation images.

    Whatever stands in the way is said in the report, and does not stop the export.

    Args:
        saved: The run.
        sources: What to export, by format.
        images: Number of images, the first ones; 0 measures nothing.
    """
    if images == 0:
        return _all(sources, TextAlignmentReport(reason="not asked for (--alignment_images 0)"))
    try:
        tower = alignment_tower(saved.model.clip, saved.data)
        before = start_of(saved.model.clip)
        assert before is not None  # a text tower has a source
        kinds = {id(source.clip): source.clip for source in sources.values()}
        use = AlignmentUse({BEFORE: before, **{f"of_{key}": clip for key, clip in kinds.items()}}, most=images)
        log.info("Measuring text alignment on %d of the run's images at most", images)
        run_on_images(saved, use, PartImages(saved.data, "validation", most=images))
        scores = use.probe.scores(tower)
    except UserError as error:
        return _all(sources, TextAlignmentReport(reason=str(error)))
    if not scores:
        return _all(
            sources,
            TextAlignmentReport(
                reason="the run has no validation images with captions or classes, or all have the same"
            ),
        )
    count = use.probe.num_images
    return {
        name: replace(source, alignment=TextAlignmentReport(count, scores[BEFORE], scores[f"of_{id(source.clip)}"]))
        for name, source in sources.items()
    }


def _all(sources: Mapping[str, ExportSource], report: TextAlignmentReport) -> dict[str, ExportSource]:
    return {name: replace(source, alignment=report) for name, source in sources.items()}

"""NoCaps: captions of novel objects, for evaluation alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visexpert.data.coco import read_coco_captions
from visexpert.data.needs import Need
from visexpert.data.rows import RowData
from visexpert.data.samples import Sample
from visexpert.data.source import CAPTION_PROMPT

FILE = "nocaps_val_4500_captions.json"


class NoCaps(RowData):
    """NoCaps' validation set (arXiv 1812.08658): 4500 images, ten captions each; never trained on.

    Under ``root`` lie ``nocaps_val_4500_captions.json`` and the images in ``val/`` (or ``images/``). Scores come for
    all images and by domain (``in-domain``, ``near-domain``, ``out-domain``), each domain scored as a set of its own.

    Args:
        prompt: Words that ask for a caption.
        kwargs: See :class:`~visexpert.data.rows.RowData`.
    """

    parts = ("val", "test")

    def __init__(self, *, prompt: str = CAPTION_PROMPT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prompt = prompt

    def needs(self, part: str) -> list[Need]:
        """List captions and images."""
        return [
            Need(self.root / FILE, "NoCaps' captions", f"https://s3.amazonaws.com/nocaps/{FILE}", "7 MB"),
            Need(
                self.root / "val",
                "NoCaps' images",
                "https://nocaps.org/download (coco_url of each image)",
                "4500 images",
                others=(self.root / "images",),
            ),
        ]

    def read(self, part: str) -> Iterable[Sample]:
        """Yield one sample per image, its domain as the family."""
        folder: Path = self.needs(part)[1].found or self.root / "val"
        return read_coco_captions(self, self.root / FILE, folder, part, self.prompt)

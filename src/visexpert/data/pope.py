"""POPE: questions whether an object is present, with absent objects drawn in three ways."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visexpert.data.annotations import (
    BrokenRecordError,
    collect,
    image_path,
    kind_of,
    read_json_lines,
    text_of,
    value_of,
)
from visexpert.data.coco import coco_images
from visexpert.data.needs import Need
from visexpert.data.rows import RowData, check_template
from visexpert.data.samples import Sample
from visexpert.errors import ConfigError
from visexpert.typed import typed
from visexpert.types import TextItem

KINDS = ("random", "popular", "adversarial")

_URL = "https://github.com/AoiDragon/POPE/tree/main/output/coco"


@typed
class POPE(RowData):
    """POPE (arXiv 2305.10355) on COCO: one row per image with all its probes, scored overall and by kind.

    ``root`` holds ``coco_pope_random.json``, ``coco_pope_popular.json`` and ``coco_pope_adversarial.json`` (JSON lines)
    and, unless ``images`` names another folder, ``val2014/``.

    Args:
        images: Folder that holds ``val2014/``; null for ``root``.
        kinds: Kinds of probes to use; null for all three.
        prompt: Prompt for the model; ``{question}`` stands for the question.
        kwargs: See :class:`~visexpert.data.rows.RowData`.
    """

    parts = ("val", "test")

    def __init__(
        self,
        *,
        images: str | None = None,
        kinds: list[str] | None = None,
        prompt: str = "{question}",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kinds = list(KINDS if kinds is None else kinds)
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ConfigError(f"kinds is {self.kinds}, but must name some of {', '.join(KINDS)}.")
        self.images = self.root if images is None else Path(images).expanduser()
        self.prompt = check_template(prompt, "question")

    def needs(self, part: str) -> list[Need]:
        """List the probes and the images."""
        probes = [Need(self._file(kind), f"POPE's {kind} probes", _URL, "0.5 MB") for kind in self.kinds]
        return [*probes, coco_images(self.images, "val2014")]

    def read(self, part: str) -> Iterable[Sample]:
        """Return one sample per image, with its probes of all kinds."""
        by_image: dict[str, list[TextItem]] = {}
        for kind in self.kinds:
            lines = read_json_lines(self._file(kind))

            def parse(record: Any, kind: str = kind) -> None:
                file = image_path(self.images / "val2014", value_of(record, "image"), key="image")
                by_image.setdefault(file, []).append(self._item(record, kind))

            faults = self.faults(part, total=len(lines), shared=False)
            list(collect(lines, parse, path=self._file(kind), faults=faults))
        return [Sample(file, file, tuple(items)) for file, items in by_image.items()]

    def _item(self, record: Any, kind: str) -> TextItem:
        label = value_of(record, "label")
        if label not in ("yes", "no"):
            raise BrokenRecordError(f"label is {kind_of(label)}, but must be yes or no")
        question = text_of(record, "text")
        return TextItem("pope", self.prompt.format(question=question), label, kind, generate=True)

    def _file(self, kind: str) -> Path:
        return self.root / f"coco_pope_{kind}.json"

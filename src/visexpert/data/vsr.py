"""VSR: true or false statements about spatial relations in an image."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

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

Split = Literal["random", "zeroshot"]

_URL = "https://github.com/cambridgeltl/visual-spatial-reasoning/tree/master/data/splits/{split}"
_FILES = {"train": "train.jsonl", "val": "dev.jsonl", "test": "test.jsonl"}

CATEGORIES: dict[str, tuple[str, ...]] = {
    name: tuple(relation.strip() for relation in relations.split(","))
    for name, relations in {
        "adjacency": "adjacent to, alongside, at the side of, at the right side of, at the left side of, attached to, "
        "at the back of, ahead of, against, at the edge of",
        "directional": "off, past, toward, down, deep down, up, away from, along, around, from, into, to, across, "
        "across from, through, down from",
        "orientation": "facing, facing away from, parallel to, perpendicular to",
        "projective": "on top of, beneath, beside, behind, left of, right of, under, in front of, below, above, over, "
        "in the middle of",
        "proximity": "by, close to, near, far from, far away from",
        "topological": "connected to, detached from, has as a part, part of, contains, within, at, on, in, with, "
        "surrounding, among, consists of, out of, between, inside, outside, touching",
        "unallocated": "beyond, next to, opposite to, after, enclosed by",
    }.items()
}
"""The paper's categories of relations (its table 1; analysis_scripts/rel_meta_category_dict.txt of the release)."""

_CATEGORY_OF = {relation: name for name, relations in CATEGORIES.items() for relation in relations}


@typed
class VSR(RowData):
    """Visual spatial reasoning (arXiv 2205.00363): one row per image with its statements; accuracy, also by category.

    ``root`` holds ``random/`` and ``zeroshot/`` with ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl`` (the
    release's ``data/splits/``). Images are COCO's of 2017, flat in one folder (``images/`` or ``trainval2017/``) or in
    ``train2017/`` and ``val2017/`` as each statement's link says.

    Args:
        split: ``zeroshot`` (test concepts are unseen in training) or ``random``.
        images: Folder that holds the image folders; null for ``root``.
        prompt: Prompt for the model; ``{statement}`` stands for the statement (ToVE does not state its own).
        answers: Answers for a true and for a false statement.
        kwargs: See :class:`~visexpert.data.rows.RowData`.
    """

    def __init__(
        self,
        *,
        split: Split = "zeroshot",
        images: str | None = None,
        prompt: str = "is this true of the image ? {statement}",
        answers: tuple[str, str] = ("yes", "no"),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if split not in get_args(Split):
            raise ConfigError(f"split is {split!r}, but must be one of {', '.join(get_args(Split))}.")
        self.split = split
        self.images = self.root if images is None else Path(images).expanduser()
        self.prompt = check_template(prompt, "statement")
        self.answers = (answers[0], answers[1])

    def needs(self, part: str) -> list[Need]:
        """List the statements and the images."""
        statements = Need(self._file(part), "VSR's statements", _URL.format(split=self.split), "3 MB")
        if self._flat is not None:
            return [statements]
        return [statements, coco_images(self.images, "train2017"), coco_images(self.images, "val2017")]

    def read(self, part: str) -> Iterable[Sample]:
        """Return one sample per image, with its statements."""
        path, flat = self._file(part), self._flat
        lines = read_json_lines(path)
        by_image: dict[str, list[TextItem]] = {}

        def parse(record: Any) -> None:
            folder = self._linked(record) if flat is None else flat
            file = image_path(folder, value_of(record, "image"), key="image")
            by_image.setdefault(file, []).append(self._item(record))

        faults = self.faults(part, total=len(lines), shared=False)
        list(collect(lines, parse, path=path, faults=faults))
        return [Sample(file, file, tuple(items)) for file, items in by_image.items()]

    def _item(self, record: Any) -> TextItem:
        label = value_of(record, "label")
        if isinstance(label, bool) or label not in (0, 1):
            raise BrokenRecordError(f"label is {kind_of(label)}, but must be 0 or 1")
        statement = text_of(record, "caption")
        answer = self.answers[0] if label == 1 else self.answers[1]
        family = _CATEGORY_OF.get(str(record.get("relation", "")).strip(), "other")
        return TextItem("vsr", self.prompt.format(statement=statement), answer, family, generate=True)

    def _linked(self, record: Any) -> Path:
        """Return the COCO folder of a link such as ``http://images.cocodataset.org/train2017/000000122962.jpg``."""
        name = PurePosixPath(text_of(record, "image_link")).parent.name
        if name not in ("train2017", "val2017"):
            raise BrokenRecordError(f"image_link {record['image_link']!r} is in neither train2017 nor val2017")
        return self.images / name

    def _file(self, part: str) -> Path:
        return self.root / self.split / _FILES[part]

    @property
    def _flat(self) -> Path | None:
        """The single folder of all images, if there is one."""
        folders = (self.images / "images", self.images / "trainval2017")
        return next((folder for folder in folders if folder.is_dir()), None)

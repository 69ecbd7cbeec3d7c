"""COCO captions (Karpathy's split or the official files of 2014 and 2017), and NoCaps in the same format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from visexpert.data.annotations import (
    BrokenRecordError,
    Once,
    an_object,
    choice_of,
    collect,
    each_usable,
    id_of,
    image_path,
    list_of,
    read_json_list,
    text_of,
    value_of,
)
from visexpert.data.needs import Need
from visexpert.data.rows import RowData
from visexpert.data.samples import Sample
from visexpert.data.source import CAPTION_PROMPT
from visexpert.errors import ConfigError
from visexpert.typed import typed
from visexpert.types import TextItem

Annotations = Literal["karpathy", "2014", "2017"]

IMAGES = {
    "train2014": ("COCO's training images of 2014", "13.5 GB"),
    "val2014": ("COCO's validation images of 2014", "6.6 GB"),
    "train2017": ("COCO's training images of 2017", "19.3 GB"),
    "val2017": ("COCO's validation images of 2017", "0.8 GB"),
}
KARPATHY_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_KARPATHY_PARTS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def coco_images(root: Path, folder: str) -> Need:
    """Return the need for one of COCO's image folders."""
    what, size = IMAGES[folder]
    return Need(root / folder, what, f"http://images.cocodataset.org/zips/{folder}.zip", size)


def caption_item(captions: list[str], prompt: str, family: str = "") -> TextItem:
    """Return one item for all captions of an image; the model's caption is scored against all of them."""
    return TextItem("caption", prompt, captions[0], family, tuple(captions), generate=True)


@typed
class COCOCaptions(RowData):
    """COCO captions (arXiv 1504.00325): one item per image, for which training draws one of its captions each epoch.

    ``root`` holds ``train2014/`` and ``val2014/`` (or 2017) as COCO packs them, and either ``dataset_coco.json``
    (Karpathy and Li's 113287 / 5000 / 5000 images) or ``annotations/captions_train2014.json`` and the like. Captions
    of the official test images are not public; with the official files ``test`` is the validation part.

    Args:
        annotations: ``karpathy``, ``2014`` or ``2017``.
        restval: Also train on Karpathy's ``restval`` images, as is common.
        prompt: Prompt for a caption.
        draw_answers: See :class:`~visexpert.data.rows.RowData`.
        kwargs: See :class:`~visexpert.data.rows.RowData`.
    """

    def __init__(
        self,
        *,
        annotations: Annotations = "karpathy",
        restval: bool = True,
        prompt: str = CAPTION_PROMPT,
        draw_answers: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(draw_answers=draw_answers, **kwargs)
        if annotations not in get_args(Annotations):
            raise ConfigError(f"annotations is {annotations!r}, but must be one of {', '.join(get_args(Annotations))}.")
        self.annotations = annotations
        self.restval = restval
        self.prompt = prompt
        self._of_no_part: set[int] = set()

    def needs(self, part: str) -> list[Need]:
        """List annotations and image folders of a part."""
        if self.annotations == "karpathy":
            what = Need(self.root / "dataset_coco.json", "Karpathy's split of COCO", KARPATHY_URL, "37 MB")
            folders = ["train2014", "val2014"] if part == "train" and self.restval else ["val2014"]
            folders = ["train2014"] if part == "train" and not self.restval else folders
            return [what, *(coco_images(self.root, folder) for folder in folders)]
        url = f"http://images.cocodataset.org/annotations/annotations_trainval{self.annotations}.zip"
        captions = Need(self._official(part), "COCO's captions", url, "253 MB")
        return [captions, coco_images(self.root, self._folder_of(part))]

    def read(self, part: str) -> Iterable[Sample]:
        """Yield one sample per image."""
        return self._read_karpathy(part) if self.annotations == "karpathy" else self._read_official(part)

    def _read_karpathy(self, part: str) -> Iterable[Sample]:
        path = self.root / "dataset_coco.json"
        splits = {split for split, of in _KARPATHY_PARTS.items() if of == part}
        splits -= set() if self.restval else {"restval"}
        everything = read_json_list(path, "images")
        wanted = everything.only(row for row, entry in enumerate(everything) if self._is_due(row, entry, splits))
        once = Once("image")

        def parse(entry: Any) -> Sample:
            choice_of(entry, "split", tuple(_KARPATHY_PARTS))
            name = f"{text_of(entry, 'filepath')}/{text_of(entry, 'filename')}"
            once.check(name)
            lost: list[str] = []
            captions = each_usable(list_of(entry, "sentences"), _raw, lost)
            return self._sample(image_path(self.root, name, key="filename"), captions, lost)

        return collect(wanted, parse, path=path, faults=self.faults(part, total=len(wanted), shared=False))

    def _is_due(self, row: int, entry: Any, splits: set[str]) -> bool:
        """Return whether a part reads an entry; one that belongs to no part counts as broken in the first part read."""
        split = entry.get("split") if isinstance(entry, dict) else None
        if isinstance(split, str) and split in _KARPATHY_PARTS:
            return split in splits
        is_new = row not in self._of_no_part
        self._of_no_part.add(row)
        return is_new

    def _read_official(self, part: str) -> Iterable[Sample]:
        path = self._official(part)
        return read_coco_captions(self, path, self.root / self._folder_of(part), part, self.prompt)

    def _sample(self, file: str, captions: list[str], lost: list[str]) -> Sample:
        if not captions:
            raise BrokenRecordError("it has no captions")
        return Sample(file, file, (caption_item(captions, self.prompt),), tuple(lost))

    def _official(self, part: str) -> Path:
        return self.root / "annotations" / f"captions_{self._folder_of(part)}.json"

    def _folder_of(self, part: str) -> str:
        return f"{'train' if part == 'train' else 'val'}{self.annotations}"


def _raw(sentence: Any) -> str:
    return text_of(an_object(sentence, name="a sentence"), "raw")


def read_coco_captions(data: RowData, path: Path, folder: Path, part: str, prompt: str) -> Iterable[Sample]:
    """Read a file in COCO's format: ``images`` with ids and file names, ``annotations`` with captions by image id.

    Args:
        data: The source, which counts broken records.
        path: The file.
        folder: Folder of the images.
        part: Part of the source.
        prompt: Prompt for a caption.
    """
    images, annotations = read_json_list(path, "images"), read_json_list(path, "annotations")
    captions: dict[Any, list[str]] = {}
    once = Once("image")
    faults = data.faults(part, total=len(annotations) + len(images), shared=False)

    def parse_caption(record: Any) -> None:
        captions.setdefault(id_of(record, "image_id"), []).append(text_of(record, "caption"))

    def parse_image(record: Any) -> Sample:
        number = id_of(record, "id")
        once.check(number)
        if number not in captions:
            raise BrokenRecordError("it has no captions")
        file = image_path(folder, value_of(record, "file_name"), key="file_name")
        family = str(record.get("domain") or "")
        return Sample(file, file, (caption_item(captions[number], prompt, family),))

    list(collect(annotations, parse_caption, path=path, faults=faults))
    return collect(images, parse_image, path=path, faults=faults)


_NOCAPS = "nocaps_val_4500_captions.json"


@typed
class NoCaps(RowData):
    """NoCaps' validation set (arXiv 1812.08658): 4500 images of novel objects, ten captions each; for evaluation only.

    ``root`` holds ``nocaps_val_4500_captions.json`` and the images in ``val/`` (or ``images/``). Scores are given for
    all images and by domain (``in-domain``, ``near-domain``, ``out-domain``); each domain is scored separately.

    Args:
        prompt: Prompt for a caption.
        kwargs: See :class:`~visexpert.data.rows.RowData`.
    """

    parts = ("val", "test")

    def __init__(self, *, prompt: str = CAPTION_PROMPT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prompt = prompt

    def needs(self, part: str) -> list[Need]:
        """List captions and images."""
        return [
            Need(self.root / _NOCAPS, "NoCaps' captions", f"https://s3.amazonaws.com/nocaps/{_NOCAPS}", "7 MB"),
            Need(
                self.root / "val",
                "NoCaps' images",
                "https://nocaps.org/download (coco_url of each image)",
                "4500 images",
                others=(self.root / "images",),
            ),
        ]

    def read(self, part: str) -> Iterable[Sample]:
        """Yield one sample per image; its domain is the family of its text."""
        folder: Path = self.needs(part)[1].found or self.root / "val"
        return read_coco_captions(self, self.root / _NOCAPS, folder, part, self.prompt)

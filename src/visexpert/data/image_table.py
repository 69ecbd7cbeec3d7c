"""Images of your own: listed in a CSV, TSV or JSON file with their texts, or all those of a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visexpert.data.annotations import (
    BrokenRecordError,
    Records,
    collect,
    image_path,
    read_json_lines,
    read_text,
    slow,
    value_of,
)
from visexpert.data.coco import caption_item
from visexpert.data.columns import ColumnData
from visexpert.data.image_tree import images_below
from visexpert.data.needs import Need
from visexpert.data.samples import Sample
from visexpert.errors import ConfigError, DataError
from visexpert.typed import typed
from visexpert.types import TextItem

SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON = (".json", ".jsonl")

CLASS = "class folder"
"""Column of the class in the records of a folder."""


@typed
class ImageTable(ColumnData):
    """Images of your own with captions, with questions and answers, or without text; see docs/your-data.md.

    Each part is a file under ``root`` (``.csv`` or ``.tsv`` with a line of column names, ``.jsonl``, or ``.json`` with
    a list), or a folder of images, at any depth, whose captions lie in text files of the same name (``cat.jpg``,
    ``cat.txt``). Rows of the same image belong together: of several captions, training draws one each epoch.

    Args:
        train: File or folder of the training images, as ``val`` and ``test`` are files or folders.
        images: Folder under ``root`` to which a file's image names are relative.
        class_folders: The folders right inside a folder of images are classes, for probes (torchvision's
            ``ImageFolder``).
        kwargs: See :class:`~visexpert.data.columns.ColumnData`. Columns are those of files; only JSON can hold lists.
    """

    def __init__(
        self, *, train: str = "train.csv", images: str = ".", class_folders: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(train=train, **kwargs)
        self.files = {part: self.root / name for part, name in self.named.items()}
        for part, path in self.files.items():
            is_table = path.suffix.lower() in (*SEPARATORS, *JSON)
            if not (is_table or path.is_dir()) and (path.suffix or path.exists()):
                raise ConfigError(
                    f"ImageTable: {part} is '{path.name}', but must be a .csv, .tsv, .jsonl or .json file, or a folder."
                )
        self.images = self.root / images
        self.class_folders = class_folders

    def needs(self, part: str) -> list[Need]:
        """List the file, and the folder of its images."""
        path = self.files[part]
        listed = Need(path, f"The list of {part} images", "whoever made the data", "a file or a folder of yours")
        if path.is_dir() or not path.suffix:
            return [listed]
        return [listed, Need(self.images, "Their images", "whoever made the data", "a folder of yours")]

    def read(self, part: str) -> Iterable[Sample]:
        """Yield one sample per image.

        Raises:
            DataError: A file cannot be read or lacks a column, a folder has no images, or there is only one class.
        """
        path = self.files[part]
        is_folder = path.is_dir()
        records, folder = (self._listed(path), path) if is_folder else (self._records(path), self.images)
        faults = self.faults(part, total=len(records), shared=False)
        texts: dict[str, list[TextItem]] = {}
        labels: dict[str, str] = {}

        def parse(record: Any) -> None:
            file = image_path(folder, value_of(record, self.columns.image), key=self.columns.image)
            item, label = self.columns.item_of(record), record[CLASS] if is_folder else self.columns.label_of(record)
            if labels.setdefault(file, label) != label:
                raise BrokenRecordError(f"the class of {file} is {label!r}, but {labels[file]!r} in an earlier record")
            texts.setdefault(file, []).extend([] if item is None else [item])

        list(collect(records, parse, path=path, faults=faults))
        self.check_labels(labels.values(), where=path)
        for file, items in texts.items():
            chosen = items if self.columns.question else self._one_caption(items)
            yield Sample(file, file, tuple(chosen), label=labels[file])

    def _one_caption(self, items: list[TextItem]) -> list[TextItem]:
        captions = [caption for item in items for caption in item.references]
        return [caption_item(captions, self.columns.prompt)] if captions else []

    def _records(self, path: Path) -> Records:
        """Return the records of a file.

        Raises:
            ConfigError: Class folders are asked of a file.
            DataError: It cannot be read, or lacks a column.
        """
        if self.class_folders:
            raise ConfigError(
                f"ImageTable: class_folders needs a folder, but '{path}' is a file; name its column by label_column."
            )
        suffix = path.suffix.lower()
        if suffix in JSON:
            records = read_json_lines(path)
            present = dict.fromkeys(key for record in records if isinstance(record, dict) for key in record)
            if present:
                self.columns.check(present, where=path)
            return records
        rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=SEPARATORS[suffix], strict=True)
        try:
            header = next(rows, [])
            numbered = [(rows.line_num, row) for row in rows if row]
        except csv.Error as error:
            raise DataError(f"{path}: line {rows.line_num} is not CSV ({error}); mend its quotes.") from error
        self.columns.check(header, where=path)
        values = [_record(row, header) for _, row in numbered]
        return Records(values, numbers=[number for number, _ in numbered], form="Line {}")

    def _listed(self, folder: Path) -> Records:
        """Return a record for each image below a folder, with the text of the file beside it, if there is one.

        Raises:
            ConfigError: Questions or a column are asked of a folder.
            DataError: It has no images.
        """
        asked = {"question_column": self.columns.question, "label_column": self.columns.label}
        for setting, column in asked.items():
            if column is not None:
                instead = "name a .csv or .jsonl file" + (", or set class_folders" if setting == "label_column" else "")
                raise ConfigError(
                    f"ImageTable: {setting}={column!r} needs a file with that column, but '{folder}' is a folder; "
                    f"{instead}."
                )
        names = images_below(folder)
        listed = slow(names, doing=f"captions of {folder.name}", unit="image")
        return Records([self._record_of(folder, name) for name in listed], numbers=names, form="Image {}")

    def _record_of(self, folder: Path, name: str) -> dict[str, Any] | BrokenRecordError:
        """Return the record of an image in a folder."""
        above, _, _ = name.partition("/") if "/" in name else ("", "", "")
        if self.class_folders and not above:
            return BrokenRecordError(f"{name} lies in no folder of a class")
        record: dict[str, Any] = {self.columns.image: name, CLASS: above if self.class_folders else ""}
        beside = (folder / name).with_suffix(".txt")
        if self.columns.with_text and beside.is_file():
            record[self.columns.caption] = read_text(beside)
        return record


def _record(row: list[str], header: list[str]) -> dict[str, str] | BrokenRecordError:
    if len(row) != len(header):
        return BrokenRecordError(f"it has {len(row)} columns, but the first line names {len(header)}")
    return dict(zip(header, row, strict=True))

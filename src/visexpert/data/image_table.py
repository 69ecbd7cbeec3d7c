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
    text_of,
    value_of,
)
from visexpert.data.coco import caption_item
from visexpert.data.needs import Need
from visexpert.data.rows import RowData
from visexpert.data.samples import Sample
from visexpert.data.source import CAPTION_PROMPT
from visexpert.errors import ConfigError, DataError
from visexpert.types import TextItem

SEPARATORS = {".csv": ",", ".tsv": "\t"}
JSON = (".json", ".jsonl")
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".ppm", ".avif"})


class ImageTable(RowData):
    """Images of your own with captions, or with questions and answers; see docs/your-data.md.

    Each part is a file under ``root`` (``.csv`` or ``.tsv`` with a line of column names, ``.jsonl``, or ``.json`` with
    a list), or a folder of images, whose captions lie in text files of the same name (``cat.jpg``, ``cat.txt``). Rows
    of the same image belong together: of several captions, training draws one each epoch.

    Args:
        train: File or folder of the training images.
        val: The same for validation; null for none.
        test: The same for the test; null for none.
        images: Folder under ``root`` to which a file's image names are relative.
        image_column: Column with the name of an image.
        caption_column: Column with a caption (in JSON, also a list of them).
        question_column: Column with a question, where the data has questions instead of captions; null for captions.
        answer_column: Column with its answer (in JSON, also a list of accepted answers).
        prompt: Prompt for a caption.
        draw_answers: See :class:`~visexpert.data.rows.RowData`.
        kwargs: See :class:`~visexpert.data.rows.RowData`. Without a ``tokenizer`` images are read without texts.
    """

    def __init__(
        self,
        *,
        train: str = "train.csv",
        val: str | None = None,
        test: str | None = None,
        images: str = ".",
        image_column: str = "image",
        caption_column: str = "caption",
        question_column: str | None = None,
        answer_column: str = "answer",
        prompt: str = CAPTION_PROMPT,
        draw_answers: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(draw_answers=draw_answers, **kwargs)
        given = {"train": train, "val": val, "test": test}
        self.files = {part: self.root / name for part, name in given.items() if name is not None}
        for part, path in self.files.items():
            if path.suffix.lower() not in (*SEPARATORS, *JSON, ""):
                raise ConfigError(
                    f"ImageTable: {part} is '{path.name}', but must be a .csv, .tsv, .jsonl or .json file, or a folder."
                )
        self.parts = tuple(self.files)
        self.images = self.root / images
        self.image_column, self.caption_column = image_column, caption_column
        self.question_column, self.answer_column = question_column, answer_column
        self.prompt = prompt

    def needs(self, part: str) -> list[Need]:
        """List the file, and the folder of its images."""
        path = self.files[part]
        listed = Need(path, f"The list of {part} images", "whoever made the data", "a file or a folder of yours")
        if not path.suffix:
            return [listed]
        return [listed, Need(self.images, "Their images", "whoever made the data", "a folder of yours")]

    def read(self, part: str) -> Iterable[Sample]:
        """Yield one sample per image."""
        path = self.files[part]
        records, folder = (self._listed(path), path) if path.is_dir() else (self._records(path), self.images)
        faults = self.faults(part, total=len(records), shared=False)
        texts: dict[str, list[TextItem]] = {}
        for file, item in collect(records, lambda record: self._text(record, folder), path=path, faults=faults):
            texts.setdefault(file, []).extend([] if item is None else [item])
        for file, items in texts.items():
            yield Sample(file, file, tuple(items if self.question_column else self._one_caption(items)))

    def _one_caption(self, items: list[TextItem]) -> list[TextItem]:
        captions = [caption for item in items for caption in item.references]
        return [caption_item(captions, self.prompt)] if captions else []

    def _text(self, record: Any, folder: Path) -> tuple[str, TextItem | None]:
        file = image_path(folder, value_of(record, self.image_column), key=self.image_column)
        if self.settings.tokenizer is None:
            return file, None
        if self.question_column is None:
            return file, caption_item(_texts(record, self.caption_column), self.prompt)
        answers = _texts(record, self.answer_column)
        question = text_of(record, self.question_column)
        return file, TextItem("vqa", question, answers[0], references=tuple(answers), generate=True)

    def _records(self, path: Path) -> Records:
        """Return the records of a file.

        Raises:
            DataError: It cannot be read, or lacks a column.
        """
        suffix = path.suffix.lower()
        if suffix in JSON:
            return read_json_lines(path)
        rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=SEPARATORS[suffix], strict=True)
        try:
            header = next(rows, [])
            numbered = [(rows.line_num, row) for row in rows if row]
        except csv.Error as error:
            raise DataError(f"{path}: line {rows.line_num} is not CSV ({error}); mend its quotes.") from error
        columns = [self.image_column]
        if self.settings.tokenizer is not None:
            columns += [self.question_column, self.answer_column] if self.question_column else [self.caption_column]
        for column in columns:
            if column not in header:
                raise DataError(
                    f"{path} has no column {column!r}, only {', '.join(header) or 'none'}; set image_column, "
                    "caption_column, question_column or answer_column to the names in its first line."
                )
        values = [_record(row, header) for _, row in numbered]
        return Records(values, numbers=[number for number, _ in numbered], form="Line {}")

    def _listed(self, folder: Path) -> Records:
        """Return a record for each image below a folder, with the text of the file beside it, if there is one.

        Raises:
            ConfigError: Questions are asked of a folder.
        """
        if self.question_column is not None:
            raise ConfigError(
                f"ImageTable: question_column={self.question_column!r} needs a file with that column, but '{folder}' "
                "is a folder; name a .csv or .jsonl file."
            )
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
        records = []
        for file in files:
            record: dict[str, Any] = {self.image_column: file.relative_to(folder).as_posix()}
            beside = file.with_suffix(".txt")
            if beside.is_file():
                record[self.caption_column] = read_text(beside)
            records.append(record)
        return Records(records, form="Image [{}]")


def _record(row: list[str], header: list[str]) -> dict[str, str] | BrokenRecordError:
    if len(row) != len(header):
        return BrokenRecordError(f"it has {len(row)} columns, but the first line names {len(header)}")
    return dict(zip(header, row, strict=True))


def _texts(record: Any, key: str) -> list[str]:
    """Return the text, or the texts, under a key.

    Raises:
        BrokenRecordError: There is none.
    """
    value = value_of(record, key)
    if not isinstance(value, list) or not value:
        return [text_of(record, key)]
    return [text_of({key: text}, key) for text in value]

"""Records with named columns: an image, and a caption, a question with answers, or a class."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from visexpert.data.annotations import BrokenRecordError, kind_of, text_of, value_of
from visexpert.data.coco import caption_item
from visexpert.data.packing import IntArray
from visexpert.data.rows import RowData
from visexpert.data.samples import subset
from visexpert.data.source import CAPTION_PROMPT
from visexpert.errors import ConfigError, DataError
from visexpert.typed import typed
from visexpert.types import TextItem


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a record, and how a record is read.

    Args:
        image: Column with the image.
        caption: Column with a caption, or a list of them.
        question: Column with a question; None where there are captions.
        answer: Column with the answer to it, or a list of accepted answers.
        label: Column with the class of the image; None without classes.
        prompt: Prompt for a caption.
        with_text: Whether texts are read.
    """

    image: str
    caption: str
    question: str | None
    answer: str
    label: str | None
    prompt: str
    with_text: bool

    @property
    def read(self) -> dict[str, str]:
        """The columns that are read, by the setting that names them."""
        columns = {"image_column": self.image}
        if self.with_text and self.question is not None:
            columns |= {"question_column": self.question, "answer_column": self.answer}
        elif self.with_text:
            columns["caption_column"] = self.caption
        return columns if self.label is None else columns | {"label_column": self.label}

    def check(self, present: Collection[str], *, where: object) -> None:
        """Check that all columns to be read are there.

        Raises:
            DataError: One is not.
        """
        for setting, column in self.read.items():
            if column not in present:
                names = ", ".join(present) or "none"
                raise DataError(f"{where} has no column {column!r}, only {names}; set {setting} to one of them.")

    def item_of(self, record: Any) -> TextItem | None:
        """Return the text of a record; None without texts.

        Raises:
            BrokenRecordError: It has none.
        """
        if not self.with_text:
            return None
        if self.question is None:
            return caption_item(texts_of(record, self.caption), self.prompt)
        return question_item(record, self.question, self.answer)

    def label_of(self, record: Any) -> str:
        """Return the class of a record; empty without classes.

        Raises:
            BrokenRecordError: It has none.
        """
        if self.label is None:
            return ""
        value = value_of(record, self.label)
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise BrokenRecordError(f"{self.label} is {kind_of(value)}, but must be the name of a class")
        return str(value).strip()


@typed
class ColumnData(RowData):
    """Images of your own whose records have columns; the base of tables, folders and Hugging Face data sets.

    Args:
        train: What to train on, as the class says: a file, folder or split.
        val: The same for validation; null for none.
        test: The same for the test; null for none.
        image_column: Column with the image, or the name of its file.
        caption_column: Column with a caption, or a list of them.
        question_column: Column with a question, where the data has questions instead of captions; null for captions.
        answer_column: Column with its answer, or a list of accepted answers.
        label_column: Column with the class of the image, for probes; null for none.
        prompt: Prompt for a caption.
        val_share: Share of the training images to hold out for validation, in (0, 1), drawn by ``seed``; null for none.
        draw_answers: See :class:`~visexpert.data.rows.RowData`.
        kwargs: See :class:`~visexpert.data.rows.RowData`. Without a ``tokenizer`` images are read without texts.

    Raises:
        ConfigError: ``val_share`` is out of range, or there are two validation parts.
    """

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        question_column: str | None = None,
        answer_column: str = "answer",
        label_column: str | None = None,
        prompt: str = CAPTION_PROMPT,
        val_share: float | None = None,
        draw_answers: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(draw_answers=draw_answers, **kwargs)
        check_val_share(val_share, has_val=val is not None)
        self._columns = Columns(
            image=image_column,
            caption=caption_column,
            question=question_column,
            answer=answer_column,
            label=label_column,
            prompt=prompt,
            with_text=True,
        )
        self.prompt = prompt  # what a captioner asks with, too
        self.val_share = val_share
        given = {"train": train, "val": val if val_share is None else train, "test": test}
        self.named = {part: name for part, name in given.items() if name is not None}
        """What holds the images of each part."""
        self.parts = tuple(self.named)

    @property
    def columns(self) -> Columns:
        """The columns to read: texts only with a tokenizer, which :class:`~visexpert.data.MixedData` may bring."""
        return replace(self._columns, with_text=self.settings.tokenizer is not None)

    def rows_in_use(self, part: str, number: int) -> dict[str, IntArray]:
        """See :meth:`RowData.rows_in_use`; validation may be a share of the training part."""
        if self.val_share is None or part == "test":
            return super().rows_in_use(part, number)
        held_out = subset(number, share=self.val_share, most=None, seed=self.settings.seed)
        if len(held_out) == number:
            raise DataError(
                f"{self.called}: val_share={self.val_share:g} of {number} images leaves none to train on; lower it, or "
                "set val."
            )
        rest = np.setdiff1d(np.arange(number), held_out)
        return {"train": rest[self.used("train", len(rest))], "val": held_out[self.used("val", len(held_out))]}

    def check_labels(self, labels: Iterable[str], *, where: object) -> None:
        """Check that there are two classes or more, if classes are read.

        Raises:
            DataError: There is one.
        """
        found = set(labels) - {""}
        if len(found) == 1:
            raise DataError(
                f"{self.called}: all images of {where} are of the class {found.pop()!r}, but a probe needs two; "
                "add a class, or read no classes."
            )


def question_item(record: Any, question: str, answer: str) -> TextItem:
    """Return the question of a record with its accepted answers.

    Args:
        record: The record.
        question: Key of the question.
        answer: Key of the answer, or of a list of them.

    Raises:
        BrokenRecordError: It lacks one.
    """
    answers = texts_of(record, answer)
    return TextItem("vqa", text_of(record, question), answers[0], references=tuple(answers), generate=True)


def check_val_share(share: float | None, *, has_val: bool) -> None:
    """Check a share of the training part that is held out for validation.

    Raises:
        ConfigError: It is out of range, or there is a validation part already.
    """
    if share is None:
        return
    if not 0 < share < 1:
        raise ConfigError(f"val_share must be in (0, 1), got {share:g}; null holds nothing out.")
    if has_val:
        raise ConfigError(f"val_share={share:g} holds training images out, but val is set, too; set one of them.")


def texts_of(record: Any, key: str) -> list[str]:
    """Return the text, or the texts, under a key.

    Raises:
        BrokenRecordError: There is none.
    """
    value = value_of(record, key)
    if not isinstance(value, list) or not value:
        return [text_of(record, key)]
    return [text_of({key: text}, key) for text in value]

"""LLaVA's conversations: the 558k captions of the alignment stage and the mixture of 665k instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from visexpert.data.annotations import (
    BrokenRecordError,
    checked,
    collect,
    image_path,
    kind_of,
    list_of,
    read_json_list,
    value_of,
)
from visexpert.data.index import IndexRows, indexed
from visexpert.data.needs import Need
from visexpert.data.packing import BoolArray, IntArray
from visexpert.data.rows import RowData
from visexpert.data.samples import Sample, words_of
from visexpert.errors import ConfigError
from visexpert.typed import typed
from visexpert.types import TextItem

IMAGE_MARK = "<image>"

_SOURCES = {
    "blip_laion_cc_sbu_558k.json": ("https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain", "181 MB"),
    "llava_v1_5_mix665k.json": ("https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K", "1.03 GB"),
}
_ELSEWHERE = ("https://github.com/haotian-liu/LLaVA/blob/main/docs/Data.md", "size unknown")
_MARKS = (IMAGE_MARK, "<video>")
_OWN_KEYS = frozenset({"id", "image", "conversations", "model"})
_ROLES = {"human": "prompt", "user": "prompt", "gpt": "answer", "assistant": "answer"}


@typed
class LLaVAInstruct(RowData):
    """Conversations in LLaVA's JSON (arXiv 2304.08485, 2310.03744) with one or more turns, with or without an image.

    Every answer is trained on. ``<image>`` is removed from the prompts; ``template`` decides where the image goes:
    :class:`~visexpert.language.LlavaTemplate` with style ``plain`` for the alignment stage, with ``vicuna_v1`` or
    another one for instructions. LLaVA pads images (``resize: pad``).

    Args:
        annotations: JSON file under ``root``.
        images: Folder under ``root`` to which the file's image names are relative.
        group_by_length: Group conversations of similar length in a batch, either with images or text-only
            (LLaVA's ``group_by_modality_length``).
        num_val: Number of conversations at the end of the file to hold out for validation; null for none.
        kwargs: See :class:`~visexpert.data.rows.RowData`.
    """

    def __init__(
        self,
        *,
        annotations: str = "llava_v1_5_mix665k.json",
        images: str = ".",
        group_by_length: bool = True,
        num_val: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_val=num_val, **kwargs)
        self.annotations = self.root / annotations
        self.images = self.root / images
        self.group_by_length = group_by_length
        self.parts = ("train",) if num_val is None else ("train", "val")

    def needs(self, part: str) -> list[Need]:
        """List the conversations and the folder of their images."""
        url, size = _SOURCES.get(self.annotations.name, _ELSEWHERE)
        guide = "the list in https://github.com/haotian-liu/LLaVA#visual-instruction-tuning"
        if "558k" in self.annotations.name:
            guide = f"{url} (images.zip)"
        return [
            Need(self.annotations, "LLaVA's conversations", url, size),
            Need(self.images, "their images", guide, "27 GB for 558k; for mix665k COCO, GQA, OCR-VQA, TextVQA and VG"),
        ]

    def read(self, part: str) -> Iterable[Sample]:
        """Yield one sample per conversation."""
        records = read_json_list(self.annotations)
        start, stop = self._range(part, len(records))
        faults = self.faults(part, total=stop - start, shared=False)
        return collect(records.only(range(start, stop)), self._parse, path=self.annotations, faults=faults)

    def indexed(self, part: str) -> IndexRows | None:
        """Return the same samples from the index of the whole file."""
        kind = type(self)
        is_own = kind.read is LLaVAInstruct.read and kind._parse is LLaVAInstruct._parse  # a subclass may read more
        index = indexed(self.annotations, self._parse, {"images": str(self.images)}) if is_own else None
        if index is None:
            return None
        start, stop = self._range(part, len(index))
        index.tell(self.faults(part, total=stop - start, shared=False), start, stop)
        return IndexRows(index, index.usable(start, stop))

    def _range(self, part: str, records: int) -> tuple[int, int]:
        """Return the first record of a part, and the one after its last.

        Raises:
            ConfigError: Validation leaves none to train on.
        """
        held_out = self.settings.num_val or 0
        if held_out and held_out >= records:
            raise ConfigError(
                f"num_val is {held_out}, but {self.annotations} has {records} conversations, which leaves none to "
                f"train on; lower it to at most {records - 1}, or set it to null."
            )
        return (records - held_out, records) if part == "val" else (0, records - held_out)

    def order(self, part: str) -> Callable[[int], IntArray] | None:
        """Return the order of rows by epoch: shuffled, but grouped by modality and length."""
        if not self.group_by_length:
            return None
        table = self.table(part)
        if isinstance(table, IndexRows):
            lengths, has_image = table.lengths()
        else:
            samples = [(words_of(sample), bool(sample.image)) for sample in table]
            lengths = np.array([length for length, _ in samples], dtype=np.int64)
            has_image = np.array([image for _, image in samples])
        group = self.division().step_size
        seed = self.settings.order_seed
        return lambda epoch: grouped_order(lengths, has_image, group=group, seed=(seed, epoch))

    def _parse(self, record: Any) -> Sample:
        turns, lost = _turns(list_of(record, "conversations"))
        image = record.get("image")
        if image is None:
            _refuse_missing_image(record)
        file = "" if image is None else image_path(self.images, image, key="image")
        (prompt, answer), history = turns[-1], tuple(turns[:-1])
        item = TextItem("chat", prompt, answer, history=history)
        key = f"{self.annotations.name}:{record.get('id')}" + (f" {file}" if file else "")
        return Sample(key, file, (item,), tuple(lost))


def _turns(conversation: list[Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (prompt, answer) of each turn, and the reasons for leaving turns out.

    As in LLaVA's code, an answer before the first prompt is left out, and so are turns without an answer.
    """
    said = [(_role(message), _clean(value_of(message, "value", name="a message"))) for message in conversation]
    if said and said[0][0] == "answer":
        said = said[1:]
    said = said[: len(said) // 2 * 2]
    if not said or any(role != ("prompt", "answer")[index % 2] for index, (role, _) in enumerate(said)):
        raise BrokenRecordError("prompts and answers do not alternate")
    turns = [(said[index][1], said[index + 1][1]) for index in range(0, len(said), 2)]
    answered = [turn for turn in turns if turn[1]]
    if not answered:
        raise BrokenRecordError("an answer is empty")
    lost = [f"the answer of turn {number} is empty" for number, turn in enumerate(turns, 1) if not turn[1]]
    return answered, lost


def _refuse_missing_image(record: Any) -> None:
    """Check that a record that refers to an image or a video names it under 'image'.

    Raises:
        BrokenRecordError: It does not, and would be trained on as text about nothing.
    """
    mentioned = [mark for mark in _MARKS if any(mark in str(m.get("value")) for m in record["conversations"])]
    others = [key for key in record if key not in _OWN_KEYS and record[key] and _is_medium(key)]
    if mentioned or others:
        has = f"mentions {mentioned[0]}" if mentioned else f"has {others[0]!r}"
        lacks = "its 'image' is null" if "image" in record else "has no 'image'"
        raise BrokenRecordError(f"it {has}, but {lacks} (its keys are {', '.join(map(repr, record))})")


def _is_medium(key: Any) -> bool:
    return any(word in str(key).lower() for word in ("image", "img", "video", "picture", "photo", "pixel"))


def _role(message: Any) -> str:
    said_by = value_of(message, "from", name="a message")
    if not isinstance(said_by, str) or said_by not in _ROLES:
        raise BrokenRecordError(f"a message is from {kind_of(said_by)}, but must be one of {', '.join(_ROLES)}")
    return _ROLES[said_by]


def _clean(text: Any) -> str:
    if not isinstance(text, str):
        raise BrokenRecordError(f"a message is {kind_of(text)}, but must be text")
    return checked(text.replace(IMAGE_MARK, "").strip(), name="a message")


def grouped_order(
    lengths: IntArray, has_image: BoolArray, *, group: int, seed: Sequence[int], groups_sorted: int = 50
) -> IntArray:
    """Order rows as LLaVA does (``group_by_modality_length``): random, with little padding and one modality per step.

    The rows of each modality are shuffled, then sorted by length within stretches of ``groups_sorted`` groups. The
    groups of both modalities follow in random order, then the remaining rows of both.

    Args:
        lengths: int64 (rows,), length of each row's text in any unit.
        has_image: bool (rows,), whether each row has an image.
        group: Rows per optimizer step, over all processes.
        seed: Seed of the order.
        groups_sorted: Number of groups sorted together; more groups mean less padding and less randomness.
    """
    rng = np.random.default_rng(list(seed))
    groups: list[IntArray] = []
    rest: list[IntArray] = []
    for wanted in (True, False):
        rows = rng.permutation(np.flatnonzero(has_image == wanted))
        full = len(rows) // group * group
        rest.append(rows[full:])
        for start in range(0, full, group * groups_sorted):
            stretch = rows[start : min(start + group * groups_sorted, full)]
            stretch = stretch[np.argsort(-lengths[stretch], kind="stable")]
            groups += [rng.permutation(part) for part in np.split(stretch, len(stretch) // group)]
    ordered = [groups[index] for index in rng.permutation(len(groups))]
    return np.concatenate([*ordered, *rest])

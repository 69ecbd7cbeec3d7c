"""Tokenize text items, and pack the items of several images into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from visexpert.chat_jinja import MARK, READ, STRAY_ROLE, say, written
from visexpert.errors import ConfigError, DataError
from visexpert.types import IGNORE_INDEX, EncodedText, FrameTokens, TextBatch, TextEncoder, TextItem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_CHUNK = 4096
_NO_TURNS = (
    "A conversation of several turns needs a template; set it to visexpert.language.LlavaTemplate, or to "
    "visexpert.data.ChatPacker for the tokenizer's own."
)


class TextPacker(TextEncoder):
    """Turns text items into token ids: ``<bos> prompt answer <eos>``.

    Prompt and answer are tokenized as one text with a space between them, so that subword tokenizers see the same text
    as in generation; offsets mark the start of the answer.

    Args:
        tokenizer: A fast Hugging Face tokenizer. :class:`~visexpert.types.FrameTokens` says which tokens
            start and end an item; words such as ``<eos>`` in a text stay plain text.
        max_tokens: Maximum length of an item; a longer answer is truncated and then has no ``<eos>``. None for no
            limit.

    Raises:
        ConfigError: If the tokenizer is not a fast one or has no ``<eos>``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None) -> None:
        frame = FrameTokens.of(tokenizer, purpose="pack texts")
        if max_tokens is not None and max_tokens < 3:
            raise ConfigError(f"max_tokens is {max_tokens}, but must be at least 3; raise it or use null.")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.bos_id, self.eos_id, self.pad_id = frame.bos, frame.eos, frame.pad

    def prompt(self, question: str, *, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> list[int]:
        """``<bos> question``; see :meth:`TextEncoder.prompt`.

        Raises:
            ConfigError: There are earlier turns.
        """
        if history:
            raise ConfigError(_NO_TURNS)
        return [self.bos_id, *self._ids([question.strip()])["input_ids"][0]]

    def prompt_text(self, question: str, *, history: Sequence[tuple[str, str]] = (), has_image: bool = True) -> str:
        """``<image><bos>question``; see :meth:`TextEncoder.prompt_text`.

        Raises:
            ConfigError: There are earlier turns.
        """
        if history:
            raise ConfigError(_NO_TURNS)
        return MARK * has_image + written(self.tokenizer, self.bos_id) + question.strip()

    @property
    def chat_template(self) -> str:
        """See :attr:`TextEncoder.chat_template`; this template refuses earlier turns."""
        words = f"message['content'] | replace('{MARK}', '') | trim"
        return (
            f"{READ}{{% if ns.images %}}{say(MARK)}{{% endif %}}{say(written(self.tokenizer, self.bos_id))}"
            "{% for message in ns.messages %}{% if loop.index > 2 %}"
            "{{ raise_exception('The model was trained on one question at a time; leave earlier turns out.') }}"
            f"{{% elif message['role'] == 'user' %}}{{{{ {words} }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{say(' ')}{{{{ message['content'] | trim }}}}"
            f"{say(written(self.tokenizer, self.eos_id))}{{% else %}}{STRAY_ROLE}{{% endif %}}{{% endfor %}}"
        )

    def encode(self, item: TextItem, *, has_image: bool = True) -> EncodedText:
        """Tokenize one item; ``has_image`` makes no difference, because the image precedes all text.

        Raises:
            ConfigError: The item is a conversation.
            DataError: See :meth:`tokenize`.
        """
        if item.history:
            raise ConfigError(_NO_TURNS)
        ids, num_prompt = self.tokenize(item)
        return EncodedText(ids, np.arange(len(ids)) >= num_prompt)

    def tokenize(self, item: TextItem) -> tuple[IntArray, int]:
        """Tokenize one item.

        Args:
            item: The text.

        Returns:
            int64 ids (L,), and the number of leading ids (``<bos>`` and the prompt) that are not predicted.

        Raises:
            DataError: If the answer is empty, or the prompt leaves no room for it.
        """
        return self.tokenize_all([item])[0]

    def tokenize_all(self, items: Sequence[TextItem]) -> list[tuple[IntArray, int]]:
        """Tokenize many items as :meth:`tokenize` does; equal texts are tokenized once and share their array."""
        known: dict[tuple[str, str], tuple[IntArray, int]] = {}
        todo = list({(item.prompt, item.answer): item for item in items}.values())
        for start in range(0, len(todo), _CHUNK):
            chunk = todo[start : start + _CHUNK]
            texts = [_joined(item) for item in chunk]
            encoded = self._ids(texts)
            for item, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                known[item.prompt, item.answer] = self._finish(item, ids, offsets)
        return [known[item.prompt, item.answer] for item in items]

    def _ids(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)

    def _finish(self, item: TextItem, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[IntArray, int]:
        prompt_end = len(item.prompt.strip())
        num_prompt = 1 + sum(end <= prompt_end for _, end in offsets) if prompt_end else 1
        full = [self.bos_id, *ids, self.eos_id]
        if num_prompt == len(full) - 1:
            raise DataError(f"The answer of {item} has no tokens; correct the annotation or leave the item out.")
        if self.max_tokens is not None and len(full) > self.max_tokens:
            if num_prompt >= self.max_tokens:
                raise DataError(
                    f"The prompt of {item} takes {num_prompt} of max_tokens={self.max_tokens} and leaves no room for "
                    "the answer; raise max_tokens or shorten the prompt."
                )
            full = full[: self.max_tokens]
        return np.asarray(full, dtype=np.int64), num_prompt


def pack(rows: Sequence[Sequence[tuple[npt.ArrayLike, int]]], pad_id: int) -> TextBatch:
    """Pack the tokenized items of each image into one row.

    Args:
        rows: The items of each image as (ids, number of leading ids that are not predicted).
        pad_id: Id that pads short rows.

    Returns:
        The batch as :class:`~visexpert.types.TextBatch` describes it, N = the longest row (at least 1).
    """
    encoded = [[EncodedText(np.asarray(ids), np.arange(np.size(ids)) >= prompt) for ids, prompt in row] for row in rows]
    return pack_encoded(encoded, pad_id)


def pack_encoded(rows: Sequence[Sequence[EncodedText]], pad_id: int) -> TextBatch:
    """Pack the items of each image into one row, as :func:`pack` does, with any tokens supervised."""
    items = [item for row in rows for item in row]
    return pack_flat(
        flat_ids=np.concatenate([np.zeros(0, dtype=np.int64), *(item.ids for item in items)]),
        lengths=np.array([len(item.ids) for item in items], dtype=np.int64),
        supervised=np.concatenate([np.zeros(0, dtype=np.bool_), *(item.supervised for item in items)]),
        rows=np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
        num_rows=len(rows),
        pad_id=pad_id,
    )


def pack_flat(
    *, flat_ids: IntArray, lengths: IntArray, supervised: BoolArray, rows: IntArray, num_rows: int, pad_id: int
) -> TextBatch:
    """Pack items that lie end to end in one array, without a Python loop.

    Args:
        flat_ids: int64 ids of all items, one after another.
        lengths: int64 (I,) length of each item.
        supervised: bool, whether each id is predicted.
        rows: int64 (I,) image of each item, ascending.
        num_rows: Number of images.
        pad_id: Id that pads short rows.
    """
    starts = np.cumsum(lengths) - lengths
    item = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(flat_ids)) - starts[item]
    row = rows[item]
    row_lengths = np.bincount(row, minlength=num_rows)
    row_starts = np.cumsum(row_lengths) - row_lengths
    column = np.arange(len(flat_ids)) - row_starts[row]
    first_item = np.searchsorted(rows, np.arange(num_rows))
    N = max(int(row_lengths.max(initial=0)), 1)

    def filled(values: Any, padding: int) -> torch.Tensor:
        array_BN = np.full((num_rows, N), padding, dtype=np.int64)
        array_BN[row, column] = values
        return torch.from_numpy(array_BN)

    packed = TextBatch(
        ids_BN=filled(flat_ids, pad_id),
        labels_BN=filled(np.where(supervised, flat_ids, IGNORE_INDEX), IGNORE_INDEX),
        segments_BN=filled(item - first_item[row] + 1, 0),
        positions_BN=filled(position, 0),
    )
    _ = packed.facts  # computed here, in a worker, and not in the training loop
    return packed


def _joined(item: TextItem) -> str:
    answer = item.answer.strip()
    if not answer:
        raise DataError(f"The answer of {item} is empty; correct the annotation or leave the item out.")
    prompt = item.prompt.strip()
    return f"{prompt} {answer}" if prompt else answer

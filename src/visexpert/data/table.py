"""All texts of a split as flat arrays, so that picking and packing a batch's items takes no Python loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from visexpert.data.packing import IntArray, TextPacker, pack_flat
from visexpert.types import TextBatch, TextItem


class TextTable:
    """The tokenized texts of a split.

    Args:
        pools: Items of each row of the split.
        packer: Tokenizes them, once.
        mixture: How many items of each kind a row contributes to a batch, in the order in which they are packed. A
            row that has fewer of a kind contributes those it has.

    Attributes:
        num_tokens: Ids held in memory.
    """

    def __init__(self, pools: Sequence[Sequence[TextItem]], *, packer: TextPacker, mixture: Mapping[str, int]) -> None:
        codes = {kind: code for code, kind in enumerate(mixture)}
        self.items = [[item for item in pool if item.kind in codes] for pool in pools]
        flat = [item for pool in self.items for item in pool]
        tokenized = packer.tokenize_all(flat)
        self.pad_id = packer.pad_id
        self._packer = packer
        self._prompts: dict[str, tuple[int, ...]] = {}
        self.quota = np.array(list(mixture.values()), dtype=np.int64)
        self.codes = np.array([codes[item.kind] for item in flat], dtype=np.int64)
        self.prompts = np.array([prompt for _, prompt in tokenized], dtype=np.int64)
        self.lengths = np.array([len(ids) for ids, _ in tokenized], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        ids = [ids for ids, _ in tokenized]
        self.ids: npt.NDArray[np.int32] = (np.concatenate(ids) if ids else np.zeros(0)).astype(np.int32)
        self.row_lengths = np.array([len(pool) for pool in self.items], dtype=np.int64)
        self.row_starts = np.cumsum(self.row_lengths) - self.row_lengths

    @property
    def num_tokens(self) -> int:
        """Ids held in memory."""
        return len(self.ids)

    def select(self, rows: IntArray, order_key: tuple[int, int] | None) -> tuple[IntArray, IntArray]:
        """Pick the items of a batch.

        Args:
            rows: int64 (B,) rows of the split.
            order_key: (seed, epoch) of a random choice, which then depends on these and the row alone; None takes the
                first items of each kind.

        Returns:
            int64 indices of items into the table, and for each the place of its row in the batch, ascending. Items of
            a row come in the order of the mixture.
        """
        counts = self.row_lengths[rows]
        place = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        item = self.row_starts[rows][place] + within
        code = self.codes[item]
        rank_by = within.astype(np.uint64) if order_key is None else _hash(item, order_key)
        order = np.lexsort((rank_by, code, place))
        item, place, code = item[order], place[order], code[order]
        group = place * len(self.quota) + code
        rank = np.arange(len(group)) - np.searchsorted(group, group)
        kept = rank < self.quota[code]
        return item[kept], place[kept]

    def pack(self, item: IntArray, place: IntArray, num_rows: int) -> TextBatch:
        """Pack what :meth:`select` picked."""
        lengths = self.lengths[item]
        offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        flat = self.ids[np.repeat(self.starts[item], lengths) + offset].astype(np.int64)
        return pack_flat(
            flat_ids=flat,
            lengths=lengths,
            supervised=offset >= np.repeat(self.prompts[item], lengths),
            rows=place,
            num_rows=num_rows,
            pad_id=self.pad_id,
        )

    def strings(self, item: IntArray, place: IntArray, rows: IntArray) -> tuple[tuple[TextItem, ...], ...]:
        """Return the same items as strings, per row of the batch in segment order."""
        grouped: list[list[TextItem]] = [[] for _ in rows]
        for index, where in zip(item.tolist(), place.tolist(), strict=True):
            row = int(rows[where])
            grouped[where].append(self.items[row][index - int(self.row_starts[row])])
        return tuple(map(tuple, grouped))

    def prompts_of(self, items: Sequence[Sequence[TextItem]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return what the model reads before it answers each item; equal questions are tokenized once."""
        for question in {item.prompt for row in items for item in row} - self._prompts.keys():
            self._prompts[question] = tuple(self._packer.prompt(question))
        return tuple(tuple(self._prompts[item.prompt] for item in row) for row in items)


def _hash(item: IntArray, order_key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Mix item numbers with (seed, epoch) into pseudo-random keys (the finalizer of SplitMix64)."""
    state = np.random.SeedSequence([abs(part) for part in order_key]).generate_state(1, np.uint64)
    x = (item.astype(np.uint64) + state) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

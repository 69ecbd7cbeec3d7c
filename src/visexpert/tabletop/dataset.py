"""Build whole batches of the embedded world from memory-mapped renders and a table of tokenized texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visexpert.data.loader import BatchKey
from visexpert.data.packing import IntArray, TextPacker, pack_flat
from visexpert.tabletop.graph import SceneGraph
from visexpert.tabletop.world import COLOURS, MATERIALS, SHAPES, SIZES
from visexpert.types import Batch, TextBatch, TextItem

if TYPE_CHECKING:
    from visexpert.tabletop.cache import SplitCache


_ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "material": MATERIALS, "size": SIZES}


class TabletopDataset:
    """Builds a batch from a :class:`~visexpert.data.loader.BatchKey`; it has no state, so every worker builds the same.

    Args:
        cache: The rendered split.
        split: Name of the split, as carried by batches.
        num_rows: Number of rows in use, from the first.
        table: Texts of the rows; None for images without text.
        choice_seed: Seed of the random choice of texts, which then changes with the epoch; None uses the first ones.
        for_evaluation: Include texts as strings and scene graphs in batches.
        with_targets: Include the dense ground truth in batches: ``depth_BHW`` float32 (scene units), ``normals_B3HW``
            float32 (unit length), ``instance_BHW`` int64 (0 = table, k = the graph's k-th object from 1), ``edges_BHW``
            float32 (0 or 1), and ``colour_BHW``, ``shape_BHW``, ``material_BHW``, ``size_BHW`` int64 (index into the
            constants of ``world.py``, -1 = table).
    """

    def __init__(
        self,
        *,
        cache: SplitCache,
        split: str,
        num_rows: int,
        table: TextTable | None,
        choice_seed: int | None,
        for_evaluation: bool,
        with_targets: bool,
    ) -> None:
        self.cache = cache
        self.split = split
        self.num_rows = num_rows
        self.table = table
        self.choice_seed = choice_seed
        self.for_evaluation = for_evaluation
        self.classes = _class_table(cache.graphs[:num_rows]) if with_targets else None

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, key: BatchKey) -> Batch:
        rows = key.rows
        text: TextBatch | None = None
        items: tuple[tuple[TextItem, ...], ...] = ()
        prompts: tuple[tuple[tuple[int, ...], ...], ...] = ()
        if self.table is not None:
            chosen = self.table.select(rows, None if self.choice_seed is None else (self.choice_seed, key.epoch))
            text = self.table.pack(*chosen, num_rows=len(rows))
            if self.for_evaluation:
                items = self.table.strings(*chosen, rows=rows)
                prompts = self.table.prompts_of(items)
        return Batch(
            # A view: channels last in memory, as in the renders and as convolutions prefer.
            images_BCHW=torch.from_numpy(np.ascontiguousarray(self.cache.rgb[rows])).permute(0, 3, 1, 2),
            index_B=torch.from_numpy(rows.copy()),
            split=self.split,
            text=text,
            items=items,
            prompts=prompts,
            targets=self._targets(rows),
            truths=tuple(self.cache.graphs[row] for row in rows.tolist()) if self.for_evaluation else (),
        )

    def _targets(self, rows: IntArray) -> dict[str, Tensor]:
        if self.classes is None:
            return {}
        instance_BHW = self.cache.instance[rows].astype(np.int64)
        normals_BHW3 = self.cache.normals[rows]
        normals_B3HW = torch.from_numpy(np.ascontiguousarray(normals_BHW3.transpose(0, 3, 1, 2))).float()
        # Summed by hand: torch's norm over a dimension of three is fifty times slower.
        length_BHW = torch.sqrt(normals_B3HW[:, 0] ** 2 + normals_B3HW[:, 1] ** 2 + normals_B3HW[:, 2] ** 2)
        num_classes = next(iter(self.classes.values())).shape[1]
        flat_BHW = rows[:, None, None] * num_classes + instance_BHW
        return {
            "depth_BHW": torch.from_numpy(self.cache.depth[rows].astype(np.float32)),
            "normals_B3HW": normals_B3HW / length_BHW[:, None],
            "instance_BHW": torch.from_numpy(instance_BHW),
            "edges_BHW": torch.from_numpy(self.cache.edges[rows].astype(np.float32)),
            **{
                f"{name}_BHW": torch.from_numpy(classes_NO.reshape(-1).take(flat_BHW))
                for name, classes_NO in self.classes.items()
            },
        }


class TextTable:
    """The tokenized texts of a split.

    Args:
        pools: Items of each row of the split.
        packer: Tokenizes them.
        mixture: How many items of each kind a row contributes to a batch, in the order in which they are packed. A
            row with fewer items of a kind contributes all of them.

    Attributes:
        num_tokens: Number of ids held in memory.
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
        """Number of ids held in memory."""
        return len(self.ids)

    def select(self, rows: IntArray, order_key: tuple[int, int] | None) -> tuple[IntArray, IntArray]:
        """Choose the items of a batch.

        Args:
            rows: int64 (B,) rows of the split.
            order_key: (seed, epoch) of a random choice, which depends only on these and the row; None uses the first
                items of each kind.

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
        """Pack the items that :meth:`select` chose."""
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
        """Return the token ids that precede the answer to each item; equal questions are tokenized once."""
        for question in {item.prompt for row in items for item in row} - self._prompts.keys():
            self._prompts[question] = tuple(self._packer.prompt(question))
        return tuple(tuple(self._prompts[item.prompt] for item in row) for row in items)


class SplitImages:
    """The images of a rendered split, as the feature store reads them (:class:`~visexpert.types.ImageSource`).

    Args:
        cache: The rendered split.
    """

    def __init__(self, cache: SplitCache) -> None:
        self._cache = cache

    @property
    def fingerprint(self) -> str:
        """Identity of the pixels."""
        return self._cache.fingerprint

    def __len__(self) -> int:
        return len(self._cache)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return images (len(rows), 3, H, W), uint8."""
        return torch.from_numpy(np.ascontiguousarray(self._cache.rgb[list(rows)])).permute(0, 3, 1, 2)


def _class_table(graphs: Sequence[SceneGraph]) -> dict[str, IntArray]:
    """Return per attribute the class of each scene's instances, int64 (N, 1 + most objects), -1 for the table."""
    most = max((len(graph.objects) for graph in graphs), default=0)
    tables = {name: np.full((len(graphs), 1 + most), -1, dtype=np.int64) for name in _ATTRIBUTES}
    for row, graph in enumerate(graphs):
        for slot, node in enumerate(graph.objects, start=1):
            for name, values in _ATTRIBUTES.items():
                tables[name][row, slot] = values.index(getattr(node, name))
    return tables


def _hash(item: IntArray, order_key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Mix item numbers with (seed, epoch) into pseudo-random keys (the finalizer of SplitMix64)."""
    state = np.random.SeedSequence([abs(part) for part in order_key]).generate_state(1, np.uint64)
    x = (item.astype(np.uint64) + state) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""The text table against a plain Python account of what it should pick and pack."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from tests.tabletop.some_graphs import random_graphs
from visexpert.data.packing import TextPacker, pack
from visexpert.tabletop.dataset import TextTable
from visexpert.tabletop.texts import Pools, generate_pools, tabletop_tokenizer

MIXTURE = {"dense": 1, "vsr": 3, "vqa": 2, "pope": 1}
PACKER = TextPacker(tabletop_tokenizer())


@pytest.fixture(scope="module")
def pools() -> Pools:
    return generate_pools(random_graphs(50, seed=0), split="train", seed=0, progress=False)


@pytest.fixture(scope="module")
def table(pools: Pools) -> TextTable:
    return TextTable(pools, packer=PACKER, mixture=MIXTURE)


def test_without_a_choice_the_first_items_of_each_kind_are_packed(pools: Pools, table: TextTable) -> None:
    rows = np.array([7, 3, 49, 3])
    picked = table.select(rows, None)
    strings = table.strings(*picked, rows=rows)
    for row, items in zip(rows, strings, strict=True):
        expected = [item for kind, most in MIXTURE.items() for item in of_kind(pools, row, kind)[:most]]
        assert list(items) == expected
    reference = pack([[PACKER.tokenize(item) for item in items] for items in strings], PACKER.pad_id)
    packed = table.pack(*picked, num_rows=len(rows))
    for name in ("ids_BN", "labels_BN", "segments_BN", "positions_BN"):
        assert torch.equal(getattr(packed, name), getattr(reference, name))


def test_a_choice_depends_on_seed_epoch_and_row_alone(table: TextTable) -> None:
    def chosen(rows: list[int], key: tuple[int, int], row: int) -> list[int]:
        item, place = table.select(np.array(rows), key)
        return [int(index) for index in item[place == rows.index(row)]]

    assert chosen([1, 2, 3], (0, 0), 2) == chosen([2, 40], (0, 0), 2)
    assert any(chosen([row], (0, 0), row) != chosen([row], (0, 1), row) for row in range(5))
    assert any(chosen([row], (0, 0), row) != chosen([row], (1, 0), row) for row in range(5))


def test_a_choice_takes_different_items_of_the_row_as_many_as_asked(pools: Pools, table: TextTable) -> None:
    rows = np.arange(50)
    for epoch in range(3):
        strings = table.strings(*table.select(rows, (0, epoch)), rows=rows)
        for row, items in zip(rows, strings, strict=True):
            assert len(set(items)) == len(items)
            for kind, most in MIXTURE.items():
                number = sum(item.kind == kind for item in items)
                assert number == min(most, len(of_kind(pools, row, kind)))


def test_over_the_epochs_every_item_gets_its_turn(pools: Pools, table: TextTable) -> None:
    seen: Counter[int] = Counter()
    rows = np.array([11])
    for epoch in range(600):
        seen.update(table.select(rows, (0, epoch))[0].tolist())
    for kind, most in MIXTURE.items():
        size = len(of_kind(pools, 11, kind))
        expected = 600 * min(1.0, most / size)
        turns = [seen[k] for k in range(table.row_starts[11], table.row_starts[12]) if table_kind(table, k) == kind]
        assert len(turns) == size
        # Binomial: five standard deviations.
        assert all(abs(turn - expected) <= 5 * (expected * (1 - expected / 600)) ** 0.5 for turn in turns)


def test_only_the_kinds_of_the_mixture_are_kept(pools: Pools) -> None:
    table = TextTable(pools, packer=PACKER, mixture={"objects": 1})
    assert {item.kind for row in table.items for item in row} == {"objects"}
    assert table.num_tokens == sum(len(PACKER.tokenize(item)[0]) for row in table.items for item in row)


def of_kind(pools: Pools, row: int | np.integer[Any], kind: str) -> list[object]:
    return [item for item in pools[row] if item.kind == kind]


def table_kind(table: TextTable, index: int) -> str:
    return tuple(MIXTURE)[int(table.codes[index])]

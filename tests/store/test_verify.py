"""Verification: any flipped bit is found, in the shard that has it, and nothing else is called damaged."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.store.test_features import KEY, SMALL, batches, write
from visexpert.errors import DataError
from visexpert.store import StoreDtype, verify


def faults(root: Path) -> list[tuple[str, range]]:
    return [(str(found.path.relative_to(root)), found.rows) for found in verify(root) if found.fault is not None]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_any_flipped_bit_is_found(tmp_path: Path, dtype: StoreDtype) -> None:
    """In the tokens, the scales, the metadata and the spaces behind it, the length in front."""
    key = replace(KEY, dtype=dtype)
    for each in (key, replace(key, data="other")):
        write(tmp_path, each, batches(), filling=SMALL)
    assert len(list(verify(tmp_path))) > 3 and faults(tmp_path) == []
    paths = sorted((tmp_path / key.name).glob("shard-*"))
    whole = paths[1].read_bytes()
    places = [0, 7, 9, 30, 200, 1023, *range(1024, len(whole)), *random.Random(4).sample(range(8, 1024), 30)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        paths[1].write_bytes(content)
        ((name, rows),) = faults(tmp_path)
        assert name == f"{key.name}/shard-000001.safetensors" and rows.start > 0
    paths[1].write_bytes(whole[:-1])
    assert len(faults(tmp_path)) == 1
    paths[1].write_bytes(paths[0].read_bytes())
    assert len(faults(tmp_path)) == 1
    paths[1].write_bytes(whole)
    assert faults(tmp_path) == []


def test_rows_and_owner_are_named(tmp_path: Path) -> None:
    written = torch.cat(batches())
    write(tmp_path, KEY, [written], owner="Encoder 'depth'", filling=SMALL)
    found = list(verify(tmp_path))
    assert [each.rows for each in found] == [range(2), range(2, 4), range(4, 5)]
    assert {each.owner for each in found} == {"Encoder 'depth'"}


def test_what_is_not_made_yet_is_not_damaged(tmp_path: Path) -> None:
    write(tmp_path, KEY, batches(), filling=SMALL)
    next((tmp_path / KEY.name).glob("shard-*")).unlink()
    assert [each.fault for each in verify(tmp_path)] == [None, None]


def test_a_card_that_was_changed_is_refused(tmp_path: Path) -> None:
    write(tmp_path, KEY, batches())
    card = tmp_path / KEY.name / "card.json"
    text = card.read_text(encoding="utf-8")
    for changed in (text.replace('"rows": 5', '"rows": 6'), "{}", text[:40]):
        card.write_text(changed, encoding="utf-8")
        with pytest.raises(DataError, match="card.json"):
            list(verify(tmp_path))

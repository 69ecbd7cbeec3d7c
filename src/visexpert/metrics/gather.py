"""Gather what all processes have seen in one order, so that scores do not depend on their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Key: TypeAlias = tuple[str, int, int]
"""Split, row of the split, and how many times the row was seen before."""


def gathered(own: Item) -> list[Item]:
    """Gather the objects of all processes, rank by rank; every process must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    everything: list[Item] = [own] * dist.get_world_size()
    dist.all_gather_object(everything, own)
    return everything


def first_of_all(own: Mapping[Key, Item], limit: int | None) -> list[Item]:
    """Return the first ``limit`` items over all processes (None: all), in key order; no other items are sent.

    A row seen by two processes, such as one that pads the last batch, counts once.
    """
    keys = sorted({key for keys in gathered(list(own)) for key in keys})[:limit]
    wanted = set(keys)
    parts = gathered({key: item for key, item in own.items() if key in wanted})
    items = {key: item for part in parts for key, item in part.items()}
    return [items[key] for key in keys]


def key_of(known: Mapping[Key, object], split: str, row: int) -> Key:
    """Return a new key for a row, given the keys already in use."""
    times = 0
    while (split, row, times) in known:
        times += 1
    return split, row, times

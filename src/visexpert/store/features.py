"""Frozen tokens on disk: a folder of memory-mapped shards per (images, encoder), shared by all runs that need it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visexpert.errors import DataError
from visexpert.io.files import whole_file
from visexpert.io.reading import read_json
from visexpert.store.claims import claimed, remove_dead_parts
from visexpert.store.key import SHARD_MB, FeatureKey
from visexpert.store.packing import unpack
from visexpert.store.places import Place
from visexpert.store.shard import HEADER, Shard, fault_of, map_shard, shard_facts, shards_of, write_shard

log = logging.getLogger(__name__)

CARD = "card.json"

MAPPED = 1024
"""Shards mapped at a time: the kernel allows a process about 65,000 maps."""

EncodeRows = Callable[[range], Iterable[Tensor]]
"""Tokens (B, tokens, width) of some rows, in their order."""


@dataclass(frozen=True)
class Filling:
    """How a process takes part in filling a store.

    Args:
        shard_mb: Size of new shards, in millions of bytes.
        rank: Place of this process among those that fill the store together. Each begins with shards of its own, then
            helps the others.
        world: Number of these processes.
        waits: Whether to wait for shards that others are making.
        progress: Called with the number of stored images, whenever there are more.
    """

    shard_mb: float = SHARD_MB
    rank: int = 0
    world: int = 1
    waits: bool = True
    progress: Callable[[int], None] = lambda stored: None


class FeatureFile:
    """Tokens of all images of a split, read by row.

    Args:
        place: The store, which has all shards.
        key: Provenance.
        rows_per_shard: Images per shard.
    """

    def __init__(self, place: Place, key: FeatureKey, rows_per_shard: int) -> None:
        self.place, self.key, self._rows_per_shard = place, key, rows_per_shard
        self.shards = shards_of(key, rows_per_shard)
        self._mapped = lru_cache(maxsize=MAPPED)(self._map)

    def read(self, index_B: Tensor) -> Tensor:
        """Return tokens (B, tokens, width), float32, on the device of ``index_B``.

        Raises:
            IndexError: There is no such row.
            DataError: A shard is damaged.
        """
        rows_B = index_B.cpu().numpy()
        if len(rows_B) and not (0 <= rows_B.min() and rows_B.max() < self.key.rows):
            raise IndexError(f"rows {rows_B.tolist()} of a feature store of {self.key.rows} images")
        tokens_BSE = torch.empty(len(rows_B), self.key.tokens, self.key.width)
        numbers_B = rows_B // self._rows_per_shard
        for number in np.unique(numbers_B).tolist():
            here = np.flatnonzero(numbers_B == number)
            inside = torch.from_numpy(rows_B[here] - number * self._rows_per_shard)
            tokens_BSE[here] = unpack({name: stored[inside] for name, stored in self._mapped(number).items()})
        return tokens_BSE.to(index_B.device)

    def _map(self, number: int) -> dict[str, Tensor]:
        shard = self.shards[number]
        return map_shard(self.place.bring(self.key.name, shard.name), shard)


def open_features(root: Path | Place, key: FeatureKey) -> FeatureFile | None:
    """Open the tokens of ``key``; return None if some have not been stored yet.

    Raises:
        DataError: A file exists but does not match its key.
    """
    place = _placed(root)
    card = read_card(place, key)
    if card is None:
        return None
    file = FeatureFile(place, key, card["rows_per_shard"])
    sizes = place.sizes(key.name)
    for shard in file.shards:
        if shard.name in sizes and sizes[shard.name] != shard.num_bytes:
            raise DataError(
                f"The feature file {place}/{key.name}/{shard.name} is damaged (it has {sizes[shard.name]} bytes, "
                f"{shard.num_bytes} are needed); delete it to have it computed again."
            )
    return file if all(shard.name in sizes for shard in file.shards) else None


def stored_rows(root: Path | Place, key: FeatureKey) -> int:
    """Return how many images of ``key`` are stored."""
    place = _placed(root)
    card = read_card(place, key)
    shards = [] if card is None else shards_of(key, card["rows_per_shard"])
    there = place.sizes(key.name)
    return sum(len(shard.rows) for shard in shards if shard.name in there)


def write_features(
    root: Path | Place, key: FeatureKey, encode: EncodeRows, *, owner: str = "An encoder", filling: Filling = Filling()
) -> FeatureFile | None:
    """Store the tokens that are missing, and open them.

    A shard appears under its name when it is whole and on disk. A killed process loses the one that it was making; the
    others are not made again. Any number of processes may call this for one key: each shard is made by one of them.
    At a URL nothing can be locked: there each process makes the shards of its own rank and no others.
    Space for a shard is reserved before its first batch is computed.

    Args:
        root: Folder of the store, or its place.
        key: Provenance; gives the shape.
        encode: Computes the tokens of some rows.
        owner: Name of the encoder, for messages and for the card.
        filling: How this process takes part.

    Returns:
        The tokens; None if other processes still make some of them and ``filling.waits`` is false.

    Raises:
        DataError: The disk is full or cannot be written, the batches do not add up to the rows of a shard, or tokens
            do not fit ``key.dtype``.
    """
    place = _placed(root)
    root, folder = place.root, place.root / key.name
    setting = "store.cache" if place.is_remote else "store.folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_dead_parts(root)
        card = _card(place, key, filling, owner)
        shards = shards_of(key, card["rows_per_shard"])
        there = place.sizes(key.name)
        needed = sum(shard.num_bytes for shard in shards if shard.name not in there)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise DataError(f"The feature store cannot use {root} ({error}); set {setting} to another one.") from error
    try:
        if free < needed:
            raise _too_full(root, needed, f"{free / 1e6:.0f} MB are free")
        try:
            is_whole = _make_all(place, shards, encode, owner=owner, filling=filling)
            if is_whole and not (place.is_remote and filling.rank):
                finish_card(place, key)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _too_full(root, needed, f"cannot reserve them: {error.strerror}") from error
            raise DataError(
                f"The feature store in {root} cannot be written ({error}); set {setting} to another one."
            ) from error
    except BaseException:
        _remove_if_bare(folder)
        raise
    return open_features(place, key) if is_whole else None


def nearest(root: Path | Place, key: FeatureKey, owner: str) -> list[str]:
    """Return how the stored tokens that are most like those of a key differ from them; empty if none are of the owner.

    Args:
        root: Folder of the store, or its place.
        key: Provenance of the tokens that are looked for.
        owner: Name of their encoder in the card.
    """
    found = []
    place = _placed(root)
    for folder in place.folders():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            card = read_json(place.bring(folder, CARD))
            if (card["name"], card["role"]) == (owner, key.role):
                other = {name: (card[name], value) for name, value in key.fields().items() if card[name] != value}
                found.append([f"{_MEANING.get(name, name)} is {a}, not {b}" for name, (a, b) in other.items()])
    return min(found, key=len, default=[])


_MEANING = {
    "data": "the fingerprint of the images (files, crop, size)",
    "encoder": "the fingerprint of the encoder (weights, preprocessing, layer)",
    "rows": "the number of images",
}


def of_earlier_versions(root: Path) -> list[Path]:
    """Return token files of earlier versions, which had one file per key: nothing reads them anymore."""
    return [path.with_suffix(".npy") for path in sorted(root.glob("*.json")) if path.with_suffix(".npy").is_file()]


def _placed(root: Path | Place) -> Place:
    return root if isinstance(root, Place) else Place(root)


def _make_all(place: Place, shards: list[Shard], encode: EncodeRows, *, owner: str, filling: Filling) -> bool:
    """Make the shards that no other process makes; return whether all of them are there at the end."""
    has_told = False
    name = shards[0].key.name if shards else ""
    while missing := [shard for shard in shards if shard.name not in (there := place.sizes(name))]:
        missing.sort(key=lambda shard: ((shard.number - filling.rank) % filling.world, shard.number))
        if place.is_remote:  # nothing there can be locked
            missing = [shard for shard in missing if shard.number % filling.world == filling.rank]
        stored = sum(len(shard.rows) for shard in shards if shard.name in there)
        made = []
        for shard in missing:
            if _make(place, shard, shards, stored, encode, owner=owner, filling=filling):
                made.append(shard)
                stored += len(shard.rows)
        if made:
            continue
        if not filling.waits:
            return False
        if not has_told:
            log.info("Waiting for other processes, which store the rest of the tokens in %s.", place)
        has_told = True
        time.sleep(2.0 if place.is_remote else 0.2)
    filling.progress(sum(len(shard.rows) for shard in shards))
    return True


def _make(
    place: Place, shard: Shard, shards: list[Shard], stored: int, encode: EncodeRows, *, owner: str, filling: Filling
) -> bool:
    """Make one shard, unless it is there or another process is at it; return whether it was made here."""
    name = shard.key.name
    folder, target = place.root / name, place.root / name / shard.name
    if place.is_remote and target.exists():  # made before a kill, or left of a store that was removed
        if fault_of(target, shard) is None:
            place.put(name, shard.name)
            return True
        target.unlink(missing_ok=True)
    with claimed(folder / shard.part, target) as file:
        if file is None:
            return False
        if not place.is_remote:  # others may have made more
            there = place.sizes(name)
            stored = sum(len(other.rows) for other in shards if other.name in there)

        def batches() -> Iterable[Tensor]:
            done = stored
            for batch in encode(shard.rows):
                yield batch
                filling.progress(done := done + len(batch))

        write_shard(file, shard, batches(), owner=owner)
    place.put(name, shard.name)
    return True


def _card(place: Place, key: FeatureKey, filling: Filling, owner: str) -> dict[str, Any]:
    """Return the card of a folder; the first process writes it and so decides on the size of shards."""
    folder = place.root / key.name
    while True:
        if (card := read_card(place, key)) is not None:
            return card
        rows = key.rows_per_shard(filling.shard_mb)
        facts = {**key.fields(), "name": owner, "rows_per_shard": rows, "shards": len(shards_of(key, rows))}
        text = json.dumps({**facts, "bytes": key.num_bytes, "error": None}, indent=2)
        if place.is_remote:  # all ranks write the same
            with whole_file(folder / CARD) as part:
                part.write_text(text, encoding="utf-8")
            place.put(key.name, CARD)
            continue
        with claimed(folder / f".{CARD}.part", folder / CARD) as file:
            if file is not None:
                file.truncate(0)
                file.write(text.encode())
        time.sleep(0 if file is not None else 0.01)


def read_card(place: Place, key: FeatureKey) -> dict[str, Any] | None:
    """Return the card of a folder; None if there is none yet.

    Raises:
        DataError: It is damaged, or another key's.
    """
    folder = f"{place}/{key.name}"
    if CARD not in place.sizes(key.name):
        return None
    path = place.bring(key.name, CARD, anew=True)
    try:
        card = read_json(path)
        facts = {name: card[name] for name in (*key.fields(), "rows_per_shard")}
        if not isinstance(facts.pop("rows_per_shard"), int) or card["rows_per_shard"] < 1:
            raise ValueError(f"rows_per_shard is {card['rows_per_shard']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The card {path} is damaged ({error!r}); delete {folder} to have it computed again."
        ) from error
    wrong = [f"{name} is {facts[name]}, not {value}" for name, value in key.fields().items() if facts[name] != value]
    if wrong:
        raise DataError(f"The card {path} describes other tokens ({', '.join(wrong)}); delete {folder}.")
    found: dict[str, Any] = card
    return found


def finish_card(place: Place, key: FeatureKey) -> None:
    """Write the rounding error of all tokens into the card, relative to their root mean square, if it is not there.

    Args:
        place: The store, which has all shards of the key.
        key: Provenance.

    Raises:
        OSError: The card cannot be written.
    """
    card = read_card(place, key)
    if card is None or card.get("error") is not None:
        return
    facts = [
        shard_facts(place.head(key.name, shard.name, HEADER), f"{place}/{key.name}/{shard.name}")
        for shard in shards_of(key, card["rows_per_shard"])
    ]
    lost, size = (sum(float(each[name]) for each in facts) for name in ("lost", "size"))
    error = (lost / size) ** 0.5 if size else 0.0
    with whole_file(place.root / key.name / CARD) as part:
        part.write_text(json.dumps({**card, "error": error}, indent=2), encoding="utf-8")
    place.put(key.name, CARD)


def _remove_if_bare(folder: Path) -> None:
    """Remove a folder in which nothing but a card is left."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {CARD}:
            (folder / CARD).unlink(missing_ok=True)
            folder.rmdir()


def _too_full(root: Path, needed: int, found: str) -> DataError:
    return DataError(
        f"The feature store in {root} needs {needed / 1e6:.0f} MB, but {found}; free some space, or set "
        "store.folder to null to run the experts live."
    )

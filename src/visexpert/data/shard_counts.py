"""How many records each shard holds: from its maker's notes, or by reading its headers once."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from visexpert.data.shards import is_remote, split_member, told
from visexpert.errors import ConfigError, DataError
from visexpert.io.files import whole_file
from visexpert.io.reading import read_json
from visexpert.io.weights import cache_root


def shard_counts(shards: Sequence[str], *, sizes: Path | None) -> tuple[int, ...]:
    """Find out how many records each shard holds.

    In this order: ``sizes`` or a ``sizes.json`` beside the shard (webdataset's own convention, name to number), the
    ``_stats.json`` that img2dataset writes beside it (``successes``), or the shard's headers, whose count is kept in
    the cache. Shards behind a URL are not read for this.

    Args:
        shards: Paths or URLs.
        sizes: The file of numbers; None looks for one beside each shard.

    Raises:
        ConfigError: A remote shard is in no file of numbers.
        DataError: A shard is damaged or empty.
    """
    known: dict[Path, dict[str, Any]] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        counts = tuple(pool.map(lambda shard: _count(shard, sizes, known), shards))
    if not sum(counts):
        raise DataError(f"The shards {shards[0]} and on hold no records; check the pattern.")
    return counts


def _count(shard: str, sizes: Path | None, known: dict[Path, dict[str, Any]]) -> int:
    noted = _note_of(shard, sizes, known)
    if noted is not None:
        return noted[0]
    if is_remote(shard):
        raise ConfigError(
            f"How many records {shard} holds is not known, so it cannot be shared among processes; give a JSON file of "
            'names and numbers ({"00000.tar": 9812, ...}) as `sizes`.'
        )
    return _counted(Path(shard))


def wrong_notes(shards: Sequence[str], *, sizes: Path | None) -> list[str]:
    """Return a sentence for each shard here of which a file says another number of records than it holds.

    Raises:
        DataError: A shard is damaged.
    """
    known: dict[Path, dict[str, Any]] = {}
    wrong = []
    for shard in shards:
        noted = None if is_remote(shard) else _note_of(shard, sizes, known)
        if noted is not None and noted[0] != (held := _counted(Path(shard))):
            wrong.append(
                f"{noted[1]} says that {shard} holds {noted[0]} records, but it holds {held}; correct that file, or "
                "delete it to have them counted"
            )
    return wrong


def _note_of(shard: str, sizes: Path | None, known: dict[Path, dict[str, Any]]) -> tuple[int, Path] | None:
    """Return the number that a file says, and the file."""
    path = Path(shard)
    listed = sizes if sizes is not None else path.with_name("sizes.json")
    number = _noted(listed, known).get(shard.rsplit("/", 1)[-1])
    if number is None and not is_remote(shard):
        listed = path.with_name(f"{path.name.split('.')[0]}_stats.json")
        number = _noted(listed, known).get("successes")
    return None if number is None else (int(number), listed)


def _noted(path: Path, known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    if path not in known:
        try:
            content = read_json(path)
        except (OSError, ValueError):
            content = {}
        known[path] = content if isinstance(content, dict) else {}
    return known[path]


def _counted(path: Path) -> int:
    """Count the groups of files of one name, by headers alone; remembered by size and time of change."""
    try:
        facts = path.stat()
        content = os.fsencode(path.resolve()) + f"\0{facts.st_size}\0{facts.st_mtime_ns}".encode()
        note = cache_root() / "shards" / f"{hashlib.sha256(content).hexdigest()[:24]}.json"
        if note.is_file():
            return int(read_json(note))
        number = _groups(path)
        with whole_file(note) as part:
            part.write_text(json.dumps(number), encoding="utf-8")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(f"The shard {path} cannot be counted ({told(error)}); fetch it again.") from error
    return number


def _groups(path: Path) -> int:
    number, previous = 0, ""
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            named = split_member(member.name) if member.isreg() else None
            if named is None:
                continue
            number += named[0] != previous
            previous = named[0]
            tar.members = []  # type: ignore[attr-defined]
    return number

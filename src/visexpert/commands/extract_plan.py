"""``visexpert extract plan``: what a store will take, and what it saves."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from visexpert.commands.ending import Ending
from visexpert.commands.extraction import Extraction
from visexpert.experts import FeatureCache
from visexpert.names import EncoderName
from visexpert.planning.amount import division_of
from visexpert.planning.show import size as size_of
from visexpert.store import EncodeRows, FeatureKey, stored_rows

WARM, TIMED = 1, 3
"""Batches before the clock counts, and those that it counts."""


@dataclass(frozen=True)
class PlannedTokens:
    """Tokens of one encoder for one split.

    Args:
        encoder: Whose tokens.
        split: Of which images.
        images: Number of these images.
        stored: How many of them are stored already.
        bytes_per_image: Size of their tokens.
        seconds_per_image: Time to read and encode an image, by the median of a few batches.
    """

    encoder: str
    split: str
    images: int
    stored: int
    bytes_per_image: int
    seconds_per_image: float

    @property
    def missing_seconds(self) -> float:
        """Time to store what is missing, on one process like this one."""
        return (self.images - self.stored) * self.seconds_per_image


class PlanningCache(FeatureCache):
    """Times a few batches of what it should store, and stores nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.planned: list[PlannedTokens] = []

    def take(self, name: EncoderName, split: str, key: FeatureKey, encode: EncodeRows) -> None:
        """Note what would be stored."""
        size = min(self.batch_size, key.rows)
        seconds = []
        for turn in range(WARM + TIMED):
            start = turn * size % max(1, key.rows - size + 1)
            begun = time.perf_counter()
            for tokens in encode(range(start, start + size)):
                tokens.cpu()  # waits for the device
            seconds.append(time.perf_counter() - begun)
        self.planned.append(
            PlannedTokens(
                encoder=str(name),
                split=split,
                images=key.rows,
                stored=stored_rows(self.root, key),
                bytes_per_image=key.row_bytes,
                seconds_per_image=median(seconds[WARM:]) / size,
            )
        )


def plan(extraction: Extraction, *, as_json: bool) -> Ending:
    """Time the encoders and print what storing their tokens takes.

    Args:
        extraction: The configuration's model and images.
        as_json: Whether to print JSON.
    """
    opened = extraction.cache
    cache = PlanningCache(opened.root, dtype=opened.dtype, batch_size=opened.batch_size)
    extraction.use(cache)
    batch = division_of(extraction.data).batch_size
    if as_json:
        print(json.dumps(_as_json(cache, batch), indent=2))
    else:
        _show(cache, batch)
    store = ("--store", extraction.options.store) if extraction.options.store else ()
    return Ending("the plan above; no tokens were stored.", (("extract", *extraction.words, *store),), aside=as_json)


def _saved(cache: PlanningCache) -> tuple[float, int]:
    """Return the seconds of encoding that a training image costs without a store, and the number of these images."""
    training = [each for each in cache.planned if each.split.split("/")[-1].startswith("train")]
    images = {each.split: each.images for each in training}
    seconds = sum(each.seconds_per_image * each.images for each in training)
    return seconds / max(1, sum(images.values())), sum(images.values())


def _as_json(cache: PlanningCache, batch: int) -> dict[str, Any]:
    per_image, images = _saved(cache)
    return {
        "folder": str(cache.root),
        "dtype": cache.dtype,
        "tokens": [asdict(each) for each in cache.planned],
        "bytes": sum(each.images * each.bytes_per_image for each in cache.planned),
        "seconds": sum(each.missing_seconds for each in cache.planned),
        "saved": {"seconds_per_step": per_image * batch, "batch_size": batch, "seconds_per_epoch": per_image * images},
    }


def _show(cache: PlanningCache, batch: int) -> None:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("encoder", no_wrap=True)
    table.add_column("split", no_wrap=True)
    for column in ("images", "stored", "per image", "in all", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in cache.planned:
        table.add_row(
            each.encoder,
            each.split,
            f"{each.images:,}",
            f"{each.stored:,}",
            size_of(each.bytes_per_image),
            size_of(each.images * each.bytes_per_image),
            _duration(each.missing_seconds),
        )
    facts = _as_json(cache, batch)
    console = Console()
    console.print(f"Tokens as {cache.dtype} in {cache.root}", highlight=False, soft_wrap=True)
    console.print(table)
    per_image = sum({each.encoder: each.bytes_per_image for each in cache.planned}.values())
    lines = [
        f"All together {size_of(per_image)} per image, {size_of(facts['bytes'])}; storing what is missing takes "
        f"{_duration(facts['seconds'])} on one process like this one.",
        f"Training then saves {facts['saved']['seconds_per_step']:.3f} s of encoding per batch of {batch} images and "
        f"{_duration(facts['saved']['seconds_per_epoch'])} per epoch, less the time to read the tokens.",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

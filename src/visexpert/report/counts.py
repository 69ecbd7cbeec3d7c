"""What scores of generated text stand on: the counts beside them in ``metrics.json``."""

from __future__ import annotations

from collections.abc import Mapping

_UNITS = {"images": "images", "answers": "answers written"}


def is_count(key: str) -> bool:
    """Whether a figure says on how many images or answers a score stands, such as ``test/caption/images_of``."""
    return key.rpartition("/")[2].removesuffix("_of") in _UNITS


def generated_counts(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """What generated scores stand on, by the part of the keys before their last names: ``500 of 5000 images``."""
    found: dict[str, str] = {}
    for name, total in metrics.items():
        part, _, last = name.rpartition("/")
        done = metrics.get(name.removesuffix("_of"))
        if is_count(name) and last.endswith("_of") and total is not None and done is not None:
            found[part] = f"{done:.0f} of {total:.0f} {_UNITS[last.removesuffix('_of')]}"
    return found

"""Which images a model knows, by the data of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TABLETOP = "TabletopData"
SCENES = "Tabletop's rendered scenes: spheres, cubes and cylinders on a table"


def training_sets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the data sets that a run trains on: their classes, those of a mixture one by one.

    Args:
        config: A run's ``config.yaml``; data that it does not name by class is left out.
    """
    data = config.get("data")
    if not isinstance(data, Mapping) or "class_path" not in data:
        return ()
    arguments = data.get("init_args") or {}
    sources = arguments.get("sources")
    if not isinstance(sources, Mapping):
        return (_class(data),)
    chosen = arguments.get("train") or sources
    return tuple(dict.fromkeys(_class(source) for name, source in sources.items() if name in chosen))


def known_images(sets: Sequence[str]) -> str:
    """Return which images a model knows that was trained on these data sets, in a few words; empty for no set."""
    return " and ".join(SCENES if name == TABLETOP else name for name in sets)


def warning_for(sets: Sequence[str]) -> str:
    """Return the sentences that a user should read before showing an image of their own; empty for no set."""
    if not sets:
        return ""
    if set(sets) == {TABLETOP}:
        return (
            f"This model knows only {SCENES}. It describes every other image, such as a photo, in the same words: it "
            "may call a portrait “a red sphere”."
        )
    return (
        f"This model was trained on {known_images(sets)}. Its answers to other kinds of images and questions may be "
        "wrong, however sure they sound."
    )


def _class(item: Any) -> str:
    return str(item["class_path"]).rpartition(".")[2] if isinstance(item, Mapping) and "class_path" in item else "?"

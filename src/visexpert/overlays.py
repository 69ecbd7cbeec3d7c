"""Configurations over configurations: settings of a class that another replaces, and overlays without a base."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import _typehints as parser_internals

from visexpert import shipped
from visexpert.errors import ConfigError
from visexpert.trust import may_import

log = logging.getLogger(__name__)


def are_related(first: str, second: str) -> bool:
    """Tell whether one of two classes is derived from the other, so that settings of one name mean the same.

    Args:
        first: Dotted path.
        second: Likewise.
    """
    one, other = load_path(first), load_path(second)
    return isinstance(one, type) and isinstance(other, type) and (issubclass(one, other) or issubclass(other, one))


@contextmanager
def unrelated_settings_dropped() -> Iterator[None]:
    """Parse so that a class takes no settings over from an unrelated one that it replaces.

    jsonargparse keeps those whose names and types fit: COCO would be scored on the few images that LLaVA's data hold
    out, since both have a ``num_val``. What it would have kept is named in the log.
    """
    original: Any = parser_internals.discard_init_args_on_class_path_change
    if getattr(original, "drops_unrelated", False):  # parsers of subcommands and classes parse inside one another
        yield
        return
    said: dict[str, None] = {}

    def discard(parser_or_action: Any, prev_val: Any, value: Any) -> None:
        original(parser_or_action, prev_val, value)
        before, now = (str(part["class_path"]) if part else "" for part in (prev_val, value))
        if not prev_val or "init_args" not in prev_val or before == now or are_related(before, now):
            return
        settings, given = _entries(prev_val["init_args"]), _entries(value.get("init_args") or {})
        if left := {name: kept for name, kept in settings.items() if name not in given and kept is not None}:
            told = ", ".join(f"{name}={str(kept)[:40]}" for name, kept in left.items())
            said[f"{_name(now)} replaces {_name(before)}, whose settings are not taken over ({told})."] = None
        settings.clear()

    discard.drops_unrelated = True  # type: ignore[attr-defined]
    parser_internals.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        parser_internals.discard_init_args_on_class_path_change = original
    for sentence in said:  # a parser asks several times
        log.info("%s", sentence)


_STAND_INS = {"lightning.LightningModule": "model", "lightning.LightningDataModule": "data"}
"""Classes that settings are held against where none is named."""


class MissingBaseError(ConfigError):
    """No class is named for these parts of a configuration.

    Args:
        parts: ``model``, ``data`` or both.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__(f"No class is named for {' and '.join(parts)}; give a configuration that does: --config FILE.")
        self.parts = tuple(parts)

    def beside(self, files: Sequence[Path]) -> ConfigError:
        """The error where these files were given, with the base that the header of one of them names."""
        if not files:
            return self
        given = [shipped.shown(path) for path in files]
        names = f"{' and '.join(given)} {'name' if len(given) > 1 else 'names'} no class for {' and '.join(self.parts)}"
        layers = next((found for path in reversed(files) if (found := layers_of(path))), ["BASE"])
        kept = [path for path in files if not any(_is_same(path, layer) for layer in layers)]
        command = " ".join(f"--config {shipped.shown(path)}" for path in [*layers, *map(str, kept)])
        if len(given) > 1:
            return ConfigError(f"{names}, so they are overlays; give their base before them: {command}.")
        return ConfigError(f"{names}, so it is an overlay; give its base before it: {command}.")


def parts_without_class(report: str, classes: Sequence[str]) -> list[str]:
    """Which of ``model`` and ``data`` have no class by a report of jsonargparse.

    Args:
        report: The report.
        classes: Dotted paths of the classes that it speaks of, outermost first.
    """
    if classes:
        return [_STAND_INS[classes[-1]]] if classes[-1] in _STAND_INS else []
    required = re.search(r"following arguments are required: ([\w., ]+)", report)
    named = [] if required is None else [name.rpartition(".")[2].strip() for name in required[1].split(",")]
    return sorted(named) if named and set(named) <= set(_STAND_INS.values()) else []


def layers_of(overlay: Path) -> list[str]:
    """The files that the first command in an overlay's header gives up to it, itself included; empty without one.

    Paths in headers are from where ``configs/`` lies; those returned are named as the overlay is, or found by name.
    """
    for files in shipped.layers_of(overlay):
        for number, name in enumerate(files):
            for path in (str(overlay), str(overlay.resolve())):
                if number and path == name:
                    return files
                if number and path.endswith(name):
                    return [path.removesuffix(name) + each for each in files[: number + 1]]
    return []


def _is_same(one: Path, other: str) -> bool:
    try:
        return one.resolve() == shipped.find(other).resolve()
    except ConfigError:
        return False


def load_path(path: str) -> Any:
    """Whatever lies at a dotted path, or None where there is nothing or it may not be imported."""
    if not may_import(path):
        return None
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else import_module(name)
    except (ImportError, ValueError):
        return None


def _entries(settings: Any) -> dict[str, Any]:
    return settings if isinstance(settings, dict) else vars(settings)


def _name(path: str) -> str:
    return path.rpartition(".")[2]

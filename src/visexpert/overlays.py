"""What happens to settings where a later configuration names another class."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from jsonargparse import _typehints as parser_internals

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
            said[f"{_name(now)} takes the place of {_name(before)} and none of its settings ({told})."] = None
        settings.clear()

    discard.drops_unrelated = True  # type: ignore[attr-defined]
    parser_internals.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        parser_internals.discard_init_args_on_class_path_change = original
    for sentence in said:  # a parser asks several times
        log.info("%s", sentence)


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

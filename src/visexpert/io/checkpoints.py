"""Checkpoints of runs: choose the one to read, and read it without running its code."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visexpert.errors import WeightsError, first_line
from visexpert.io.reading import check_unpacked
from visexpert.io.sharded import is_sharded, read_facts, read_sharded

log = logging.getLogger(__name__)

FOLDER, LAST = "checkpoints", "last.ckpt"


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a file, or a folder written by FSDP or DeepSpeed; the content is not checked."""
    return path.is_file() or is_sharded(path)


def load_checkpoint(path: Path, *, owner: str) -> dict[str, Any]:
    """Read a Lightning checkpoint without running its code.

    Args:
        path: The file, or a folder written by FSDP or DeepSpeed (then without optimizer state).
        owner: Who asks, for the message.

    Returns:
        The checkpoint; ``state_dict`` holds tensors on the CPU by name.

    Raises:
        WeightsError: The checkpoint is missing, damaged, could run code, or holds no weights.
    """
    if not is_checkpoint(path):
        what = "is a folder, but not written by FSDP or DeepSpeed" if path.is_dir() else "does not exist"
        raise WeightsError(f"{owner}: the checkpoint {path} {what}; give the path of a run's .ckpt.")
    with _told(path, owner):
        checkpoint = read_sharded(path) if path.is_dir() else _read(path)
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise WeightsError(f"{owner}: {path} holds no state_dict with tensors by name; give a .ckpt file of a run.")
    return checkpoint


def checked_checkpoint(path: Path, *, owner: str) -> int:
    """Check a checkpoint without reading its weights.

    Returns:
        Number of optimizer steps.

    Raises:
        WeightsError: The checkpoint is missing, damaged, truncated, or not of a run.
    """
    if not is_checkpoint(path):
        load_checkpoint(path, owner=owner)
    with _told(path, owner):
        facts = read_facts(path) if path.is_dir() else _read(path, lazily=True)
    steps = facts.get("global_step")
    if not isinstance(steps, int) or (path.is_file() and not isinstance(facts.get("state_dict"), dict)):
        raise WeightsError(
            f"{owner}: {path} is not a checkpoint of a run: it has no global_step or no state_dict; give a .ckpt file "
            "written by `visexpert fit`."
        )
    return steps


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of a run with the most progress; warn if it is not simply ``last.ckpt``.

    A run killed between two files has ``step=N.ckpt`` beside an older ``last.ckpt``; earlier versions, used twice on
    one folder, left ``last-v1.ckpt``; a failing disk leaves unreadable files.

    Args:
        folder: ``RUN/checkpoints``.

    Returns:
        The newest readable checkpoint; None if there is none at all.

    Raises:
        WeightsError: There are checkpoints, but none can be read.
    """
    found = [path for path in folder.glob("*.ckpt") if is_checkpoint(path) and path.name != "training.ckpt"]
    found += [path for path in folder.glob(".*.ckpt.old") if is_checkpoint(path)]
    # Lightning writes last.ckpt after the step=N.ckpt of the same moment.
    found.sort(key=lambda path: (_changed(path), path.name.startswith("last")), reverse=True)
    unreadable: list[str] = []
    for path in _preferred(found):
        try:
            steps = checked_checkpoint(path, owner="The run")
        except WeightsError as error:
            unreadable.append(str(error))
            continue
        if unreadable:
            log.warning("%s Instead using %s, after %d steps.", unreadable[0], path, steps)
        elif path.name != LAST and (folder / LAST).exists():
            log.warning("%s is older than %s; using the latter, after %d steps.", folder / LAST, path.name, steps)
        return path
    if unreadable:
        raise WeightsError(unreadable[0])
    return None


def _preferred(found: list[Path]) -> list[Path]:
    """Put the newest ``last*.ckpt`` first, unless a later file has more steps, or cannot be read, which is told."""
    last = next((path for path in found if path.name.startswith("last")), None)
    if last is None:
        return found
    reached = _steps(last)
    later = [path for path in found[: found.index(last)] if not 0 <= _steps(path) <= reached]
    return [*later, last, *(path for path in found if path != last and path not in later)]


def _steps(path: Path) -> int:
    try:
        return checked_checkpoint(path, owner="The run")
    except WeightsError:
        return -1


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def _read(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    check_unpacked(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except RuntimeError as error:
        if not lazily or "mmap can only be used" not in str(error):
            raise
        loaded = torch.load(path, map_location="cpu", weights_only=True)  # the format of old versions
    return loaded if isinstance(loaded, dict) else {}


@contextmanager
def _told(path: Path, owner: str) -> Iterator[None]:
    """Turn any error of a reader into one sentence: damaged content can make it raise anything."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"{owner}: {path} was written by DeepSpeed and must be assembled by its own tool ({error}); run "
            "pip install 'visexpert[deepspeed]'."
        ) from error
    except Exception as error:
        raise WeightsError(
            f"{owner}: {path} cannot be read: it is damaged, truncated, from another program, or contains code "
            f"({_reason(error)}); give another checkpoint, or train again."
        ) from error


def _reason(error: Exception) -> str:
    """Return the reader's reason, without torch's advice to trust the file."""
    text = str(error).partition("WeightsUnpickler error:")[2].strip()
    return text.partition("\n")[0][:120] or first_line(error)[:120] or type(error).__name__

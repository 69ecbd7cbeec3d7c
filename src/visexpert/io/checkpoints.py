"""Checkpoints of runs: which one a command reads, and reading it without running code from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visexpert.errors import WeightsError, first_line
from visexpert.io.sharded import is_sharded, read_facts, read_sharded

log = logging.getLogger(__name__)

FOLDER, LAST = "checkpoints", "last.ckpt"


def is_checkpoint(path: Path) -> bool:
    """Whether a file, or a folder that FSDP or DeepSpeed wrote, lies there; what it holds is not looked at."""
    return path.is_file() or is_sharded(path)


def load_checkpoint(path: Path, *, owner: str) -> dict[str, Any]:
    """Read a Lightning checkpoint without running code from it.

    Args:
        path: The file, or the folder that FSDP or DeepSpeed wrote; the latter comes without the optimizer's state.
        owner: Who asks, for the message.

    Returns:
        With ``state_dict``: tensors on the CPU by name.

    Raises:
        WeightsError: It is missing, damaged, could run code, or holds no weights.
    """
    if not is_checkpoint(path):
        what = "is a folder that neither FSDP nor DeepSpeed wrote" if path.is_dir() else "does not exist"
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
    """Look into a checkpoint without reading its weights.

    Returns:
        Optimizer steps behind it.

    Raises:
        WeightsError: It is missing, damaged, cut off, or none of a run.
    """
    if not is_checkpoint(path):
        load_checkpoint(path, owner=owner)
    with _told(path, owner):
        facts = read_facts(path) if path.is_dir() else _read(path, lazily=True)
    steps = facts.get("global_step")
    if not isinstance(steps, int) or (path.is_file() and not isinstance(facts.get("state_dict"), dict)):
        raise WeightsError(
            f"{owner}: {path} is no checkpoint of a run: it has no global_step or no state_dict; give a .ckpt file "
            "that `visexpert fit` wrote."
        )
    return steps


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in which a run got furthest, and where it is not plainly ``last.ckpt``, say so.

    A run that was killed between two files has ``step=N.ckpt`` beside an older ``last.ckpt``; earlier versions, used
    twice on one folder, left ``last-v1.ckpt``; a disk that failed leaves what cannot be read.

    Args:
        folder: ``RUN/checkpoints``.

    Returns:
        The newest that is whole; None where there is none at all.

    Raises:
        WeightsError: There are some, none of which can be read.
    """
    found = [path for path in folder.glob("*.ckpt") if is_checkpoint(path) and path.name != "training.ckpt"]
    found += [path for path in folder.glob(".*.ckpt.old") if is_checkpoint(path)]
    # What Lightning calls last comes after the step=N.ckpt of the same moment.
    found.sort(key=lambda path: (_changed(path), path.name.startswith("last")), reverse=True)
    unreadable: list[str] = []
    for path in _preferred(found):
        try:
            steps = checked_checkpoint(path, owner="The run")
        except WeightsError as error:
            unreadable.append(str(error))
            continue
        if unreadable:
            log.warning("%s Taken instead: %s, after %d steps.", unreadable[0], path, steps)
        elif path.name != LAST and (folder / LAST).exists():
            log.warning("%s is older than %s, which is taken, after %d steps.", folder / LAST, path.name, steps)
        return path
    if unreadable:
        raise WeightsError(unreadable[0])
    return None


def _preferred(found: list[Path]) -> list[Path]:
    """Put the newest ``last*.ckpt`` first, unless a file of more steps was written later still."""
    last = next((path for path in found if path.name.startswith("last")), None)
    if last is None:
        return found
    later = [path for path in found[: found.index(last)] if _steps(path) > _steps(last)]
    return [*later, last, *(path for path in found if path != last and path not in later)]


def _steps(path: Path) -> int:
    try:
        return checked_checkpoint(path, owner="The run")
    except WeightsError:
        return -1


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def _read(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except RuntimeError as error:
        if not lazily or "mmap can only be used" not in str(error):
            raise
        loaded = torch.load(path, map_location="cpu", weights_only=True)  # the format of old versions
    return loaded if isinstance(loaded, dict) else {}


@contextmanager
def _told(path: Path, owner: str) -> Iterator[None]:
    """Turn whatever a reader raises into one sentence: damaged content can make it raise anything."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"{owner}: {path} was written by DeepSpeed, whose own tool must put it together ({error}); run "
            "`pip install deepspeed` here."
        ) from error
    except Exception as error:
        raise WeightsError(
            f"{owner}: {path} is no plain checkpoint: damaged, cut off, of another program, or with code in it "
            f"({_reason(error)}); give another, or train it again."
        ) from error


def _reason(error: Exception) -> str:
    """What the reader says, without torch's advice to trust the file."""
    text = str(error).partition("WeightsUnpickler error:")[2].strip()
    return text.partition("\n")[0][:120] or first_line(error)[:120] or type(error).__name__

"""A folder that a run was written into before, and how it is cleared for another one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from visexpert.errors import DataError
from visexpert.io.lock import hold

SIDECAR = "lmms.json"
"""File of a run's folder that says where the scores under ``lmms/`` come from."""

OWN = (
    "config*.yaml",
    "environment.json",
    "metrics*.csv",
    "metrics*.json",
    "figures",
    "checkpoints",
    "hpc_ckpt_*.ckpt",
    "predictions*.jsonl",
    "skipped*.jsonl",
    "not_finite*.jsonl",
    SIDECAR,
)
"""What a run writes, and what is stored of its scores."""

PHASE_FACTS = ("merge.json", "detachment.json")
"""A folder that holds one of these is that of a phase."""

PREVIOUS = "previous"


def holds_run(run: Path) -> bool:
    """Whether a folder holds weights or measurements of a run, finished or begun."""
    names = ("checkpoints/*.ckpt", "hpc_ckpt_*.ckpt", "metrics.csv", "metrics.json")
    return any(next(run.glob(name), None) is not None for name in names)


def set_run_aside(run: Path) -> Path:
    """Move all that a run wrote, phases included, to ``previous.1`` (or ``.2``, ...) in its folder; leave the rest.

    Returns:
        The new folder, a run of its own.

    Raises:
        ConfigError: Another process works on a phase of it.
        DataError: The folder cannot be written.
    """
    number = 1
    while (kept := run / f"{PREVIOUS}.{number}").exists():
        number += 1
    found = {path for name in OWN for path in run.glob(name)}
    phases = {path.parent for name in PHASE_FACTS for path in run.glob(f"*/{name}")}
    with ExitStack() as held:
        for phase in phases:
            held.enter_context(hold(run, phase.name))
        try:
            kept.mkdir()
            for path in sorted(found | phases):
                path.rename(kept / path.name)
        except OSError as error:
            raise DataError(f"Cannot move the earlier run to {kept} ({error.strerror}): name another.") from error
    return kept

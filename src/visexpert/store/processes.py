"""How many processes fill a store together, and which of them this one is."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import distributed

from visexpert.errors import ConfigError


def processes(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the rank of this process and the number of processes that a launcher started.

    Inside a process group its ranks count. Else these are understood: ``RANK`` and ``WORLD_SIZE``, which torchrun sets;
    the tasks of a Slurm step; and the jobs of a Slurm array, whose numbers need not begin at 0 nor be consecutive.
    Each job of an array may have ranks.

    Args:
        environment: Environment variables.

    Raises:
        ConfigError: A variable holds something else than a number, or a number out of range.
    """
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    job, jobs = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        least, step = _number(environment, "SLURM_ARRAY_TASK_MIN", 0), _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        jobs = _number(environment, "SLURM_ARRAY_TASK_COUNT", 1)
        job = (_number(environment, "SLURM_ARRAY_TASK_ID", 0) - least) // max(1, step) % jobs
    rank, world = 0, 1
    for rank_name, world_name in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank_name in environment and world_name in environment:
            rank, world = _number(environment, rank_name, 0), _number(environment, world_name, 1)
            if rank >= world:
                raise ConfigError(f"{rank_name} is {rank}, but {world_name} is {world}; it must be below it.")
            break
    return job * world + rank, jobs * world


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal() or (int(text) == 0 and name.endswith(("COUNT", "SIZE", "NTASKS"))):
        raise ConfigError(f"{name} is {text!r}, but must be a number; correct it, or unset it to run alone.")
    return int(text)

"""Ranks from the variables of torchrun and Slurm."""

from __future__ import annotations

import pytest

from visexpert.errors import ConfigError
from visexpert.store import processes


def array(task: int, *, least: int = 0, step: int = 1, count: int = 4) -> dict[str, str]:
    """What Slurm sets in a job of an array."""
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(least),
        "SLURM_ARRAY_TASK_STEP": str(step),
        "SLURM_ARRAY_TASK_COUNT": str(count),
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2)),
        (array(0), (0, 4)),
        (array(3), (3, 4)),
        (array(16, least=10, step=2), (3, 4)),  # --array=10-16:2
        ({**array(2), "RANK": "1", "WORLD_SIZE": "2"}, (5, 8)),
        ({"RANK": "1"}, (0, 1)),
    ],
)
def test_ranks(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert processes(environment) == expected


def test_the_jobs_of_an_array_take_different_places() -> None:
    """Of --array=1-7:3 and of --array=0-3, each with two ranks."""
    for tasks, least, step in (((1, 4, 7), 1, 3), (range(4), 0, 1)):
        environments = [array(task, least=least, step=step, count=len(tasks)) for task in tasks]
        ranks = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
        found = [processes({**job, **rank}) for job in environments for rank in ranks]
        assert sorted(found) == [(place, 2 * len(tasks)) for place in range(2 * len(tasks))]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, ("RANK is 2", "WORLD_SIZE is 2")),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ("RANK is '-1'",)),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ("WORLD_SIZE is '0'",)),
        ({**array(1), "SLURM_ARRAY_TASK_COUNT": "many"}, ("SLURM_ARRAY_TASK_COUNT is 'many'",)),
    ],
)
def test_what_cannot_be_is_refused(environment: dict[str, str], told: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        processes(environment)
    assert all(part in str(error.value) for part in told)

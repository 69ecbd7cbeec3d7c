"""``visexpert extract --engine ray``: tasks of Ray Data fill a store, on whatever cluster Ray runs on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from visexpert.commands.ending import Ending
from visexpert.errors import ConfigError, UserError, require_package

Part = Callable[[Sequence[str]], Ending | None]
"""Reads the command's arguments and makes shards of its rank; returns how the command ends if the store is whole."""


def fill_by_ray(part: Part, arguments: Sequence[str], *, workers: int | None) -> Ending:
    """Fill a store by tasks of Ray Data, one per rank; Ray starts a task again when its machine dies.

    A Ray that runs is used (``RAY_ADDRESS``, or ``ray start`` on this machine), else one is started here. A task has a
    GPU where the cluster has any, else a CPU.

    Args:
        part: What a task does.
        arguments: Arguments of the command, without those of the engine.
        workers: Number of tasks at a time; None for one per GPU, or per CPU.

    Raises:
        ConfigError: Ray is not installed, or has fewer GPUs or CPUs than ``workers``.
        UserError: What a task raised.
    """
    require_package("ray", extra="ray", what="visexpert extract --engine ray")
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False)
    try:
        unit = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        has = int(ray.cluster_resources().get(unit, 0))
        if workers is not None and workers > has:
            raise ConfigError(
                f"visexpert extract: --workers is {workers}, but Ray has {has} {unit}s; give at most {has}."
            )
        world = workers or max(1, has)
        settings = {"part": part, "arguments": list(arguments), "folder": str(Path.cwd())}
        # Where no task saw all shards, a last one looks for what is missing and finishes the cards.
        ending = _run(world, unit, settings) or _run(1, unit, settings)
    finally:
        if is_ours:
            ray.shutdown()
    assert ending is not None
    return ending


def _run(world: int, unit: str, settings: dict[str, Any]) -> Ending | None:
    """Run a task per rank; return how the command ends if one of them saw the whole store."""
    import ray

    needs = {"num_gpus": 1} if unit == "GPU" else {"num_cpus": 1}
    ranks = ray.data.range(world, override_num_blocks=world)
    tasks = ranks.map(_task, fn_kwargs={**settings, "world": world}, concurrency=world, **needs)
    endings = []
    for told in (json.loads(row["told"]) for row in tasks.take_all()):
        if "error" in told:
            kind = next((kind for kind in UserError.__subclasses__() if kind.__name__ == told["kind"]), UserError)
            raise kind(told["error"])
        endings += [Ending(**told)] if told else []
    return endings[0] if endings else None


def _task(row: dict[str, Any], *, part: Part, arguments: Sequence[str], folder: str, world: int) -> dict[str, str]:
    """Make the shards of one rank, in the folder of the command; a user's error is told, not retried."""
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.append(folder)  # experts of one's own, as on the command line
    sys.argv = ["visexpert", "extract", *arguments]  # in the place of Ray's own
    os.environ.update(RANK=str(row["id"]), WORLD_SIZE=str(world))
    try:
        ending = part(arguments)
    except UserError as error:
        return {"told": json.dumps({"kind": type(error).__name__, "error": str(error)})}
    told = {} if ending is None else {"made": ending.made, "then": [list(map(str, words)) for words in ending.then]}
    return {"told": json.dumps(told)}

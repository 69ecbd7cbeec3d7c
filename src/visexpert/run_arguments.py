"""Arguments that name a run: where its configuration and checkpoint lie, and what a command fills in from them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from visexpert import shipped
from visexpert.errors import ConfigError
from visexpert.io.checkpoints import FOLDER, LAST, is_checkpoint, newest_checkpoint

SCORING = ("validate", "test", "predict")
CHECKPOINT_WORDS = ("last", "best", "hpc", "registry")
"""What Lightning takes for ``--ckpt_path`` beside a file."""


def complete_from_run(arguments: list[str]) -> list[str]:
    """Fill in ``--run``, ``--config`` and ``--ckpt_path`` from RUN, for commands that score: ``test RUN ...``.

    Raises:
        ConfigError: RUN is given as ``--run``, as in version 0.1, is not a run, or has no such checkpoint.
    """
    checkpoint = option_of(arguments, "--ckpt_path")
    if checkpoint is not None and not _is_checkpoint(checkpoint):
        raise ConfigError(f"There is no checkpoint '{checkpoint}'; give a .ckpt file, or 'last' to continue a run.")
    if arguments[:1] == ["fit"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        raise ConfigError(
            f"visexpert fit: '{arguments[1]}' is not an option; name the folder to write by --run {arguments[1]}, and "
            "configurations by --config."
        )
    if not arguments or arguments[0] not in SCORING:
        return arguments
    arguments = _with_run_as_option(arguments)
    if arguments[0] != "predict" and option_of(arguments, "--verbose") is None:
        arguments = [*arguments, "--verbose", "false"]  # Lightning's own table beside RunFolder's
    run = option_of(arguments, "--run")
    overlays = option_of(arguments, "--config") or option_of(arguments, "-c")
    if run is None and not overlays and "--help" not in arguments:
        raise ConfigError(f"visexpert {arguments[0]} reads a run; name it first: visexpert {arguments[0]} RUN.")
    if run is None or (overlays and (checkpoint is not None or not (Path(run) / "config.yaml").is_file())):
        return arguments
    completed = [arguments[0], "--config", str(config_of(Path(run))), *arguments[1:]]
    if checkpoint is None:
        completed += ["--ckpt_path", str(checkpoint_of(Path(run)))]
    return completed


def _with_run_as_option(arguments: list[str]) -> list[str]:
    command, *others = arguments
    if (run := option_of(others, "--run")) is not None:
        raise ConfigError(f"{command}: --run is gone; name the run right after the command: visexpert {command} {run}.")
    if others and not others[0].startswith("-"):
        return [command, "--run", *others]
    return arguments


def config_of(run: Path) -> Path:
    """Return the configuration file of a run's folder.

    Raises:
        ConfigError: The folder is not a run.
    """
    config = run / "config.yaml"
    if not config.is_file():
        name = shipped.name_of(run)
        if name in shipped.names():
            raise ConfigError(f"'{run}' is a configuration, not a run yet; train it: visexpert fit --config {name}.")
        if run.is_file():
            raise ConfigError(f"'{run}' is a file; name the folder of its run, such as '{run.parent}'.")
        raise ConfigError(
            f"'{run}' is not a run: it has no config.yaml; give the folder that `visexpert fit --run` wrote."
        )
    return config


def last_checkpoint(run: Path) -> Path:
    """Return where a run keeps its newest weights, once it has some."""
    return run / "checkpoints" / "last.ckpt"


def checkpoint_of(run: Path) -> Path:
    """Return the newest whole checkpoint of a run's folder.

    Raises:
        ConfigError: There is none.
        WeightsError: None of them can be read.
    """
    newest = newest_checkpoint(run / FOLDER)
    if newest is None:
        raise ConfigError(
            f"The run '{run}' has no checkpoint {run / FOLDER / LAST}; let `visexpert fit --run {run}` finish first."
        )
    return newest


def _is_checkpoint(value: str) -> bool:
    return value in CHECKPOINT_WORDS or "://" in value or is_checkpoint(Path(value))


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Return the files that ``--config`` or ``-c`` names, in order."""
    named = [value for option, value in pairwise(arguments) if option in ("--config", "-c")]
    return [Path(value) for value in named + [each[9:] for each in arguments if each.startswith("--config=")]]


def option_of(arguments: list[str], name: str) -> str | None:
    """Return the value of an option, given as ``--name VALUE`` or ``--name=VALUE``; None if it is not given."""
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return None

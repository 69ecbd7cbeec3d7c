"""The commands in the headers of the files under configs/, what each makes, and what it goes on from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_configs import CONFIGS

Command = tuple[str, ...]

FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def header(name: str) -> list[str]:
    """The comment lines at the head of a file, without their mark."""
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line[1:].strip() for line in lines[:end]]


def commands_of(name: str) -> list[Command]:
    """Arguments of each command that has lines of its own, which go on after a backslash."""
    lines = "\n".join(header(name)).replace("\\\n", " ").splitlines()
    return [tuple(shlex.split(line, comments=True)[1:]) for line in lines if line.startswith("visexpert ")]


HEADERS = {name: commands for name in FILES if (commands := commands_of(name))}
COMMANDS = list(dict.fromkeys(command for commands in HEADERS.values() for command in commands))


def option(command: Command, name: str) -> str | None:
    """The value of an option that is given apart (``--run runs/x``)."""
    return command[command.index(name) + 1] if name in command else None


def files_of(command: Command) -> list[str]:
    """The files under configs/ that a command names."""
    return [
        value.removeprefix("configs/") for flag, value in zip(command, command[1:], strict=False) if flag == "--config"
    ]


def layered(command: Command, *keys: str) -> Any:
    """A setting as the files of a command have it, the last one first; an overlay may set it to null."""
    for name in reversed(files_of(command)):
        value = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                break
            value = value[key]
        else:
            return value
    return None


def made_by(command: Command) -> str | None:
    """The folder that a command makes."""
    if command[0] == "fit":
        return option(command, "--run") or str(layered(command, "run"))
    if command[0] in ("merge", "detach"):
        return f"{command[1]}/{option(command, '--name') or {'merge': 'merged', 'detach': 'detached'}[command[0]]}"
    return option(command, "--out")


def needed_by(command: Command) -> str | None:
    """The run that a command goes on from."""
    if command[0] != "fit":
        return option(command, "--run") or command[1]
    start = option(command, "--model.init_args.init_from") or layered(command, "model", "init_args", "init_from")
    return None if start is None else str(Path(start).parents[1])


MAKERS = {made: command for command in COMMANDS if (made := made_by(command)) is not None}

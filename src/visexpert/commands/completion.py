"""``visexpert completion SHELL``: a script that completes commands and options, written by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from visexpert.commands.catalog import COMMANDS
from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import require_package

SHELLS = ("bash", "zsh", "tcsh")

_PLACES = {
    "bash": 'add `eval "$(visexpert completion bash)"` to ~/.bashrc.',
    "zsh": "write it to ~/.zfunc/_visexpert, where ~/.zfunc is in fpath.",
    "tcsh": "write it to a file that ~/.tcshrc sources.",
}

EPILOG = """\
examples:
  eval "$(visexpert completion bash)"                                      in ~/.bashrc, or for this shell alone
  visexpert completion zsh > ~/.zfunc/_visexpert                           where ~/.zfunc is in fpath
"""


def run(arguments: list[str]) -> Ending:
    """Print the script.

    Raises:
        ConfigError: shtab is not installed.
    """
    shell = parser().parse_args(arguments).shell
    require_package("shtab", extra="completion", what="visexpert completion")
    import shtab

    print(shtab.complete(_all_commands(shtab.FILE), shell))
    return Ending(f"the script for {shell}; {_PLACES[shell]}", (("--help",),), aside=True, terminal_only=True)


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(prog="visexpert completion", description="Print a completion script for your shell.", epilog=EPILOG)
    parser.add_argument("shell", choices=SHELLS, help="your shell")
    return parser


def _all_commands(files: Mapping[str, object]) -> argparse.ArgumentParser:
    """Return one parser with every command below it.

    Args:
        files: What tells shtab that an option takes a file.
    """
    top = argparse.ArgumentParser(prog="visexpert")
    top.add_argument("--version", action="store_true", help="show the version")
    below = top.add_subparsers()
    for command in COMMANDS.values():
        made = command.make_parser()
        for action in made._actions:
            if action.type is Path or action.metavar in ("RUN", "YAML", "FOLDER", "CKPT"):
                action.complete = files  # type: ignore[attr-defined]
        below.add_parser(command.name, parents=[made], add_help=False, help=command.summary)
    return top

"""The command-line parser of our own commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from visexpert.errors import ConfigError
from visexpert.trust import HELP


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every command here does; keeps line breaks of descriptions.

    Options are spelled ``--snake_case`` and in full; a run that is read is the positional ``RUN``.

    Args:
        prog: ``visexpert COMMAND``.
        description: What the command does.
        epilog: Examples and notes.
        usage: Shown instead of what argparse makes of the arguments.
    """

    def __init__(self, *, prog: str, description: str, epilog: str = "", usage: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=(epilog.rstrip() + "\n" + HELP).lstrip("\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse spellings of earlier versions first: they would end in a less helpful sentence."""
        self._refuse_earlier([] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        hint = f"see {self.prog} --help."
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown and (near := get_close_matches(unknown[1], self._options(), n=2, cutoff=0.6)):
            hint = f"did you mean {' or '.join(near)}?"
        raise ConfigError(f"{self.prog}: {message}; {hint}")

    def _options(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _refuse_earlier(self, arguments: Sequence[str]) -> None:
        known = self._options()
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            snake = "--" + name[2:].replace("-", "_")
            if name.startswith("--") and name not in known and snake in known:
                raise ConfigError(f"{self.prog}: {name} is spelled {snake} now.")
            if name == "--run" and name not in known and any(one.metavar == "RUN" for one in self._actions):
                raise ConfigError(
                    f"{self.prog}: {name} is gone; name the run without it: {self.format_usage()[7:].strip()}"
                )

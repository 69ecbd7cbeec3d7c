"""The command-line parser of our own commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from visexpert.errors import ConfigError
from visexpert.trust import HELP


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every command here does; keeps line breaks of descriptions."""

    def __init__(self, *, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog.rstrip() + "\n" + HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help.")

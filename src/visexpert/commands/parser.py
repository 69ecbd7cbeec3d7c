"""The command-line parser of our own commands."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from visexpert.commands.wrapping import wrapped
from visexpert.errors import ConfigError, did_you_mean, nearest
from visexpert.trust import HELP


class _Help(argparse.HelpFormatter):
    """Keeps the lines of descriptions and examples where they fit, and wraps them to the terminal where they do not."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrapped(text, width)

    def _format_usage(self, *given: Any) -> str:
        text = super()._format_usage(*given)
        width = self._width
        if all(len(line) <= width for line in text.splitlines()):
            return text
        lines = textwrap.wrap(
            " ".join(text.split()), width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
        )
        return "\n".join(lines) + "\n\n"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


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
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse spellings of earlier versions first: they would end in a less helpful sentence."""
        self._refuse_earlier([] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        unknown = re.search(r"unrecognized arguments: (--[\w.-]+)", message)
        near = nearest(unknown[1], [*self._options(), *self._options_below()]) if unknown else []
        raise ConfigError(f"{self.prog}: {message}; {did_you_mean(near) or f'see {self.prog} --help.'}")

    def refuse_abbreviations(self, others: Sequence[str]) -> None:
        """Refuse what :meth:`parse_known_args` left over for another parser, but begins like an option of this one.

        Raises:
            ConfigError: An argument abbreviates an option.
        """
        for name in (argument.partition("=")[0] for argument in others if argument.startswith("--")):
            if near := [each for each in self._options() if each.startswith(name)]:
                raise ConfigError(f"{self.prog}: there is no option '{name}'; {did_you_mean(near)}")

    def _options(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _options_below(self) -> list[str]:
        """Return the options of actions (``configs copy``), whose parsers leave to this one what they do not know."""
        parts = (each.choices.values() for each in self._actions if isinstance(each, argparse._SubParsersAction))
        return [name for parsers in parts for parser in parsers for name in parser._options()]

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

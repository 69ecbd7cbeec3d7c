"""How every command ends: what it made or found, and what to type next."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from visexpert.errors import next_step, shown


@dataclass(frozen=True)
class Ending:
    """The last lines of a command, and its exit code.

    Args:
        made: What it made or found, in words that follow "Done: ".
        then: Commands to type next, each the words after ``visexpert``.
        aside: Whether stdout holds what other programs read (JSON, a script), so that these lines go to stderr.
        terminal_only: Whether they are left out where stdout is no terminal, as for a script that a shell evaluates.
        code: Exit code.
    """

    made: str
    then: Sequence[Iterable[object]]
    aside: bool = field(default=False, kw_only=True)
    terminal_only: bool = field(default=False, kw_only=True)
    code: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.made or not self.then:
            raise ValueError("A command ends with what it made and with at least one command to type next.")

    def tell(self) -> None:
        """Print the lines, and exit where the code is not 0."""
        if not (self.terminal_only and not sys.stdout.isatty()):
            stream = sys.stderr if self.aside else sys.stdout
            print(f"Done: {shown(self.made)}\n{next_step(*self.then)}", file=stream, flush=True)
        if self.code:
            sys.exit(self.code)

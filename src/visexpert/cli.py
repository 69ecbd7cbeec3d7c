"""The command line: one light parser at the top, which imports a command when it is typed."""

from __future__ import annotations

import copy
import io
import logging
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers do not fork threads under our workers

from visexpert import trust
from visexpert.commands.catalog import find, overview
from visexpert.errors import UserError, shown, told_by_machine
from visexpert.interruption import Interrupted
from visexpert.noise import hide_noise
from visexpert.version import __version__

USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> None:
    """Run one command; a user's error, or the machine's, ends with one sentence and exit code 2.

    A signal that stops a run ends with one sentence and 128 plus its number: 130 for SIGINT, 143 for SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # experts of one's own lie beside the configuration; behind all that is installed
    _set_up_output()
    _quieten()
    try:
        _dispatch(arguments)
    except Interrupted as stopped:
        print(f"visexpert: {shown(stopped)}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:  # where nothing is stopped between two steps
        print(f"visexpert: {Interrupted(signal.SIGINT)}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read the output has enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        told = error if isinstance(error, UserError) else told_by_machine(error)
        if told is None or os.environ.get("VISEXPERT_TRACEBACK"):  # a defect of ours, or someone looks for one
            raise
        print(f"visexpert: {shown(told)}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


class ShownFormatter(logging.Formatter):
    """Escapes what a terminal could act on; a message's own lines stay, those inside a name do not."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a copy of the record."""
        record = copy.copy(record)
        if isinstance(record.args, tuple):
            record.args = tuple(shown(value) if isinstance(value, str | Path) else value for value in record.args)
        return "\n".join(map(shown, super().format(record).expandtabs().split("\n")))


def _set_up_output() -> None:
    """Let no name of a file break or command the terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(ShownFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that are no text in any encoding


def _dispatch(arguments: list[str]) -> None:
    arguments, granted = trust.take(arguments)
    trust.grant(granted)
    if not arguments:
        print(overview(), file=sys.stderr)
        sys.exit(USAGE_ERROR)
    if arguments[0] in ("-h", "--help"):
        print(overview())
        sys.exit()
    if arguments[0] == "--version":
        print(f"visexpert {__version__}")
        return
    find(arguments[0])(arguments[1:])


def _quieten() -> None:
    """Hide what a user can do nothing about; errors and other warnings of the same libraries are shown."""
    hide_noise()
    for name in ("httpx", "matplotlib", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    restoring = logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector")
    restoring.addFilter(_without_weights_only)


def _without_weights_only(record: logging.LogRecord) -> bool:
    """Drop Lightning's line on a default that is never reached: every checkpoint is read with weights_only."""
    return not (record.levelno <= logging.INFO and "`weights_only` was not set" in str(record.msg))


if __name__ == "__main__":
    main()

"""The commands of ``visexpert``: their names, groups and one-line summaries. Importing this imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from visexpert.commands.wrapping import wrapped
from visexpert.errors import ConfigError, did_you_mean, nearest

if TYPE_CHECKING:
    from visexpert.commands.ending import Ending
    from visexpert.commands.parser import Parser

BEFORE, TRAIN, AFTER, INSPECT = "Before training", "Train and score", "After training", "Use and inspect"


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: What is typed after ``visexpert``.
        group: Where ``visexpert --help`` lists it.
        summary: One line.
        module: Where it lies; imported when the command is typed.
        run: Function of that module that carries it out, given the arguments after the name, and returns how it ends;
            None where nothing was made, such as by a rehearsal.
        parser: Function of that module that makes its parser without importing anything heavy.
    """

    name: str
    group: str
    summary: str
    module: str
    run: str = "run"
    parser: str = "parser"

    def __call__(self, arguments: list[str]) -> None:
        """Carry the command out, then print what it made and what to type next."""
        ending: Ending | None = getattr(import_module(self.module), self.run)(arguments)
        if ending is not None:
            ending.tell()

    def make_parser(self) -> Parser:
        """Return its parser, for help and shell completion."""
        parser: Parser = getattr(import_module(self.module), self.parser)()
        return parser


def _trains(name: str, summary: str) -> Command:
    return Command(name, TRAIN, summary, "visexpert.commands.training", name, f"{name}_parser")


COMMANDS = {
    command.name: command
    for command in (
        Command("demo", BEFORE, "train and score CLIP alone against CLIP with experts, in minutes", "visexpert.demo"),
        Command(
            "configs", BEFORE, "list, show or copy the configurations that are shipped", "visexpert.commands.configs"
        ),
        Command("try", BEFORE, "check whether a model works here, and as what", "visexpert.commands.try_model"),
        Command("data", BEFORE, "check that a configuration's data is there", "visexpert.commands.data"),
        Command("plan", BEFORE, "estimate memory, disk and hours of a fit", "visexpert.commands.plan"),
        Command("extract", BEFORE, "store the tokens of frozen encoders on disk", "visexpert.commands.extract"),
        Command("import", BEFORE, "turn released MoVE-KD weights into a run", "visexpert.commands.import_weights"),
        _trains("fit", "train, then score on the test images"),
        _trains("validate", "score a run on its validation images"),
        _trains("test", "score a run on its test images"),
        _trains("predict", "write a run's captions and answers for its test images"),
        Command(
            "detach",
            AFTER,
            "drop the experts that are not worth their cost",
            "visexpert.commands.phases",
            "detach",
            "detach_parser",
        ),
        Command(
            "merge",
            AFTER,
            "merge the encoder and its experts into one plain encoder",
            "visexpert.commands.phases",
            "merge",
            "merge_parser",
        ),
        Command("export", AFTER, "write a run's encoder for transformers, timm, ONNX ...", "visexpert.commands.export"),
        Command("caption", INSPECT, "caption your own images, or ask about them", "visexpert.commands.caption"),
        Command("serve", INSPECT, "open a page in the browser to try a run", "visexpert.commands.serve"),
        Command("compare", INSPECT, "compare many runs on one page", "visexpert.commands.compare"),
        Command("score", INSPECT, "add what lmms-eval measured to a run", "visexpert.commands.score"),
        Command(
            "completion",
            INSPECT,
            "print a script that completes commands in your shell",
            "visexpert.commands.completion",
        ),
    )
}
"""Every command by its name, in the order in which help lists them."""


def find(name: str) -> Command:
    """Return the command of this name.

    Raises:
        ConfigError: There is none; the sentence names those that are close.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    if name.startswith("-"):
        raise ConfigError(f"'{name}' stands before any command; give the command first: visexpert COMMAND {name} ...")
    hint = did_you_mean(nearest(name, COMMANDS)) or f"there are {', '.join(COMMANDS)}."
    raise ConfigError(f"There is no command '{name}'; {hint}")


def overview() -> str:
    """Return what ``visexpert --help`` prints: every command, in groups, with one line each."""
    lines = [
        "usage: visexpert COMMAND ...",
        "",
        "Turn several frozen vision experts into one better vision encoder.",
    ]
    width = max(map(len, COMMANDS))
    for group in (BEFORE, TRAIN, AFTER, INSPECT):
        lines += ["", f"{group}:"]
        lines += [f"  {one.name:{width}}  {one.summary}" for one in COMMANDS.values() if one.group == group]
    return wrapped("\n".join([*lines, "", *_FOOT]), get_terminal_size().columns)


_FOOT = (
    "visexpert COMMAND --help   show the options of a command",
    "visexpert --version        show the version",
    "",
    "First time here? `visexpert demo` trains and scores two models in minutes.",
)

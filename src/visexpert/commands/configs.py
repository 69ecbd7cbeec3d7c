"""``visexpert configs list | show NAME | copy NAME DIR``: the configurations that are shipped."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from textwrap import shorten

from visexpert import shipped
from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, DataError
from visexpert.io.run_files import write_text

GROUPS = {
    "tove": "ToVE: train it",
    "tove/tabletop": "ToVE with other language models, over tove/tabletop",
    "tove/paper": "ToVE at the paper's scale",
    "tove/ablations": "ToVE, one thing changed each",
    "movekd": "MoVE-KD: train it",
    "movekd/llava": "MoVE-KD at the paper's scale",
    "movekd/ablations": "MoVE-KD, one thing changed each",
    "hybrid": "both methods together",
    "distill": "any encoder taught by images alone",
    "hubs": "experts, over a configuration at the paper's scale",
    "scales": "lengths of a run, over any configuration of the embedded world",
    "zoo": "what the shipped models were trained with",
}
"""Folders of the configurations, in the order in which they are listed, with what is in them."""

RUNS = "runs"
"""Folder of the runs that the shipped configurations write."""

EPILOG = """\
examples:
  visexpert configs list movekd
  visexpert configs show tove/tabletop
  visexpert configs copy tove/tabletop my-configs
  visexpert fit --config tove/tabletop --config tove/ablations/top1

Every --config takes such a name, or a file of your own; a file at that path comes first.
"""


def run(arguments: list[str]) -> Ending:
    """List, show or copy.

    Raises:
        ConfigError: There is no configuration of that name.
        DataError: A file is there already.
    """
    options = parser().parse_args(arguments)
    if options.action == "show":
        path = shipped.shipped(options.name)
        sys.stdout.write(path.read_text(encoding="utf-8"))
        return Ending(f"this is {path}", (("configs", "copy", options.name, "DIR"),), aside=True)
    if options.action == "copy":
        return _copy(shipped.name_of(options.name), options.folder, overwrite=options.overwrite)
    return _list(options.folder)


def copy(name: str, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Copy a configuration and those that the commands in its header use; they name the copies and runs of their own.

    ``run: runs/tove`` becomes ``run: runs/FOLDER/tove`` in the copies, wherever they mention it, so that their runs lie
    beside those of the shipped configurations.

    Args:
        name: Of a shipped configuration.
        folder: Where to; below it, files lie as they do in ``configs/``.
        overwrite: Whether files that are there are replaced.

    Returns:
        The copies, that of ``name`` first.

    Raises:
        ConfigError: There is no configuration of that name.
        DataError: A file is there already; nothing is copied.
    """
    names = shipped.companions(name)
    copies = {each: folder / f"{each}{shipped.SUFFIX}" for each in names}
    there = [path for path in copies.values() if path.exists()]
    if there and not overwrite:
        raise DataError(f"'{there[0]}' is there already; name another folder, or replace it by --overwrite.")
    texts = {each: shipped.shipped(each).read_text(encoding="utf-8") for each in names}
    runs = list(dict.fromkeys(run for each in names for run in _runs_of(each, names)))
    own = re.sub(r"[^\w.-]+", "-", folder.resolve().name) or "copies"
    for each, path in copies.items():
        write_text(path, _with_own_runs(_renamed(texts[each], copies), runs, own))
    return list(copies.values())


def _runs_of(name: str, copied: Sequence[str]) -> Iterator[str]:
    """Yield the runs that a configuration writes, by itself or by a command of its header that names copies alone."""
    path = shipped.shipped(name)
    yield from re.findall(r"^run: *([\w./-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    for words in shipped.commands_of(path):
        files = [shipped.name_of(shipped.shown(each)) for each in shipped.configs_in(words)]
        if files and set(files) <= set(copied):
            yield from (value for option, value in pairwise(words) if option == "--run")


def _with_own_runs(text: str, runs: Sequence[str], own: str) -> str:
    """Return a configuration whose runs, and what lies in them, are in a folder of their own."""
    if not runs:
        return text
    mention = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, sorted(runs, key=len, reverse=True)))})(?![\w])")
    return mention.sub(lambda found: f"{RUNS}/{own}/{found[0].removeprefix(f'{RUNS}/')}", text)


def _renamed(text: str, copies: dict[str, Path]) -> str:
    """A configuration whose comments name the copies."""

    def name(found: re.Match[str]) -> str:
        path = copies.get(found[1])
        return found[0] if path is None else shlex.quote(path.as_posix())

    lines = text.splitlines(keepends=True)
    mention = re.compile(rf"\b{shipped.FOLDER}/([\w./-]+){re.escape(shipped.SUFFIX)}\b")
    return "".join(mention.sub(name, line) if line.startswith("#") else line for line in lines)


def _copy(name: str, folder: Path, *, overwrite: bool) -> Ending:
    copies = copy(name, folder, overwrite=overwrite)
    for path in copies:
        print(path)
    made = f"{len(copies)} {'copy' if len(copies) == 1 else 'copies'} in {folder}, with runs of their own"
    told = (words for words in shipped.commands_of(copies[0]) if str(copies[0]) in shipped.configs_in(words))
    fits = (words[1:] for words in told if words[1] == "fit")
    layers = next((files for files in shipped.layers_of(copies[0]) if str(copies[0]) in files), [str(copies[0])])
    return Ending(made, (next(fits, ["fit", *(word for each in layers for word in ("--config", each))]),))


def _list(folder: str | None) -> Ending:
    """Print names and what they are for; on a terminal cut to its width."""
    asked = None if folder is None else shipped.name_of(folder).strip("/")
    names = [name for name in shipped.names() if asked is None or _lies_in(name, asked)]
    if not names:
        raise ConfigError(f"visexpert configs: there is no folder '{folder}'; use one of {', '.join(GROUPS)}.")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    column = max(map(len, names)) + 2
    groups = {key: list(group) for key, group in groupby(sorted(names, key=os.path.dirname), key=os.path.dirname)}
    for number, group in enumerate(key for key in GROUPS if key in groups):
        print(("\n" if number else "") + f"{group}/: {GROUPS[group]}")
        for name in groups[group]:
            summary = shipped.summary_of(shipped.shipped(name))
            print(f"  {name:{column}}" + shorten(summary, max(width - column - 2, 20), placeholder=" ..."))
    made = f"{len(names)} configurations, which --config takes by these names"
    return Ending(made, (("configs", "show", names[0]),), aside=True)


def _lies_in(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert configs",
        description="List, show or copy the configurations that are shipped.",
        epilog=EPILOG,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,show,copy}")
    listing = _action(actions, "list", "List names, with what each configuration is for.")
    listing.add_argument("folder", nargs="?", metavar="FOLDER", help=f"list this one alone: {', '.join(GROUPS)}")
    showing = _action(actions, "show", "Print a configuration.")
    showing.add_argument("name", metavar="NAME", help="such as tove/tabletop")
    copying = _action(actions, "copy", "Copy a configuration, and what the commands in its header use, to change it.")
    copying.add_argument("name", metavar="NAME", help="such as tove/tabletop")
    copying.add_argument("folder", type=Path, metavar="DIR", help="folder of the copies; made if it is not there")
    copying.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


def _action(actions: argparse._SubParsersAction[Parser], name: str, text: str) -> Parser:
    return actions.add_parser(
        name, prog=f"visexpert configs {name}", help=text[0].lower() + text[1:-1], description=text, epilog=""
    )

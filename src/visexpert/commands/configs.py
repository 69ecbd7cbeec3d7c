"""``visexpert configs list | show NAME | copy NAME DIR``: the configurations that are shipped."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from itertools import groupby
from pathlib import Path
from textwrap import shorten

from visexpert import shipped
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, DataError

GROUPS = {
    "tove": "ToVE: train it",
    "tove/tabletop": "ToVE with other language models, over tove/tabletop",
    "tove/paper": "ToVE at the paper's scale",
    "tove/ablations": "ToVE, one thing changed each",
    "movekd": "MoVE-KD: train it",
    "movekd/llava": "MoVE-KD at the paper's scale",
    "movekd/ablations": "MoVE-KD, one thing changed each",
    "hybrid": "both methods together",
    "hubs": "experts, over a configuration at the paper's scale",
    "scales": "lengths of a run, over any configuration of the embedded world",
    "zoo": "what the shipped models were trained with",
}
"""Folders of the configurations, in the order in which they are listed, with what is in them."""

EPILOG = """\
examples:
  visexpert configs list movekd
  visexpert configs show tove/tabletop
  visexpert configs copy tove/tabletop my-configs
  visexpert fit --config tove/tabletop --config tove/ablations/top1

Every --config takes such a name, or a file of your own; a file that is there comes first.
"""


def run(arguments: list[str]) -> None:
    """List, show or copy.

    Raises:
        ConfigError: There is no configuration of that name.
        DataError: A file is there already.
    """
    options = parser().parse_args(arguments)
    if options.action == "show":
        sys.stdout.write(shipped.shipped(options.name).read_text(encoding="utf-8"))
    elif options.action == "copy":
        _copy(shipped.name_of(options.name), options.folder, overwrite=options.overwrite)
    else:
        _list(options.folder)


def copy(name: str, folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Copy a configuration and those that the commands in its header use, which then name the copies.

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
    for each, path in copies.items():
        text = shipped.shipped(each).read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_renamed(text, copies), encoding="utf-8")
    return list(copies.values())


def _renamed(text: str, copies: dict[str, Path]) -> str:
    """A configuration whose comments name the copies."""

    def name(found: re.Match[str]) -> str:
        path = copies.get(found[1])
        return found[0] if path is None else shlex.quote(path.as_posix())

    lines = text.splitlines(keepends=True)
    mention = re.compile(rf"\b{shipped.FOLDER}/([\w./-]+){re.escape(shipped.SUFFIX)}\b")
    return "".join(mention.sub(name, line) if line.startswith("#") else line for line in lines)


def _copy(name: str, folder: Path, *, overwrite: bool) -> None:
    copies = copy(name, folder, overwrite=overwrite)
    for path in copies:
        print(path)
    layers = next((files for files in shipped.layers_of(copies[0]) if str(copies[0]) in files), [str(copies[0])])
    print("Next: visexpert fit " + " ".join(f"--config {shlex.quote(each)}" for each in layers))


def _list(folder: str | None) -> None:
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

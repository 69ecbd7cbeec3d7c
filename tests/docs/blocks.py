"""Fenced blocks of a page, and how each is run: Python is executed, files are written, commands go to the parser.

A block follows an HTML comment that says otherwise: ``<!-- not run: WHY -->``. A YAML or Python block that begins with
a comment of one file name is that file. Blocks of one page share a folder and Python's names.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visexpert.cli import main

FENCE = re.compile(r"(?:^<!-- not run: (?P<why>.+?) -->\n+)?^```(?P<kind>\w+)?\n(?P<text>.*?)^```$", re.M | re.S)
FILE = re.compile(r"# (?P<name>[\w./-]+\.(?:py|ya?ml|csv|jsonl|sh))$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        kind: Its language.
        text: What stands in it.
        line: Where, from 1.
        why_not: Why it is not run; None where it is.
    """

    kind: str
    text: str
    line: int
    why_not: str | None

    @property
    def file(self) -> str | None:
        """The file that it is, where its first line says so."""
        found = FILE.fullmatch(self.text.splitlines()[0]) if self.text.strip() else None
        return None if found is None else found["name"]

    @property
    def commands(self) -> list[list[str]]:
        """Commands of a shell block, one a line, continued lines joined, without comments."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["kind"] or "", found["text"], text.count("\n", 0, found.start("text")) + 1, found["why"])
        for found in FENCE.finditer(text)
    ]


def run_page(page: Path, smaller: Mapping[str, Sequence[str]]) -> int:
    """Run the blocks of a page in the working directory; return how many were.

    Args:
        page: The page.
        smaller: What is added to a command, by its name, so that it takes seconds.
    """
    names: dict[str, Any] = {"__name__": "page"}
    ran = 0
    for block in blocks_of(page):
        if block.why_not is not None or block.kind in ("", "text"):
            continue
        ran += 1
        try:
            _run(block, names, smaller)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}:{block.line}: {type(error).__name__}: {error}") from error
    return ran


def _run(block: Block, names: dict[str, Any], smaller: Mapping[str, Sequence[str]]) -> None:
    if block.file is not None:
        Path(block.file).parent.mkdir(parents=True, exist_ok=True)
        Path(block.file).write_text(block.text, encoding="utf-8")
    elif block.kind == "python":
        exec(compile(block.text, f"line {block.line}", "exec"), names)
    elif block.kind in ("bash", "sh", "console"):
        for command in block.commands:
            _call(command, smaller)
    else:
        raise ValueError(f"a block of {block.kind!r} is neither a file, Python nor a command; say why it is not run")


def _call(command: Sequence[str], smaller: Mapping[str, Sequence[str]]) -> None:
    """Call a command of ours; a fit is parsed, all it names is found, and its settings are printed."""
    program, name, *rest = command
    if program != "visexpert":
        raise ValueError(f"{program} is no command of ours; say why the block is not run")
    fits = name == "fit" and not any(word == "--help" or ".help" in word for word in rest)
    try:
        main([name, *rest, *smaller.get(name, ()), *(["--print_config"] if fits else [])])
    except SystemExit as end:  # of --help and --print_config
        if end.code not in (0, None):
            raise

"""Fenced blocks of a page, and what hides from them.

A YAML or Python block that begins with a comment of one file name is that file.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(?P<kind>\w+)?\n(?P<text>.*?)^```$", re.M | re.S)
FILE = re.compile(r"# (?P<name>[\w./-]+\.(?:py|ya?ml|csv|jsonl|sh))$")
ITEM = re.compile(r"[-*] |\d+\. ")
KINDS = ("bash", "python", "yaml", "text")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        kind: Its language.
        text: What stands in it.
        line: Where, from 1.
    """

    kind: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that it is, where its first line says so."""
        found = FILE.fullmatch(self.text.splitlines()[0]) if self.text.strip() else None
        return None if found is None else found["name"]

    @property
    def commands(self) -> list[list[str]]:
        """Commands of a shell block, one a line or joined by &&, continued lines joined, without comments."""
        joined = self.text.replace("\\\n", " ")
        lines = [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]
        return [part for words in lines for part in _parts(words)]


def _parts(words: list[str]) -> list[list[str]]:
    if "&&" not in words:
        return [words]
    cut = words.index("&&")
    return [words[:cut], *_parts(words[cut + 1 :])]


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["kind"] or "", found["text"], text.count("\n", 0, found.start("text")) + 1)
        for found in FENCE.finditer(text)
    ]


def hidden(page: Path) -> list[str]:
    """Return code that no runner would see: indented instead of fenced, or fenced in a language that nobody runs."""
    found = []
    prose, before, in_list = FENCE.sub("", page.read_text(encoding="utf-8")), "", False
    for line in prose.splitlines():
        if line and not line.startswith(" "):
            in_list = ITEM.match(line) is not None
        if line.startswith("    ") and line.strip() and not before and not in_list:
            found.append(f"indented: {line.strip()}")
        before = line.strip()
    return found + [f"line {block.line}: {block.kind!r}" for block in blocks_of(page) if block.kind not in KINDS]

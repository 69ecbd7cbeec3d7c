"""Help that fits the terminal: paragraphs flow, columns hang, commands go on behind a backslash."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

NARROWEST = 20
"""Columns below which nothing gets narrower."""


def wrapped(text: str, width: int) -> str:
    """Return a text of several paragraphs whose lines are at most ``width`` characters, but for words that are longer.

    Lines that fit stay as they are. Of the others, those that begin at the left flow on together; an indented one is
    ``NAME  TEXT``, whose text hangs below itself, or a command, which stays one that can be pasted.

    Args:
        text: Lines that end where the source ends them.
        width: Columns of the terminal.
    """
    width = max(width, NARROWEST)
    return "\n".join(line for block in _blocks(text.split("\n")) for line in _fitted(block, width))


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield paragraphs, single entries with the lines that go on with them, and empty lines."""
    block: list[str] = []
    for line in lines:
        indent, before = _indent(line), _indent(block[0]) if block else 0
        goes_on = bool(block and block[0].strip() and line.strip()) and (
            indent >= max(before + 8, _column(block[0]) or 0) if before else not indent
        )
        if block and not goes_on:
            yield block
            block = []
        block.append(line)
    yield block


def _fitted(block: list[str], width: int) -> list[str]:
    if all(len(line) <= width for line in block):
        return block
    first, indent = block[0], _indent(block[0])
    if not indent:
        return textwrap.wrap(" ".join(block), width, break_on_hyphens=False, break_long_words=False)
    if _is_command(first):
        return _command(first, indent, width)
    column = _column(first)
    if column is None:
        text = " ".join(line.strip() for line in block)
        return _wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))
    name, text = first[:column].rstrip(), " ".join([first[column:], *(line.strip() for line in block[1:])])
    if column <= width // 2 and len(name) < column and column + max(map(len, text.split())) <= width:
        return _wrap(text, width, initial_indent=name.ljust(column), subsequent_indent=" " * column)
    hanging = " " * (indent + 4)
    return [*_wrap(name.strip(), width, initial_indent=" " * indent, subsequent_indent=hanging)] + _wrap(
        text, width, initial_indent=hanging, subsequent_indent=hanging
    )


def _wrap(text: str, width: int, *, initial_indent: str, subsequent_indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=initial_indent,
        subsequent_indent=subsequent_indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _command(line: str, indent: int, width: int) -> list[str]:
    """Wrap a command where a shell lets it go on; what is said of it comes before it."""
    command, _, remark = re.sub(r"\s{2,}#?\s*", "\0", line.strip(), count=1).partition("\0")
    before = " " * indent + "# "
    told = [] if not remark else _wrap(remark, width, initial_indent=before, subsequent_indent=before)
    pieces = _wrap(command, width - 2, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))
    return [*told, *(f"{piece} \\" for piece in pieces[:-1]), pieces[-1]]


def _is_command(line: str) -> bool:
    return line.split()[0] in ("visexpert", "lmms-eval", "eval")


def _column(line: str) -> int | None:
    """Where the text behind a name begins: after two blanks."""
    found = re.match(r"\s*\S.*?\s{2,}(?=\S)", line)
    return found.end() if found else None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())

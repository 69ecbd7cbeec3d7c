"""A report as plain parts, from which both the page and the Markdown file are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: What it says.
        value: What it is sorted by; None sorts by the text.
        detail: A smaller second line.
        mark: Look: ``best``, ``better``, ``worse``, ``absent``, several with blanks between them, or none.
    """

    text: str
    value: float | None = None
    detail: str = ""
    mark: str = ""


ABSENT = Cell("–", mark="absent")
NOT_RECORDED = Cell("not recorded", mark="absent")


@dataclass(frozen=True)
class Table:
    """A table whose first column names what a row is about.

    Args:
        heading: Titles of the columns.
        rows: Cells.
        caption: What it shows, in a sentence or two.
        strong: Index of a highlighted row, such as the baseline.
        text_columns: Number of leading columns that hold words.
    """

    heading: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    strong: int | None = None
    text_columns: int = 1


@dataclass(frozen=True)
class Picture:
    """A PNG.

    Args:
        path: The file.
        title: What it is of.
        is_plot: A drawing on white, whose colors may follow the page; else a photograph.
    """

    path: Path
    title: str
    is_plot: bool = True


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Args:
        title: Its heading.
        text: Paragraphs.
        tables: Tables.
        pictures: Figures below each other.
        strips: Figures beside each other, by title of the strip.
        folded: Collapsed on the page.
        warning: Highlighted.
    """

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    strips: tuple[tuple[str, tuple[Picture, ...]], ...] = ()
    folded: bool = False
    warning: bool = False


@dataclass(frozen=True)
class Document:
    """A whole report.

    Args:
        title: Its headline.
        summary: Paragraphs below it.
        sections: Its parts.
    """

    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]


def cells(*texts: str) -> tuple[Cell, ...]:
    """Cells of words."""
    return tuple(Cell(text) for text in texts)


def markdown(document: Document, *, base: Path) -> str:
    """The report as Markdown; pictures that lie below ``base`` become links to them, others are left to the page."""
    parts = [f"# {_flat(document.title)}", *map(_flat, document.summary)]
    for section in document.sections:
        parts += [f"## {_flat(section.title)}", *map(_flat, section.text)]
        for table in section.tables:
            parts += [_flat(table.caption)] if table.caption else []
            parts.append(_markdown_table(table))
        for picture in section.pictures:
            if picture.path.is_relative_to(base):
                parts.append(f"![{_flat(picture.title)}]({picture.path.relative_to(base).as_posix()})")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---"] * table.text_columns + ["---:"] * (len(table.heading) - table.text_columns)
    rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
    if table.strong is not None:
        rows[table.strong][0] += " (baseline)"
    lines = [[_escaped(title) for title in table.heading], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_escaped(cell.text)}**" if "best" in cell.mark else _escaped(cell.text)
    return f"{text} {_escaped(cell.detail)}" if cell.detail else text


def _escaped(text: str) -> str:
    return _flat(text).replace("|", "\\|")


def _flat(text: str) -> str:
    """One line, without what Markdown would take for a tag."""
    return " ".join(text.split()).replace("<", "&lt;")


def rows_of(*rows: Sequence[Cell]) -> tuple[tuple[Cell, ...], ...]:
    """Rows as tuples."""
    return tuple(tuple(row) for row in rows)

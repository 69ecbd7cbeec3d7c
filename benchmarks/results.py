"""Print the results pages: rows in docs/results/NAME.json become tables in docs/results/NAME.md.

A page's script states its runs and the tables that show them. The JSON keeps one row per variant and seed with the
scores that the tables show, so that a page can be printed again without the runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.runs import Run
from visexpert.report import Column, ResultRow, describe_machine, markdown_table, read_rows, write_rows

OUT = Path("docs/results")
DIGITS = 7
"""Significant digits of a score in the JSON; tables show four at most."""

SCORES = [
    Column("test/nll/kind/dense", "dense NLL", better="min"),
    Column("test/vqa/accuracy", "VQA", digits=1, scale=100, better="max"),
    Column("test/vqa/family/distance", "distance", digits=1, scale=100, better="max"),
    Column("test/vqa/family/size", "size", digits=1, scale=100, better="max"),
    Column("test/vsr/accuracy", "VSR", digits=1, scale=100, better="max"),
    Column("test/vsr/family/depth", "VSR depth", digits=1, scale=100, better="max"),
    Column("test/pope/adversarial/accuracy", "POPE adv.", digits=1, scale=100, better="max"),
    Column("test/caption/relation", "caption relation", digits=1, scale=100, better="max"),
    Column("test/caption/cider", "CIDEr", digits=2, better="max"),
    Column("test/probe/object_depth", "probe object depth", digits=1, scale=100, better="max"),
    Column("test/probe/shape", "probe shape", digits=1, scale=100, better="max"),
]
COST = [
    Column("steps", digits=0),
    Column("parameters", "trained params (k)", digits=0, scale=1e-3),
    Column("cost/parameters_inference", "params at inference (k)", digits=0, scale=1e-3),
    Column("gflop", "vision GFLOP/image", digits=3),
    Column("images_per_s", "images/s (vision)", digits=0),
    Column("cost/train_seconds", "training s", digits=0),
]


@dataclass(frozen=True)
class Table:
    """A section of a page: the same rows under one or more lists of columns.

    Args:
        title: Heading.
        variants: Names of its rows, in order.
        parts: Lists of columns, each with a caption, which may be empty. Columns that no row has are left out.
        prefix: Prefix of the variants in the JSON, followed by a slash.
        after: Markdown below it.
    """

    title: str
    variants: Sequence[str]
    parts: Sequence[tuple[str, Sequence[Column]]]
    prefix: str = ""
    after: str = ""

    def names(self) -> list[str]:
        """Return the names of the variants in the JSON."""
        return [f"{self.prefix}/{variant}" if self.prefix else variant for variant in self.variants]

    def rows(self, rows: Iterable[ResultRow]) -> list[ResultRow]:
        """Return those of the rows that belong to this table, sorted and without the prefix."""
        own = dict(zip(self.names(), self.variants, strict=True))
        order = list(own)
        found = [row for row in rows if row.variant in own]
        found.sort(key=lambda row: (order.index(row.variant), row.seed))
        return [replace(row, variant=own[row.variant]) for row in found]

    def markdown(self, rows: Iterable[ResultRow]) -> list[str]:
        """Return the table's blocks of text; an empty list if it has no rows."""
        own = self.rows(rows)
        if not own:
            return []
        blocks = [f"## {self.title}\n"]
        for caption, columns in self.parts:
            blocks += [f"{caption}\n"] if caption else []
            blocks.append(markdown_table(own, present(columns, own)))
        return [*blocks, self.after] if self.after else blocks


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        name: Name of its files: NAME.json and NAME.md, with NAME.intro.md and NAME.notes.md around the tables.
        tables: Tables of the page.
        also: Keys of further scores to keep in the JSON, for another page.
        derive: Adds scores computed from others, for the tables only.
        derived: Keys of these.
    """

    name: str
    tables: Sequence[Table]
    also: Sequence[str] = ()
    derive: Callable[[Sequence[ResultRow]], list[ResultRow]] = list
    derived: Sequence[str] = ()

    def committed(self) -> list[ResultRow]:
        """Return the rows in the committed JSON."""
        path = OUT / f"{self.name}.json"
        return read_rows(path) if path.is_file() else []

    def write(
        self, new: Sequence[ResultRow], *, known: Sequence[ResultRow] | None = None, measured: bool = True
    ) -> None:
        """Write the JSON and the page.

        Args:
            new: Rows that replace known ones of the same variant and seed.
            known: Rows to keep; by default those in the JSON. Rows that no table lists are dropped.
            measured: Whether ``new`` was measured on this machine; if not, the page keeps the machine that it names.
        """
        kept = self.committed() if known is None else known
        latest = {(row.variant, row.seed): row for row in (*kept, *new)}
        order = [name for table in self.tables for name in table.names()]
        rows = [self._reduced(row) for row in latest.values() if row.variant in order]
        rows.sort(key=lambda row: (order.index(row.variant), row.seed))
        machine = describe_machine() if new and measured else self._machine()
        parts = [self._text("intro"), f"Machine: {machine}\n"]
        for table in self.tables:
            parts += table.markdown(self.derive(rows))
        parts.append(self._text("notes"))
        write_rows(OUT / f"{self.name}.json", rows)
        (OUT / f"{self.name}.md").write_text("\n".join(parts), encoding="utf-8")
        print(f"wrote {OUT / f'{self.name}.md'} from {len(rows)} runs")

    def _reduced(self, row: ResultRow) -> ResultRow:
        shown = {column.key for table in self.tables for _, columns in table.parts for column in columns} | {*self.also}
        scores = {key: _short(row.scores[key]) for key in sorted(shown - {*self.derived}) if key in row.scores}
        return replace(row, gflop=_short(row.gflop), images_per_s=_short(row.images_per_s), scores=scores)

    def _machine(self) -> str:
        page = OUT / f"{self.name}.md"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        found = re.search(r"^Machine: (.*)$", text, re.MULTILINE)
        return found[1] if found else describe_machine()

    def _text(self, part: str) -> str:
        return (OUT / f"{self.name}.{part}.md").read_text(encoding="utf-8")


def trial_table(
    heads: Sequence[str], trials: Iterable[tuple[Sequence[str], Run]], scores: Mapping[str, str]
) -> list[str]:
    """Return the lines of a table with one finished run per line: cells that name it, then its scores.

    Args:
        heads: Headings of the cells.
        trials: Cells and run of each line; unfinished runs are left out.
        scores: Headings by key of the run's metrics; a missing score is shown as a dash.
    """
    lines = [f"| {' | '.join([*heads, *scores.values()])} |", f"|{'---|' * len(heads)}{'---:|' * len(scores)}"]
    for cells, run in trials:
        if run.done:
            metrics = run.metrics()
            shown = [f"{metrics[key]:.3f}" if key in metrics else "–" for key in scores]
            lines.append(f"| {' | '.join([*cells, *shown])} |")
    return lines


def row_of(run: Run) -> ResultRow:
    """Return a finished run as a row of a page."""
    metrics = run.metrics()
    return ResultRow(
        variant=run.variant,
        seed=run.seed,
        steps=int(metrics["cost/steps"]),
        parameters=int(metrics["cost/parameters_trained"]),
        gflop=metrics["cost/gflop_vision"],
        images_per_s=metrics["cost/images_per_s"],
        scores={key: value for key, value in metrics.items() if key.startswith(("test/", "cost/"))},
    )


def present(columns: Sequence[Column], rows: Sequence[ResultRow]) -> list[Column]:
    """Return the columns that at least one row has: short runs, for instance, write no captions."""
    return [column for column in columns if any(row.value(column.key) is not None for row in rows)]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

"""The README's table out of docs/results: ``python -m benchmarks.readme_table`` prints it, ``--write`` puts it in."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import OUT
from visexpert.report import ResultRow, read_rows
from visexpert.report.compare.statistics import summarize

README = Path("README.md")
PLACE = re.compile(r"(<!-- table: [^\n]* -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
HEADER = ("encoder", "dense NLL ↓", "VQA ↑", "object depth ↑", "GFLOP")


@dataclass(frozen=True)
class Half:
    """Rows that were trained on equal terms.

    Args:
        title: Their terms, the heading of the first column.
        depth: Key of the probe of depth within objects.
        rows: Label, page and name of each row's variant in the page's JSON.
    """

    title: str
    depth: str
    rows: Sequence[tuple[str, str, str]]


TOVE, MERGE, MOVEKD = "tove-tabletop", "merge", "movekd-tabletop"
HALVES = (
    Half(
        "**ToVE: frozen encoders, 400 steps of 24 images**",
        "test/probe/object_depth",
        (
            ("CLIP only", TOVE, "grounded/CLIP only"),
            ("best single expert, no CLIP", TOVE, "grounded/semantic alone, no CLIP"),
            ("ToVE, five experts", TOVE, "grounded/all five experts"),
            ("plain average of the five", TOVE, "grounded/all, uniform average"),
            (
                "ToVE merged into one CLIP, 2,500 steps more",
                MERGE,
                "merged: tokens + text, ToVE's decoder trained along",
            ),
            ("control: the same CLIP by text alone", MERGE, "text only, ToVE's decoder trained along"),
        ),
    ),
    Half(
        "**MoVE-KD: one CLIP, 2,000 steps of 12 images**",
        "student/probe/object_depth",
        (
            ("fine-tuned by text alone", MOVEKD, "main/text only"),
            ("fine-tuned by text alone, 2,260 steps: equal time", MOVEKD, "main/text only, 2260 steps"),
            ("MoVE-KD, published form", MOVEKD, "main/KD + MoLE, published form"),
            ("MoVE-KD, `movekd/tabletop`", MOVEKD, "main/recipe, token weights by attention"),
        ),
    ),
)


def table(folder: Path = OUT) -> str:
    """Return the table as Markdown: mean ± half width of the 95 % interval.

    Args:
        folder: Where the pages' JSON files are.
    """
    lines = [_line(HEADER), "|---|" + "---:|" * (len(HEADER) - 1)]
    for half in HALVES:
        lines.append(_line((half.title, *[""] * (len(HEADER) - 1))))
        lines += [_line((label, *_cells(_rows(folder, page, variant), half))) for label, page, variant in half.rows]
    return "\n".join(lines) + "\n"


def _rows(folder: Path, page: str, variant: str) -> list[ResultRow]:
    found = [row for row in read_rows(folder / f"{page}.json") if row.variant == variant]
    if len(found) < 2:
        raise ValueError(f"{page}.json has {len(found)} seeds of {variant!r}, but an interval needs two")
    return found


def _cells(rows: Sequence[ResultRow], half: Half) -> list[str]:
    scores = [("test/nll/kind/dense", 1, 3), ("test/vqa/accuracy", 100, 1), (half.depth, 100, 1)]
    return [
        *(cell([row.scores[key] * scale for row in rows], digits) for key, scale, digits in scores),
        f"{rows[0].gflop:.3f}",
    ]


def cell(values: Sequence[float], digits: int) -> str:
    """Return ``mean ± half width`` of the 95 % t interval.

    Args:
        values: A score of each seed, at least two.
        digits: Digits after the point.
    """
    summary = summarize(values)
    assert summary is not None and summary.half_width is not None
    return f"{summary.mean:.{digits}f} ± {summary.half_width:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    made = table()
    if not parser.parse_args().write:
        print(made, end="")
        return
    text = README.read_text(encoding="utf-8")
    README.write_text(PLACE.sub(lambda found: found[1] + "\n" + made + "\n" + found[3], text), encoding="utf-8")


if __name__ == "__main__":
    main()

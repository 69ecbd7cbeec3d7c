"""Rows of results (JSON), the Markdown table made of them, and the counts that scores of generated text stand on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from visexpert.errors import ConfigError, DataError
from visexpert.io.run_files import read_json, write_json_list

_UNITS = {"images": "images", "answers": "answers written"}


@dataclass(frozen=True)
class ResultRow:
    """One finished run of a results page.

    Args:
        variant: What was run, the same words for every seed.
        seed: Its seed.
        steps: Optimizer steps.
        parameters: Trained parameters.
        gflop: Floating-point operations of one image's forward pass, in 10^9.
        images_per_s: Training throughput.
        scores: Scores by flat key, such as ``test/vqa/accuracy``.
    """

    variant: str
    seed: int
    steps: int
    parameters: int
    gflop: float
    images_per_s: float
    scores: Mapping[str, float] = field(default_factory=dict)

    def value(self, key: str) -> float | None:
        """A score, or one of the row's own numbers (``steps``, ``parameters``, ...); None if it has neither."""
        if key in _OWN_NUMBERS:
            return float(getattr(self, key))
        return self.scores.get(key)


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        key: A score's key, or ``steps``, ``parameters``, ``gflop``, ``images_per_s``.
        title: Its heading; empty means the key.
        digits: Digits after the point.
        scale: What values are multiplied with: 100 for per cent, 1e-6 for millions.
        better: Which mean is set in bold: the greatest, the least, or none.
    """

    key: str
    title: str = ""
    digits: int = 3
    scale: float = 1.0
    better: Literal["max", "min"] | None = None


def markdown_table(rows: Sequence[ResultRow], columns: Sequence[Column]) -> str:
    """Make a Markdown table with one line per variant, in the order in which variants first appear.

    A cell is ``mean ± sd`` over the variant's seeds (sample standard deviation), the mean alone for a single seed or
    seeds that agree, and a dash where the variant lacks the metric.

    Raises:
        ConfigError: A column's key is in no row.
    """
    known = sorted({*_OWN_NUMBERS, *(key for row in rows for key in row.scores)})
    variants: dict[str, list[ResultRow]] = {}
    for row in rows:
        variants.setdefault(row.variant, []).append(row)
    cells = []
    for column in columns:
        values = [[v for row in group if (v := row.value(column.key)) is not None] for group in variants.values()]
        if not any(values):
            raise ConfigError(f"No row has '{column.key}': a column's key is one of {known}.")
        cells.append(_column_cells(values, column))
    heading = ["variant", "seeds", *(column.title or column.key for column in columns)]
    lines = [_line(heading), _line(["---", *["---:"] * (len(heading) - 1)])]
    for index, (variant, group) in enumerate(variants.items()):
        lines.append(_line([variant, str(len(group)), *(column[index] for column in cells)]))
    return "\n".join(lines) + "\n"


def write_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write rows as a JSON list, one row a line, whole or not at all.

    Raises:
        DataError: The file cannot be written.
    """
    write_json_list(path, [asdict(row) for row in rows])


def read_rows(path: Path) -> list[ResultRow]:
    """Read rows that :func:`write_rows` wrote, or anything of the same form.

    Raises:
        DataError: The file is missing, is not JSON, or a row does not have the form; the message names the row and
            the key.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path} holds a {type(content).__name__} where a list of result rows belongs.")
    rows = [_row(item, f"{path}, row {number}") for number, item in enumerate(content, start=1)]
    seen: set[tuple[str, int]] = set()
    for row in rows:
        if (row.variant, row.seed) in seen:
            raise DataError(f"{path} has two rows for variant '{row.variant}' with seed {row.seed}: keep one of them.")
        seen.add((row.variant, row.seed))
    return rows


_OWN_NUMBERS = ("steps", "parameters", "gflop", "images_per_s")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "variant": str,
    "seed": int,
    "steps": int,
    "parameters": int,
    "gflop": (int, float),
    "images_per_s": (int, float),
    "scores": dict,
}


def _row(item: Any, where: str) -> ResultRow:
    names = [f.name for f in fields(ResultRow)]
    if not isinstance(item, dict):
        raise DataError(f"{where}: is a {type(item).__name__}, and should be an object with the keys {names}.")
    missing, unknown = [n for n in names if n not in item], sorted(set(item) - set(names))
    if missing or unknown:
        raise DataError(f"{where}: missing keys {missing}, unknown keys {unknown}; a row has exactly {names}.")
    for name, kind in _TYPES.items():
        if not isinstance(item[name], kind) or isinstance(item[name], bool):
            raise DataError(f"{where}: '{name}' is {item[name]!r}, and should be {_named(kind)}.")
    for key, value in item["scores"].items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{where}: score '{key}' is {value!r}, and should be a finite number; run it again.")
    return ResultRow(**item)


def _named(kind: type | tuple[type, ...]) -> str:
    return {str: "a text", int: "a whole number", dict: "an object of numbers"}.get(kind, "a number")  # type: ignore[arg-type]


def _column_cells(values: Sequence[Sequence[float]], column: Column) -> list[str]:
    means = [statistics.fmean(group) * column.scale if group else None for group in values]
    present = [mean for mean in means if mean is not None]
    best = {"max": max, "min": min}[column.better](present) if column.better else None
    cells = []
    for group, mean in zip(values, means, strict=True):
        if mean is None:
            cells.append("–")
            continue
        spread = statistics.stdev(group) * column.scale if len(group) > 1 else 0.0
        text = f"{mean:.{column.digits}f}"
        text = f"**{text}**" if mean == best else text
        cells.append(f"{text} ± {spread:.{column.digits}f}" if spread else text)
    return cells


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def is_count(key: str) -> bool:
    """Return whether a metric counts the images or answers behind a score, such as ``test/caption/images_of``."""
    return key.rpartition("/")[2].removesuffix("_of") in _UNITS


def generated_counts(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """Return what generated scores are computed from, by the keys without their last names: ``500 of 5000 images``."""
    found: dict[str, str] = {}
    for name, total in metrics.items():
        part, _, last = name.rpartition("/")
        done = metrics.get(name.removesuffix("_of"))
        if is_count(name) and last.endswith("_of") and total is not None and done is not None:
            found[part] = f"{done:.0f} of {total:.0f} {_UNITS[last.removesuffix('_of')]}"
    return found

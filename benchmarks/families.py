"""Try every family of models, and write which load and in what role to docs/families.md: `make families`.

Every model is tiny and random, written in its library's own format, and tried with the code of `visexpert try`. Results
are kept in runs/families, so that an interrupted run can resume; they are computed again if the code has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import visexpert
from benchmarks.family_encoders import Encoder, encoders
from benchmarks.family_languages import families, write_language
from visexpert.commands.trial import Attempt, Request, Role, attempts
from visexpert.commands.trial.roles import silenced

OUT = Path("docs/families.md")
KEPT = Path("runs/families")
LIBRARIES = ("torch", "transformers", "timm", "open_clip_torch")


@dataclass(frozen=True)
class Row:
    """Result of trying a family in one role.

    Args:
        role: ``expert``, ``encoder`` or ``language``.
        name: Name of the class, with the kind of tokens.
        verdict: See :class:`~visexpert.commands.trial.Attempt`; ``not reached`` if no model could be made.
        message: Reason, if it does not work.
        equal: Output of the library that the tokens or logits equal.
        difference: Largest difference, as a share of the largest value.
        tokens: Grid and width of an expert's tokens.
    """

    role: str
    name: str
    verdict: str
    message: str = ""
    equal: str = ""
    difference: float | None = None
    tokens: str = ""


@dataclass(frozen=True)
class Tried:
    """A family and its results."""

    title: str
    library: str
    rows: Sequence[Row] = field(default_factory=tuple)


@dataclass(frozen=True)
class Family:
    """A family to try.

    Args:
        title: Title in the table.
        library: Library in whose format it is written.
        roles: Roles in which it is tried.
        write: Writes a model to a folder; returns how to ask for it, and why its own library cannot run it (empty if
            it can).
    """

    title: str
    library: str
    roles: tuple[Role, ...]
    write: Callable[[Path], tuple[Request, str]]


def all_families() -> list[Family]:
    """Return all families to try, in the order of the page."""
    return [*map(_seeing, encoders()), *map(_speaking, families())]


def _seeing(encoder: Encoder) -> Family:
    return Family(encoder.title, encoder.library, ("expert", "encoder"), lambda folder: (encoder.write(folder), ""))


def _speaking(kind: str) -> Family:
    def write(folder: Path) -> tuple[Request, str]:
        broken = write_language(kind, folder)
        return Request(str(folder)), broken

    return Family(kind, "transformers", ("language",), write)


def try_family(family: Family) -> Tried:
    """Write a model of a family and try it; whatever happens becomes a row."""
    with tempfile.TemporaryDirectory() as name:
        try:
            with silenced():
                request, broken = family.write(Path(name))
        except Exception as error:  # the recipe failed, not the package
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            return Tried(family.title, family.library, (Row(family.roles[0], "", "not reached", reason),))
        found = [_row(attempt, name) for attempt in attempts(request, family.roles)]
        if broken and found[0].verdict in ("error", "differs"):
            found = [Row(found[0].role, "", "not reached", f"its own library cannot run it ({broken})")]
        return Tried(family.title, family.library, tuple(found))


def _row(attempt: Attempt, folder: str) -> Row:
    compared = attempt.comparisons
    worst = max((each.difference / each.scale if each.scale else each.difference for each in compared), default=None)
    kind = attempt.facts.get("tokens")
    grid, width = attempt.facts.get("grid"), attempt.facts.get("width")
    return Row(
        role=attempt.role,
        name=attempt.name + (f", {kind}" if kind else ""),
        verdict=attempt.verdict,
        message=attempt.message.replace(folder, "FOLDER"),
        equal=compared[0].reference if compared else attempt.facts.get("not compared", ""),
        difference=worst,
        tokens=f"{grid}, {width} wide" if grid else "",
    )


# -- Keeping ----------------------------------------------------------------------------------------------------------


def fingerprint() -> str:
    """Return a hash of the package, the recipes and the versions of the libraries."""
    digest = hashlib.sha256(repr([version(name) for name in LIBRARIES]).encode())
    here = Path(__file__).parent
    for path in sorted([*Path(visexpert.__file__).parent.rglob("*.py"), *here.glob("famil*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def tried_before(path: Path) -> dict[tuple[str, str], Tried]:
    """Return the results of an interrupted run, by library and title."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            written = json.loads(line)
        except ValueError:  # cut short by the interruption
            continue
        rows = tuple(Row(**row) for row in written.pop("rows"))
        found[written["library"], written["title"]] = Tried(**written, rows=rows)
    return found


def try_all(chosen: Sequence[Family], kept: Path) -> list[Tried]:
    """Try the families that are not done yet, with a progress bar."""
    done = tried_before(kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a", encoding="utf-8") as file:
        for family in (bar := tqdm(chosen, unit="family")):
            bar.set_postfix_str(family.title)
            if (family.library, family.title) in done:
                continue
            tried = done[family.library, family.title] = try_family(family)
            file.write(json.dumps(asdict(tried)) + "\n")
            file.flush()
    return [done[family.library, family.title] for family in chosen]


# -- The page ---------------------------------------------------------------------------------------------------------


def page(found: Sequence[Tried]) -> str:
    """Return the text of docs/families.md."""
    seeing = [tried for tried in found if tried.rows[0].role != "language"]
    speaking = [tried for tried in found if tried.rows[0].role == "language"]
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    parts = [
        "# Families of models",
        "",
        "Which models load, and in what role. `make families` wrote this page: it tried a tiny random model of each "
        "family, in its library's own format, with the code of `visexpert try`",
        f"({versions}). Real weights were not tried, only their format; try a model that you have with "
        "`visexpert try MODEL`.",
        "",
        "- **Equal to**: the output of the library's own forward that the tokens or logits equal. **Difference**: the "
        "largest one, as a share of the largest value; up to 1e-4 is",
        "  rounding. Encoders get two images; language models get two texts packed in one row, with and without an "
        "image before them, compared with one text per row, and a greedy answer.",
        "- *differs*: it loads, but computes something other than the library: do not use it. *refused*: with the "
        "reason given here. *error*: it raised something else.",
        "",
        f"## Encoders ({_counts(seeing)})",
        "",
        *_table(
            ("family", "library", "as expert", "tokens", "equal to", "difference", "as encoder"),
            (line for tried in seeing for line in _encoder_lines(tried)),
        ),
        "",
        f"## Language models ({_counts(speaking)})",
        "",
        *_table(
            ("family (`model_type`)", "loads as", "difference"),
            (
                (f"`{tried.title}`", row.name, _share(row.difference))
                for tried in speaking
                for row in tried.rows
                if row.verdict == "works"
            ),
        ),
        "",
        *_table(
            ("family", "", "reason"),
            (
                (f"`{tried.title}`", row.verdict, _first(row))
                for verdict in ("error", "differs", "refused", "not reached")
                for tried in speaking
                for row in tried.rows
                if row.verdict == verdict
            ),
        ),
        "",
        "*not reached*: the general recipe for tiny configurations did not make a model that the family's own library "
        "can run.",
    ]
    return "\n".join(parts) + "\n"


def _counts(found: Sequence[Tried]) -> str:
    kinds: dict[str, int] = {}
    for tried in found:
        verdict = best(tried)
        kinds[verdict] = kinds.get(verdict, 0) + 1
    names = {"works": "work", "differs": "differ", "error": "fail with an error"}
    return ", ".join(f"{kinds[kind]} {names.get(kind, kind)}" for kind in _ORDER if kind in kinds)


_ORDER = ("works", "differs", "error", "refused", "not reached")


def best(tried: Tried) -> str:
    """Return the best verdict of a family."""
    return min((row.verdict for row in tried.rows), key=_ORDER.index)


def _encoder_lines(tried: Tried) -> Iterable[tuple[str, ...]]:
    found = next((row for row in tried.rows if row.role == "encoder"), None)
    taught = "" if found is None or found.verdict == "refused" else f"{found.name}: {_share(found.difference)}"
    if found is not None and found.verdict in ("differs", "error"):
        taught = f"{found.verdict}, {taught}"
    for row in tried.rows:
        if row.role == "encoder":
            continue
        if row.verdict == "works":
            yield tried.title, tried.library, row.name, row.tokens, _place(row), _share(row.difference), taught
        else:
            yield tried.title, tried.library, row.verdict, "", _first(row), "", taught


def _place(row: Row) -> str:
    if row.difference is None:
        return f"not compared: {row.equal}"
    return row.equal.partition(": ")[2].removeprefix("its output, ")


def _first(row: Row) -> str:
    """Return a refusal without its next step, and anything else as it is."""
    text = row.message.partition("; ")[0] if row.verdict in ("refused", "differs") else row.message
    text = text.removeprefix(f"{row.name.partition(',')[0]}: ")
    return text if len(text) < 260 else f"{text[:257]}..."


def _share(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.0e}" if difference else "0"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(
            f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('<', '&lt;') for cell in line)} |"
            for line in lines
        ),
    ]


def titles_on(text: str) -> Mapping[str, set[str]]:
    """Return the families on a page, by ``encoders`` and ``languages``."""
    seeing, _, speaking = text.partition("## Language models")
    rows = {
        kind: [line.split(" | ")[0].removeprefix("| ") for line in part.splitlines() if line.startswith("| ")]
        for kind, part in (("encoders", seeing), ("languages", speaking))
    }
    return {
        kind: {cell.strip("`") if kind == "languages" else cell for cell in cells if not cell.startswith("family")}
        for kind, cells in rows.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Try the families that are missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="only try and print families whose name has TEXT; write no page")
    parser.add_argument("--fresh", action="store_true", help="ignore earlier results")
    options: Any = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.only is not None:
        for family in all_families():
            if options.only in family.title:
                print(json.dumps(asdict(try_family(family)), indent=2))
        return
    kept = KEPT / f"{fingerprint()}.jsonl"
    if options.fresh:
        kept.unlink(missing_ok=True)
    found = try_all(all_families(), kept)
    OUT.write_text(page(found), encoding="utf-8")
    print(f"{OUT}: {len(found)} families")


if __name__ == "__main__":
    main()

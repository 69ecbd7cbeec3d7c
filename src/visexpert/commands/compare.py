"""``visexpert compare RUN... --out DIR``: one page with the scores, tests, costs and figures of several runs."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, require_package, shown

EPILOG = """\
examples:
  visexpert compare runs/results-movekd/* --out compare         VARIANT/seedN below each: seeds are averaged
  visexpert compare runs/a runs/b runs/c --out compare          runs whose settings are equal are seeds of one variant
  visexpert compare --group "CLIP only=runs/clip/*" --group "ToVE=runs/tove/seed*" --baseline "CLIP only" --out compare
  visexpert compare runs/*/seed*/merged runs/* --out compare    RUN/merged and RUN/detached are runs, too
  visexpert compare runs/* --score caption/cider --scores vqa/accuracy caption/cider --out compare

Runs that differ in data, tokenizer, metric version or evaluation settings are refused, and the difference is named.
Runs that failed or are still running are left out and named. Values that an older run lacks read "not recorded".
"""


def run(arguments: list[str]) -> Ending:
    """Compare runs, and print where the report is.

    Raises:
        ConfigError: A folder does not exist, no run is finished, or the runs cannot be compared.
    """
    options = parser().parse_args(arguments)
    if options.out.is_file():
        raise ConfigError(f"visexpert compare: --out '{options.out}' is a file; name a folder.")
    require_package("scipy", extra="compare", what="visexpert compare")
    from visexpert.report.compare import Choices, compare_runs, find_runs, write_report  # heavy: after --help

    named: dict[Path, str] = {}
    for name, paths in options.group:
        for folder in find_runs(paths, phases=options.phases)[0]:
            if named.setdefault(folder, name) != name:
                raise ConfigError(f"visexpert compare: '{folder}' is in two groups, '{named[folder]}' and '{name}'.")
    folders, strays = find_runs(options.runs, phases=options.phases)
    every = list(dict.fromkeys([*named, *folders]))
    if not every and not strays:
        raise ConfigError("visexpert compare: no run was given; name folders of runs, or groups by --group NAME=GLOB.")
    choices = Choices(named, options.baseline, options.scores, options.score, options.split, options.allow_mixed)
    comparison = compare_runs(every, choices, strays=strays)
    write_report(comparison, options.out)
    for record in comparison.left_out:
        print(shown(f"left out: {record.folder}: {record.problem}"))
    runs = sum(len(variant.runs) for variant in comparison.variants)
    print(f"{len(comparison.variants)} variants of {runs} runs, against '{shown(comparison.baseline)}':")
    return Ending(
        f"{options.out / 'report.html'}, report.md and results.csv beside it; open the page in a browser",
        (("serve", comparison.variants[0].runs[0].folder),),
    )


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert compare",
        description="Compare finished runs on one page: scores with intervals over seeds, paired tests against a "
        "baseline,\ncosts of training and inference, Pareto front, learning curves, skills, gate maps side by side.\n"
        "Writes report.html (needs nothing else), report.md, results.csv and figures/.",
        epilog=EPILOG,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, or folders of such folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        type=_group,
        metavar="NAME=GLOB",
        help="these runs are the variant NAME (quote it, so that the shell leaves the * alone)",
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="variant to test against (default: clip-only, else the first)"
    )
    parser.add_argument("--scores", nargs="+", default=[], metavar="KEY", help="columns, such as vqa/accuracy nll/nll")
    parser.add_argument("--score", metavar="KEY", help="score of the Pareto figure and the curves")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="whose scores (default: %(default)s)")
    parser.add_argument("--phases", action="store_true", help="also take runs inside runs: RUN/merged, RUN/detached")
    parser.add_argument(
        "--allow_mixed", action="store_true", help="compare runs of different data or settings, with a warning"
    )
    return parser


def _group(text: str) -> tuple[str, list[Path]]:
    """Return a group's name, and the paths that its pattern matches."""
    name, _, pattern = text.partition("=")
    if not name.strip() or not pattern:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=GLOB, such as 'ToVE=runs/tove/seed*'")
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise argparse.ArgumentTypeError(f"nothing matches '{pattern}' of '{name}'")
    return name.strip(), paths

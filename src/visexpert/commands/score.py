"""``visexpert score import RUN RESULTS.json...``: store another harness's scores with a run's own."""

from __future__ import annotations

from pathlib import Path

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import shown

EPILOG = """\
examples:
  lmms-eval --model visexpert --model_args run=runs/tove/merged --tasks gqa,mme --output_path logs --log_samples
  visexpert score import runs/tove/merged logs/*_results.json --harness_version 0.7.3

metrics.json gets lmms/TASK/METRIC; lmms.json beside it records harness, version, prompt, settings and number of
questions. docs/evaluation.md shows how to run lmms-eval on a run or on an exported LLaVA folder.
"""


def run(arguments: list[str]) -> Ending:
    """Store scores and print them.

    Raises:
        ConfigError: The folder is not a run, or an option is needed to store the scores.
        DataError: A file cannot be read.
    """
    options = parser().parse_args(arguments)
    from visexpert.report.lmms import import_lmms

    for path in options.results:
        stored = import_lmms(
            path,
            options.run,
            tasks=options.task,
            harness_version=options.harness_version,
            limited=options.limited,
            replace=options.replace,
        )
        for key, value in stored.items():
            print(f"{shown(key)}: {value:.6g}")
    kept, source = options.run / "metrics.json", options.run / "lmms.json"
    made = f"the scores are in {kept}, their origin in {source}"
    return Ending(made, (("compare", options.run, "--out", options.run / "compare"),))


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert score",
        description="Store scores that another harness measured in a run's folder.",
        epilog=EPILOG,
    )
    parser.add_argument("action", choices=("import",), help="import: read results files of lmms-eval")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run that was evaluated")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="DATE_results.json of lmms-eval")
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help="only this task; may be repeated")
    parser.add_argument(
        "--harness_version", metavar="X", help="version of lmms-eval, if the file does not record it (installed by pip)"
    )
    parser.add_argument(
        "--limited", action="store_true", help="also store scores on a subset of the questions (lmms-eval --limit)"
    )
    parser.add_argument("--replace", action="store_true", help="also replace scores from an earlier results file")
    return parser

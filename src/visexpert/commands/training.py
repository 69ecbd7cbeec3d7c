"""``visexpert fit | validate | test | predict``: LightningCLI behind a short help of its own."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser

if TYPE_CHECKING:
    from visexpert.training import VisexpertCLI

RUN_OPTIONS = (
    (
        "--config YAML",
        "file, or name in `visexpert configs list`; may be repeated, and later ones lie over earlier ones",
    ),
    ("--trainer.KEY VALUE", "any setting of Lightning's trainer, such as --trainer.max_steps 400"),
    ("--model.init_args.KEY VALUE", "any setting of the model, such as --model.init_args.optimizer.lr 1e-4"),
    ("--data.init_args.KEY VALUE", "any setting of the data, such as --data.init_args.batch_size 8"),
    ("--seed_everything N", "seed of all random numbers (default: 0)"),
    ("--print_config", "print the configuration that the other arguments make, with every setting, and stop"),
)

FIT_OPTIONS = (
    ("--run FOLDER", "folder to write: config.yaml, metrics, figures/, checkpoints/ (default: the configuration's)"),
    ("--ckpt_path CKPT", "'last' continues the run in that folder; a file begins from its weights and step"),
    ("--overwrite", "begin anew in a folder that holds a run, which is moved to previous.1 in it"),
    ("--checkpoint_every N", "steps between checkpoints (default: 250)"),
    ("--test_after_fit false", "do not score the test images when training is done"),
)

SCORE_OPTIONS = (("--ckpt_path CKPT", "other weights than the run's last checkpoint"),)

PREDICT_OPTIONS = (
    *SCORE_OPTIONS,
    (
        "--overwrite",
        "replace the predictions that are there, or that a stopped call left; without it they are completed",
    ),
)

ABOUT = {
    "fit": "Train, then score on the test images.",
    "validate": "Score a run on its validation images.",
    "test": "Score a run on its test images.",
    "predict": "Write what a run says to each text of its test images: RUN/predictions.jsonl, one JSON line each.\n"
    "For images of your own see `visexpert caption`.",
}

EXAMPLES = {
    "fit": "  visexpert fit --config tove/tabletop\n"
    "  visexpert fit --config tove/tabletop --run runs/short --trainer.max_steps 50\n"
    "  visexpert fit --config tove/tabletop --run runs/short --ckpt_path last",
    "validate": "  visexpert validate runs/tove",
    "test": "  visexpert test runs/tove\n  visexpert test runs/tove --data.init_args.batch_size 64",
    "predict": "  visexpert predict runs/tove",
}


def _run(command: str, arguments: list[str]) -> Ending | None:
    """Show help, or hand over to LightningCLI; what it needs takes seconds to import."""
    if asked := [argument for argument in arguments if argument.split("=")[0] in ("-h", "--help")]:
        if "all" not in arguments and asked[0] != "--help=all":
            _parser(command).print_help()
            sys.exit()
        arguments = ["--help"]
    from visexpert.training import is_first_process, run_lightning

    cli = run_lightning([command, *arguments])
    whole = is_first_process() and not cli.trainer.interrupted and not getattr(cli.trainer, "fast_dev_run", False)
    return _ending(command, cli) if whole else None


def _ending(command: str, cli: VisexpertCLI) -> Ending:
    """Return what was made and what can be typed next."""
    from visexpert.methods import FusingMethod, Method

    run, model = cli.run_folder, cli.model
    steps: list[tuple[object, ...]] = []
    if command == "fit" and isinstance(model, FusingMethod) and model.hub.attached:
        steps = [("detach", run, "--min_contribution", "0.01"), ("merge", run)]
    elif command == "fit" and isinstance(model, Method) and model.holds("clip"):
        steps = [("export", run, "--out", run.with_name(f"{run.name}-encoder"))]
    if isinstance(model, Method) and model.reads_text:
        steps.append(("caption", run, "IMAGE"))
    steps = steps or [("compare", run, "--out", run / "compare")]
    return Ending(_MADE[command].format(run=run), tuple(steps))


_MADE = {
    "fit": "{run} (weights in checkpoints/, scores in metrics.json, figures/)",
    "validate": "the scores are in {run}/metrics.json",
    "test": "the scores are in {run}/metrics.json, figures in {run}/figures",
    "predict": "{run}/predictions.jsonl, one line for each text of the test images",
}


OPTIONS = {"fit": FIT_OPTIONS, "predict": PREDICT_OPTIONS}


def _parser(command: str) -> Parser:
    """Return a parser of the options that are used most; it prints help and parses nothing."""
    reads = command != "fit"
    parser = Parser(
        prog=f"visexpert {command}",
        usage=f"visexpert {command} {'RUN [options]' if reads else '--config YAML [options]'}",
        description=ABOUT[command],
        epilog=f"examples:\n{EXAMPLES[command]}\n\nEvery setting: visexpert {command} --help all",
    )
    if reads:
        parser.add_argument("run", metavar="RUN", help="folder of a run; its configuration and weights are read")
    for option, text in (*OPTIONS.get(command, SCORE_OPTIONS), *RUN_OPTIONS):
        name, _, value = option.partition(" ")
        if value:
            parser.add_argument(name, metavar=value, help=text)
        else:
            parser.add_argument(name, action="store_true", help=text)
    return parser


fit, validate, test, predict = (partial(_run, command) for command in ABOUT)
fit_parser, validate_parser, test_parser, predict_parser = (partial(_parser, command) for command in ABOUT)

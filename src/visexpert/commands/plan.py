"""``visexpert plan --config YAML``: parameters, compute, memory, disk and hours of a fit, before it starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from visexpert import shipped
from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError

EPILOG = """\
examples:
  visexpert plan --config configs/tove/smoke.yaml
  visexpert plan --config configs/movekd/llava/stage1.yaml --gpus 16 --gpu a800 --samples 558128 --trainer.max_epochs 1
  visexpert plan --config A.yaml --config B.yaml --gpus 8 --trainer.strategy deepspeed_stage_2 --json > plan.json

Later configurations lie over earlier ones; any argument of `visexpert fit` may follow. Nothing is downloaded and no
weights are read. If a configuration names a model on the Hugging Face Hub, its config.json must be in the local cache;
a folder with just that file also works: --model.init_args.language.init_args.source FOLDER.
"""


def run(arguments: list[str]) -> Ending:
    """Plan and print.

    Raises:
        ConfigError: A setting does not exist or has a value that is not allowed.
        WeightsError: The configuration of a pretrained model is not on this machine.
    """
    reader = parser()
    options, overrides = reader.parse_known_args(arguments)
    reader.refuse_abbreviations(overrides)
    if not options.config:
        raise ConfigError("visexpert plan: no configuration was given; name YAML files by --config.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, below
    from visexpert.planning import Asked, configured_gpus, make_plan, read_configs  # heavy: after --help
    from visexpert.planning.machine import gpu_named

    gpu_named(options.gpu)
    planned = read_configs(options.config, overrides)
    gpus = configured_gpus(planned.trainer) or 1 if options.gpus is None else options.gpus
    asked = Asked(
        gpus=gpus,
        gpu=options.gpu,
        mfu=options.mfu,
        samples=options.samples,
        text_tokens=options.text_tokens,
        answer_tokens=options.answer_tokens,
    )
    plan = make_plan(planned, asked)
    if options.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        from rich.console import Console

        from visexpert.planning.show import show

        show(plan, Console())
    names = [word for path in options.config for word in ("--config", shipped.shown(path))]
    then = (("data", "check", *map(shipped.shown, options.config)), ("fit", *names, *overrides))
    return Ending("the plan above; nothing was written.", then, aside=options.json)


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert plan",
        description="Estimate what a fit costs before it starts: parameters, GFLOP per sample by part, memory per "
        "GPU,\ndisk and hours. Everything is counted on shapes; no weights, no download, no accelerator.",
        epilog=EPILOG,
    )
    parser.add_argument("--config", action="append", default=[], type=Path, metavar="YAML", help="may be repeated")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: the trainer's devices, else 1)")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="h100, h200, h800, a100, a100-40, a800, l40s, rtx4090 or v100 (default: %(default)s)",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="X", help="share of the peak that is reached (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="training images, where the data is not here")
    parser.add_argument(
        "--text_tokens", type=int, default=124, metavar="N", help="tokens of an image's texts (default: %(default)s)"
    )
    parser.add_argument(
        "--answer_tokens", type=int, metavar="N", help="those of them that are supervised (default: half)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser

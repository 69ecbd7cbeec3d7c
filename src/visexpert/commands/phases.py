"""``visexpert detach RUN`` and ``visexpert merge RUN``: a phase's own settings as options, on a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.commands.source_settings import ClassSource
from visexpert.errors import ConfigError, require_numbers
from visexpert.io.reading import read_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from visexpert.callbacks.phase import Phase

PHASES = {
    "detach": ClassSource("visexpert.callbacks.detach", "ExpertDetachment"),
    "merge": ClassSource("visexpert.callbacks.merge", "KnowledgeMerging"),
}


def _run(command: str, arguments: list[str]) -> Ending | None:
    """Parse a phase's settings and carry it out on a finished run.

    Args:
        command: Name of the command.
        arguments: Without the command's name.

    Raises:
        ConfigError: A setting does not exist or has a value that is not allowed, or the run's method fuses no experts.
    """
    if {"-h", "--help"} & set(arguments):
        _light_parser(command).parse_args(["--help"])
    import lightning as L  # heavy: after --help

    from visexpert import callbacks
    from visexpert.callbacks.phase import kept_trainer, saved_settings
    from visexpert.checking import check_seed
    from visexpert.interruption import stoppable
    from visexpert.methods.fusing import fusing
    from visexpert.processes import is_first
    from visexpert.run_arguments import config_files
    from visexpert.runs import load_run
    from visexpert.shipped import in_arguments
    from visexpert.training import leave_logs_to_root

    leave_logs_to_root()
    phase: type[Phase] = getattr(callbacks, PHASES[command].name)
    parser = _parser(command, phase)
    given = in_arguments(arguments)
    for path in config_files(given):
        _refuse_a_fits(path, command, list(signature(phase).parameters))
    built = parser.instantiate_classes(parser.parse_args(given))
    work = phase(**{name: built[name] for name in signature(phase).parameters})
    if built.seed is not None:
        check_seed("--seed", built.seed)
    run = Path(built.folder)
    saved = load_run(run)
    model = fusing(saved.model, wanted_by=f"visexpert {command}")
    L.seed_everything(
        int(saved.config.get("seed_everything") or 0) if built.seed is None else built.seed, verbose=False
    )
    model.count_steps(saved.steps)
    require_numbers(f"visexpert {command}", least=1, devices=built.devices)
    settings = replace(saved_settings(run), devices=built.devices)
    with stoppable(go_on="give the same command again"), kept_trainer(model, saved.data):
        out = work.carry_out(model, saved.data, run, settings)
    return Ending(f"{out} (scores in metrics.json)", work.next_commands(run, out)) if is_first() else None


def _refuse_a_fits(path: Path, command: str, settings: Sequence[str]) -> None:
    """Refuse the configuration of a fit in place of a phase's settings.

    Raises:
        ConfigError: The file is one.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError):
        return  # the parser tells
    if foreign := [key for key in ("model", "trainer") if isinstance(content, dict) and key in content]:
        raise ConfigError(
            f"'{path}' is the configuration of a fit (it has {' and '.join(foreign)}), but `visexpert {command} "
            f"--config` takes settings of {command} alone: {', '.join(settings)}; leave it out, since RUN has its "
            "own."
        )


def _parser(command: str, phase: type[Phase]) -> ArgumentParser:
    from visexpert.training import RunParser

    parser = RunParser(prog=f"visexpert {command}", parser_mode="omegaconf")
    parser.add_argument("folder", type=str, metavar="RUN", help=_RUN)
    parser.add_argument("--config", action="config", help=_CONFIG)
    parser.add_argument("--seed", type=int, default=None, help=_SEED)
    parser.add_argument("--devices", type=int, default=1, help=_DEVICES)
    parser.add_class_arguments(phase)
    return parser


_RUN = "folder of a finished run"
_CONFIG = "settings from a YAML file"
_SEED = "seed of order and noise (default: the run's own)"
_DEVICES = "number of devices to use, each by a process of its own (default: 1)"


def _light_parser(command: str) -> Parser:
    """Return a parser with the same options that imports nothing of the phase; it prints help and parses nothing."""
    source = PHASES[command]
    parser = Parser(
        prog=f"visexpert {command}",
        usage=f"visexpert {command} RUN [options]",
        description=source.description(),
    )
    parser.add_argument("folder", metavar="RUN", help=_RUN)
    parser.add_argument("--config", metavar="YAML", help=_CONFIG)
    parser.add_argument("--seed", metavar="int", help=_SEED)
    parser.add_argument("--devices", metavar="int", help=_DEVICES)
    for setting in source.settings():
        default = "null" if setting.default == "None" else setting.default
        text = f"{setting.help} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{setting.name}", metavar=setting.type.replace("None", "null"), help=text)
    return parser


detach, merge = partial(_run, "detach"), partial(_run, "merge")
detach_parser, merge_parser = partial(_light_parser, "detach"), partial(_light_parser, "merge")

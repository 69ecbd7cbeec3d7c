"""What ``visexpert merge`` and ``visexpert detach`` share: a phase's own settings as options, on a finished run."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import lightning as L
from jsonargparse import ArgumentParser
from rich.console import Console

from visexpert.callbacks.phase import Phase, kept_trainer, saved_settings
from visexpert.checking import check_seed
from visexpert.errors import shown
from visexpert.interruption import stoppable
from visexpert.methods.fusing import fusing
from visexpert.runs import load_run
from visexpert.training import RunParser


def run_phase(command: str, phase: type[Phase], arguments: list[str]) -> None:
    """Parse a phase's settings and carry it out on a finished run.

    Args:
        command: Name of the command.
        phase: The phase; its constructor's arguments are the options.
        arguments: Without the command's name.

    Raises:
        ConfigError: A setting that does not exist or cannot be, or a run of a method that fuses no experts.
    """
    parser = _parser(command, phase)
    built = parser.instantiate_classes(parser.parse_args(arguments))
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
    with stoppable(go_on="give the same command again"), kept_trainer(model, saved.data):
        out = work.carry_out(model, saved.data, run, saved_settings(run))
    Console().print(f"Done: {shown(out)}", highlight=False, markup=False, soft_wrap=True)


def _parser(command: str, phase: type[Phase]) -> ArgumentParser:
    summary = (phase.__doc__ or "").strip().splitlines()[0]
    parser = RunParser(prog=f"visexpert {command}", description=summary, parser_mode="omegaconf")
    parser.add_argument("folder", type=str, metavar="RUN", help="Folder of a finished run.")
    parser.add_argument("--config", action="config", help="Settings from a YAML file.")
    parser.add_argument("--seed", type=int, default=None, help="Seed of order and noise; the run's own by default.")
    parser.add_class_arguments(phase)
    return parser

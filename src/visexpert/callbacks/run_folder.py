"""A run's folder: what was run, on what, and what came out."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich import get_console
from rich.table import Table

from visexpert.callbacks.identity import score_identity
from visexpert.errors import DataError, shown
from visexpert.interruption import Interrupted
from visexpert.io.run_files import read_object, set_aside, write_json, write_text
from visexpert.io.run_version import stamped
from visexpert.report.counts import generated_counts, is_count
from visexpert.report.machine import machine_facts, package_versions

log = logging.getLogger(__name__)

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"
"""Outcomes of a stage."""


class RunFolder(Callback):
    """Writes ``environment.json`` and ``metrics.json`` into the run's folder and prints the final metrics.

    ``environment.json`` has one entry for each stage that was run: ``fit``, ``validate``, ``test``, ``predict``. Its
    ``outcome`` is ``running``, ``finished``, ``interrupted`` (by a ``signal``), or ``failed`` with an ``error``; a
    killed process leaves ``running``.

    The folder is the trainer's ``log_dir``, which :class:`RunLogger` sets. ``metrics.json`` holds flat keys
    (``test/vqa/accuracy``): a fit writes it anew, since other weights have other scores, and a later ``validate`` or
    ``test`` adds to it. A fit that starts afresh in a used folder keeps the earlier files as ``metrics.1.json`` and
    ``metrics.1.csv``; one that continues (``--ckpt_path``) goes on in them.

    Args:
        table: Print a table of the metrics at the end.
    """

    def __init__(self, *, table: bool = True) -> None:
        self._table = table
        self._folder: Path | None = None
        self._finished = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder, self._finished = folder_of(trainer), False
        if trainer.is_global_zero:
            path = self._folder / "environment.json"
            known = read_object(path) if path.exists() else {}
            begun = {**environment(), **score_identity(trainer), "outcome": RUNNING}
            write_json(path, {**known, _stage_name(trainer): begun})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)
        if trainer.is_global_zero and trainer.ckpt_path is None:
            set_aside(folder / "metrics.csv")
            set_aside(folder / "metrics.json")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Flush the loggers first, which Lightning does only later: figures read their files.

        Not at the end of training: where that fails, the last checkpoint is to be there.
        """
        for logger in trainer.loggers:
            logger.save()
        self._record(trainer, earlier=False)
        self._finish(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._record(trainer, earlier=True)
            self._finish(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, earlier=True)
        self._finish(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write down what happened; a later phase that fails leaves a finished stage finished."""
        if self._finished:
            return
        try:
            self._end(trainer, _outcome(exception))
        except DataError as unwritten:  # such as a full disk, which may be the very reason
            log.warning("%s", unwritten)

    def _finish(self, trainer: Trainer) -> None:
        self._finished = True
        self._end(trainer, {"outcome": FINISHED})

    def _end(self, trainer: Trainer, facts: Mapping[str, Any]) -> None:
        """Complete the stage's entry, without asking other processes: they may be gone."""
        if not trainer.is_global_zero or self._folder is None:
            return
        path = self._folder / "environment.json"
        known = read_object(path)
        stage = _stage_name(trainer)
        write_json(path, {**known, stage: {**known[stage], **facts, "ended": _now()}})

    def _record(self, trainer: Trainer, *, earlier: bool) -> None:
        """Write and print the metrics; ``earlier`` keeps those that the file has and this stage does not."""
        path = folder_of(trainer) / "metrics.json"
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if earlier and path.exists():
            metrics = {**read_object(path), **metrics}
        write_json(path, dict(sorted(metrics.items())))
        for part, told in generated_counts(metrics).items():
            log.info("%s: on %s", part, told)
        if self._table and metrics:
            console = get_console()  # that of the live bars, which then stay below
            console.print(metrics_table(metrics))
            console.print(f"These figures are in {shown(path)}", highlight=False, markup=False, soft_wrap=True)


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration of LightningCLI into the run's folder without losing an earlier one.

    A fit writes ``config.yaml``, another subcommand ``config.test.yaml`` and the like. A file that differs is kept as
    ``config.1.yaml``, ``config.2.yaml``, ... Give it to LightningCLI as ``save_config_callback``.
    """

    def __init__(self, parser: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, **{**kwargs, "save_to_log_dir": False})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the folder on every process, as the trainer demands, then save on the first."""
        self._folder = folder_of(trainer)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file (Lightning calls this on the first process only)."""
        name = "config.yaml" if stage == "fit" else f"config.{_stage_name(trainer)}.yaml"
        path = self._folder / name
        text = stamped(self.parser.dump(self.config, skip_none=False))
        if path.exists() and path.read_text(encoding="utf-8") != text:
            set_aside(path)
        write_text(path, text)


def _outcome(exception: BaseException) -> dict[str, str]:
    if isinstance(exception, Interrupted):
        return {"outcome": INTERRUPTED, "signal": exception.name}
    if isinstance(exception, KeyboardInterrupt | SIGTERMException):
        return {"outcome": INTERRUPTED}
    error = ": ".join([type(exception).__name__, *str(exception).splitlines()[:1]])[:300]
    return {"outcome": FAILED, "error": error}


def folder_of(trainer: Trainer) -> Path:
    """The run's folder; every process must ask, since the first one tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def environment() -> dict[str, Any]:
    """Versions, machine, commit, seed and command line of this process, as JSON values."""
    return {
        "time": _now(),
        "command": sys.argv,
        "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        "versions": package_versions(),
        "machine": machine_facts(),
        "git_commit": git_commit(Path(__file__)),
    }


def git_commit(file: Path) -> str | None:
    """Commit of the repository that tracks ``file``, with ``-dirty`` where files differ; None if there is none."""
    folder = file.parent
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def metrics_table(metrics: Mapping[str, float | None]) -> Table:
    """A table of flat metrics: one section for each first part of the keys (``train``, ``val``, ``test``)."""
    on = generated_counts(metrics)
    table = Table("metric")
    table.add_column("value", justify="right")
    if on:
        table.add_column("on")
    for stage, names in groupby(sorted(metrics), key=lambda name: name.partition("/")[0]):
        table.add_section()
        table.add_row(f"[bold]{stage}[/bold]", "")
        for name in names:
            if is_count(name) and name.rpartition("/")[0] in on:
                continue
            value = metrics[name]
            rest = name.partition("/")[2] or name
            figure = "not finite" if value is None else f"{value:.5g}"
            told = next((text for part, text in on.items() if name.startswith(f"{part}/")), "")
            table.add_row(f"  {rest}", figure, *([told] if on else []))
    return table


def _stage_name(trainer: Trainer) -> str:
    """``fit``, ``validate``, ``test`` or ``predict`` (hooks are given an enum that prints otherwise)."""
    assert trainer.state.fn is not None
    return trainer.state.fn.value


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

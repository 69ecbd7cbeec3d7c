"""A run's folder: what was run, on what, what makes its scores comparable, and what came out."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich import get_console
from rich.table import Table

from visexpert.errors import DataError, shown
from visexpert.interruption import Interrupted
from visexpert.io.run_files import read_object, set_aside, write_bytes, write_json, write_text
from visexpert.io.run_folder import stamped
from visexpert.report.machine import machine_facts, package_versions
from visexpert.report.tables import generated_counts, is_count

log = logging.getLogger(__name__)

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"
"""Outcomes of a stage."""

METRICS_VERSION = 1
"""Raise this when a score changes its value or meaning under the same name; unlike versions are not compared."""


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
        """Flush the loggers first, since Lightning does so only later and figures read their files.

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
        """Record what happened; a later phase that fails does not undo a finished stage."""
        if self._finished:
            return
        try:
            self._end(trainer, _outcome(exception))
        except DataError as unwritten:  # such as a full disk, which may be the cause
            log.warning("%s", unwritten)

    def _finish(self, trainer: Trainer) -> None:
        self._finished = True
        self._end(trainer, {"outcome": FINISHED})

    def _end(self, trainer: Trainer, facts: Mapping[str, Any]) -> None:
        """Complete the stage's entry without asking other processes, which may be gone."""
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
            console.print(f"These metrics are in {shown(path)}", highlight=False, markup=False, soft_wrap=True)


class SaveRunConfig(SaveConfigCallback):
    """Saves the resolved configuration of LightningCLI into the run's folder without losing an earlier one.

    A fit writes ``config.yaml``, another subcommand ``config.test.yaml`` and the like. A file that differs is kept as
    ``config.1.yaml``, ``config.2.yaml``, ...; a fit that fails before it trains puts it back. Give it to LightningCLI
    as ``save_config_callback``.
    """

    _replaced: tuple[Path, Path] | None = None
    """The configuration of a fit that does not train yet, and where the earlier one is."""

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
        if path.exists() and path.read_text(encoding="utf-8") != text and (kept := set_aside(path)) and stage == "fit":
            self._replaced = (path, kept)
        write_text(path, text)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the new file stand."""
        self._replaced = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the earlier file back where nothing was trained: it tells how the weights in the folder came about."""
        if self._replaced is not None:
            path, kept = self._replaced
            kept.replace(path)
            self._replaced = None


def _outcome(exception: BaseException) -> dict[str, str]:
    if isinstance(exception, Interrupted):
        return {"outcome": INTERRUPTED, "signal": exception.name}
    if isinstance(exception, KeyboardInterrupt | SIGTERMException):
        return {"outcome": INTERRUPTED}
    error = ": ".join([type(exception).__name__, *str(exception).splitlines()[:1]])[:300]
    return {"outcome": FAILED, "error": error}


def folder_of(trainer: Trainer) -> Path:
    """Return the run's folder; every process must call this, since the first one tells the others."""
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
            number = "not finite" if value is None else f"{value:.5g}"
            told = next((text for part, text in on.items() if name.startswith(f"{part}/")), "")
            table.add_row(f"  {rest}", number, *([told] if on else []))
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


class RunLogger(CSVLogger):
    """Lightning's CSV logger with two differences: no ``version_N`` folders, and rows of an earlier start are kept.

    Lightning's own deletes ``metrics.csv`` when a run is continued in its folder, or tested. Rows that a continued
    run writes again for a step come later in the file and replace the earlier ones for
    :func:`visexpert.report.curves.read_metrics`.

    Args:
        folder: The run's folder; checkpoints go to ``checkpoints/`` in it.
        flush_logs_every_n_steps: Steps between two writes to the disk.
    """

    def __init__(self, folder: str, flush_logs_every_n_steps: int = 50) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file, made on first use."""
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _ContinuingWriter(log_dir=self.log_dir)
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment


class _ContinuingWriter(ExperimentWriter):
    """Continues the existing file, which Lightning's would delete, and loses no row on a full disk."""

    _whole = 0
    """Bytes of the file that are rows of this header."""

    def save(self) -> None:
        """Append the rows, all or none.

        Raises:
            DataError: The disk is full, or the file cannot be written; what it held stays.
        """
        path = Path(self.metrics_file_path)
        self._whole = path.stat().st_size if path.is_file() else 0
        self._columns = list(self.metrics_keys)
        try:
            super().save()
        except (OSError, DataError) as error:
            self.metrics_keys = self._columns
            with contextlib.suppress(OSError):
                os.truncate(path, self._whole) if self._whole else path.unlink()
            told = error.strerror if isinstance(error, OSError) else str(error)
            raise DataError(
                f"Cannot write {path} ({told}); free the disk, then continue with ckpt_path last."
            ) from error

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(path, text.getvalue().encode("utf-8"))
        self._whole, self._columns = path.stat().st_size, list(fieldnames)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            _cut_last_line(path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])


def _cut_last_line(path: Path) -> None:
    """Take away what a kill left behind the last line that is whole; a file without any is removed."""
    whole = path.read_bytes().rpartition(b"\n")
    if whole[2]:
        log.warning("%s: the last line was cut off, and is taken away.", path)
        os.truncate(path, len(whole[0]) + len(whole[1])) if whole[1] else path.unlink()


def score_identity(trainer: Trainer) -> dict[str, Any]:
    """Return identities of what a stage read and how it is scored; None where the data has none."""
    data = getattr(trainer, "datamodule", None)
    return {
        "metrics_version": METRICS_VERSION,
        "data": data_identity(data),
        "tokenizer": tokenizer_identity(getattr(data, "tokenizer", None)),
        "processes": trainer.world_size,
    }


def data_identity(data: Any) -> dict[str, Any] | None:
    """Return the class of a set-up data module and the fingerprint of each split's images, where it has any."""
    if data is None:
        return None
    sources = data.image_sources() if hasattr(data, "image_sources") else {}
    return {"class": type(data).__name__, "images": {name: source.fingerprint for name, source in sources.items()}}


def tokenizer_identity(tokenizer: Any) -> str | None:
    """Return a digest of a transformers tokenizer (vocabulary, merges, normalization; not padding), else None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    elif hasattr(tokenizer, "get_vocab"):
        content = tokenizer.get_vocab()
    else:
        return None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_finished(run: Path) -> bool:
    """Tell whether the fit that wrote a run's folder came to its end."""
    path = run / "environment.json"
    return path.is_file() and (read_object(path).get("fit") or {}).get("outcome") == FINISHED

"""The logger of a run: ``metrics.csv`` in the run's own folder, continued when the run is."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


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
    """Takes up the columns of the file that is there, where Lightning's deletes it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

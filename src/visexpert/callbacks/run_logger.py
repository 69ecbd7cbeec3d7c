"""The logger of a run: ``metrics.csv`` in the run's own folder, continued when the run is."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from visexpert.errors import DataError
from visexpert.io.run_files import write_bytes


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
    """Takes up the columns of the file that is there, where Lightning's deletes it, and loses no row on a full disk."""

    _whole = 0
    """Bytes of the file that are rows of this header."""

    def save(self) -> None:
        """Append the rows; all of them or none.

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
                f"Cannot write {path} ({told}); free the disk, then continue by --ckpt_path last."
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
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

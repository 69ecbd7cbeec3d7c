"""Reports: figures and tables of runs."""

from __future__ import annotations

from visexpert.report.curves import learning_curves, loss_curves, read_metrics
from visexpert.report.figures import gate_by_region, gate_maps, sample_captions
from visexpert.report.machine import describe_machine
from visexpert.report.tables import Column, ResultRow, markdown_table, read_rows, write_rows

__all__ = [
    "Column",
    "ResultRow",
    "describe_machine",
    "gate_by_region",
    "gate_maps",
    "learning_curves",
    "loss_curves",
    "markdown_table",
    "read_metrics",
    "read_rows",
    "sample_captions",
    "write_rows",
]

"""Broken images and records: they are skipped, counted and listed, and stop the run above a limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from visexpert.errors import DataError, shown
from visexpert.io.reading import dump_json, parse_json
from visexpert.io.run_files import append_lines
from visexpert.types import Batch, Skipped

log = logging.getLogger(__name__)

FILE = "skipped.jsonl"


class FaultLog:
    """Counts skipped records, each once, and stops the run if there are too many.

    Args:
        source: Name of the source and split, for messages.
        total: Number of records for this process.
        limit: Largest share of broken records, 0 to 1. Parts of records are listed but not counted.
        file: JSON-lines file of broken records; None for no list. Records it already lists are not added again.
    """

    def __init__(self, source: str, *, total: int, limit: float, file: Path | None = None) -> None:
        self.source = source
        self.total = total
        self.limit = limit
        self.file = file
        self.first = self.last = ""
        self._keys: set[str] = set()
        self._whole = 0
        self._listed = set() if file is None else _listed(file, source)

    def __len__(self) -> int:
        return self._whole

    @property
    def parts(self) -> int:
        """Number of parts left out of otherwise usable records."""
        return len(self._keys) - self._whole

    def note(self, batch: Batch) -> None:
        """Record the samples missing from a batch.

        Raises:
            DataError: More records are broken than allowed.
        """
        self.add(batch.skipped)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Record skipped records.

        Raises:
            DataError: More records are broken than allowed.
        """
        new = [fault for fault in {fault.key: fault for fault in skipped}.values() if fault.key not in self._keys]
        if not new:
            return
        if not self._keys:
            log.warning("%s: skipped a broken record: %s", self.source, shown(new[0].reason))
        self._keys.update(fault.key for fault in new)
        self._whole += sum(fault.whole for fault in new)
        self.first, self.last = self.first or new[0].reason, new[-1].reason
        self._write([fault for fault in new if fault.key not in self._listed])
        if self._whole > self.limit * self.total:
            where = "" if self.file is None else f"; all are listed in {self.file}"
            raise DataError(
                f"{self._whole} of the {self.total} records of {self.source} cannot be used, more than "
                f"max_broken={self.limit:g} allows; repair the data or raise max_broken{where} (the last fault: "
                f"{new[-1].reason.rstrip('.')})."
            )

    def _write(self, new: Iterable[Skipped]) -> None:
        """List faults; where that cannot be done, the run goes on."""
        if self.file is None:
            return
        lines = [dump_json({"source": self.source, "key": fault.key, "reason": fault.reason}) for fault in new]
        try:
            append_lines(self.file, lines)
        except DataError as error:
            log.warning("%s", error)


def _listed(file: Path, source: str) -> set[str]:
    """Return the keys listed by an interrupted run; an unfinished line is ignored."""
    keys = set()
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else ():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("source") == source:
            keys.add(str(entry.get("key")))
    return keys

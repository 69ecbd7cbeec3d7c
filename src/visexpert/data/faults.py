"""Broken images and records: skipped, counted, listed, and fatal above a limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from visexpert.errors import DataError, shown
from visexpert.io.reading import dump_json, parse_json
from visexpert.types import Batch, Skipped

log = logging.getLogger(__name__)

FILE = "skipped.jsonl"


class FaultLog:
    """Counts what a source has to skip, each record once, and ends the run where it is too much.

    Args:
        source: Name of the source and split, for messages.
        total: Records that there are, for this process.
        limit: Largest share of them that may be broken, 0 to 1. Parts of records are listed, but do not count.
        file: JSON lines that list them; None for no list. Records that it already lists are not added again.
    """

    def __init__(self, source: str, *, total: int, limit: float, file: Path | None = None) -> None:
        self.source = source
        self.total = total
        self.limit = limit
        self.file = file
        self.last = ""
        self._keys: set[str] = set()
        self._whole = 0
        self._listed = set() if file is None else _listed(file, source)

    def __len__(self) -> int:
        return self._whole

    @property
    def parts(self) -> int:
        """Number of parts that were left out of records in use."""
        return len(self._keys) - self._whole

    def note(self, batch: Batch) -> None:
        """Take note of what a batch lacks.

        Raises:
            DataError: More is broken than allowed.
        """
        self.add(batch.skipped)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Take note of records that were left out.

        Raises:
            DataError: More is broken than allowed.
        """
        new = [fault for fault in {fault.key: fault for fault in skipped}.values() if fault.key not in self._keys]
        if not new:
            return
        if not self._keys:
            log.warning("%s: left out, because it cannot be used: %s", self.source, shown(new[0].reason))
        self._keys.update(fault.key for fault in new)
        self._whole += sum(fault.whole for fault in new)
        self.last = new[-1].reason
        self._write([fault for fault in new if fault.key not in self._listed])
        if self._whole > self.limit * self.total:
            where = "" if self.file is None else f", all in {self.file}"
            raise DataError(
                f"{self._whole} of the {self.total} records of {self.source} cannot be used, more than "
                f"max_broken={self.limit:g} allows, the last because of this: {new[-1].reason.rstrip('.')} "
                f"(mend the data or raise max_broken{where})."
            )

    def _write(self, new: Iterable[Skipped]) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            for fault in new:
                line = {"source": self.source, "key": fault.key, "reason": fault.reason}
                file.write(dump_json(line) + "\n")


def _listed(file: Path, source: str) -> set[str]:
    """Return keys that an interrupted run has written; a line that it did not finish is passed over."""
    keys = set()
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("source") == source:
            keys.add(str(entry.get("key")))
    return keys

"""How far a measured time can be trusted: the spread of its repeats, and what else kept the machine busy meanwhile."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

UNSTEADY = 0.2
"""Spread, and share of the machine that others keep busy, above which a time is marked."""

MARK = "~"
TOLD = (
    f"{MARK} measured unsteadily: repeats spread, or other processes kept the machine busy, by more than {UNSTEADY:.0%}"
)

SPREAD, OTHERS = "images_per_s_spread", "others_cpu_share"
"""Names of the two among a run's costs."""


def spread_of(seconds: Sequence[float]) -> float:
    """Return the interquartile range over the median; 0 for a single value."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def is_unsteady(metrics: Mapping[str, float]) -> bool:
    """Whether a run's times are to be marked; runs that have not recorded it are not."""
    return any(metrics.get(f"cost/{name}", 0.0) > UNSTEADY for name in (SPREAD, OTHERS))


class Meanwhile:
    """What other processes use of the machine's cores from now on, read from Linux's ``/proc/stat``.

    Args:
        stat: The file.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat, self._own, self._before = stat, time.process_time(), _ticks(stat)

    def others_share(self) -> float | None:
        """Mean share of all cores, in [0, 1]; None where that is not known."""
        own, now = time.process_time() - self._own, _ticks(self._stat)
        if self._before is None or now is None or now[1] <= self._before[1]:
            return None
        busy, passed = now[0] - self._before[0], now[1] - self._before[1]
        return min(1.0, max(0.0, (busy - own * os.sysconf("SC_CLK_TCK")) / passed))


def _ticks(stat: Path) -> tuple[int, int] | None:
    """Ticks that all cores were busy, and all ticks; None without such a file."""
    try:
        fields = [int(word) for word in stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    if len(fields) < 5:
        return None
    return sum(fields) - fields[3] - fields[4], sum(fields)  # the fourth is idle, the fifth waits for a disk

"""Measure how long ``--help`` takes compared with ``import torch``: ``python -m benchmarks.startup``.

Every round runs each command once in a new process, so that a busy machine slows them all equally. The budget is
0.5 s for ``visexpert --help`` and 1.5 times ``import torch`` for ``visexpert COMMAND --help``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from visexpert.commands.catalog import COMMANDS
from visexpert.report.machine import describe_machine

TOP_S = 0.5
OF_TORCH = 1.5
TORCH = "import torch"
EMPTY = "an empty Python"


def cases() -> dict[str, list[str]]:
    """Return the timed commands: a name, and the arguments of Python."""
    module = ["-m", "visexpert.cli"]
    commands = {f"visexpert {name} --help": [*module, name, "--help"] for name in COMMANDS}
    return {
        EMPTY: ["-c", ""],
        TORCH: ["-c", TORCH],
        "visexpert --help": [*module, "--help"],
        "visexpert --version": [*module, "--version"],
        **commands,
    }


def seconds(arguments: list[str]) -> float:
    """Return the wall time of one Python process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Time all commands and print a table; exit with 1 if one exceeds its budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command (default: %(default)s)")
    options = parser.parse_args()
    print(f"{describe_machine()}; {options.rounds} rounds\n", flush=True)
    asked = cases()
    for arguments in asked.values():  # files come from the disk once
        seconds(arguments)
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(options.rounds):
        for name, arguments in asked.items():
            taken[name].append(seconds(arguments))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    print("| command | median s | fastest s | of `import torch` |")
    print("|---|---:|---:|---:|")
    for name, median in medians.items():
        print(f"| `{name}` | {median:.2f} | {min(taken[name]):.2f} | {median / medians[TORCH]:.2f} |")
    over = [
        name
        for name, median in medians.items()
        if name.endswith("--help")
        and (median > OF_TORCH * medians[TORCH] or (name == "visexpert --help" and median > TOP_S))
    ]
    print(f"\nOver budget: {', '.join(over) or 'none'}")
    sys.exit(bool(over))


if __name__ == "__main__":
    main()

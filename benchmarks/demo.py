"""Measure time and peak memory of `visexpert demo` with an empty cache: `python benchmarks/demo.py`.

The budget is 8 minutes and 4 GB on two cores, with rendering and encoding, but without installation.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from visexpert.report import describe_machine


def main() -> None:
    """Run the demo with an empty cache, and print its time and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep_cache", action="store_true", help="use the existing cache instead of an empty one")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        environment = dict(os.environ)
        arguments = ["demo", "--run", str(Path(scratch) / "demo")]
        if not options.keep_cache:
            environment |= {"VISEXPERT_CACHE": str(Path(scratch) / "cache"), "HOME": scratch}
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "visexpert.cli", *arguments], check=True, env=environment)
        seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"demo: {seconds:.0f} s, peak memory of one process {peak:.2f} GB (budget: 480 s, 4 GB)")
    print(f"CPU time {computed:.0f} s; load of the machine over 1, 5 and 15 minutes at the end: {load}")


if __name__ == "__main__":
    main()

"""Print the line that describes this machine on results pages: ``python benchmarks/machine.py``."""

from __future__ import annotations

from visexpert.report.machine import describe_machine

__all__ = ["describe_machine"]

if __name__ == "__main__":
    print(describe_machine())

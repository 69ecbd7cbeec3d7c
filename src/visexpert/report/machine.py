"""The machine and package versions that a number was measured with."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from visexpert.version import __version__

PACKAGES = (
    "visexpert",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "transformers",
    "open_clip_torch",
    "timm",
    "peft",
    "numpy",
    "safetensors",
    "jsonargparse",
    "pycocoevalcap",
)
"""Packages whose versions may change a result."""


def describe_machine() -> str:
    """One line for results pages: CPU, cores, memory, accelerator, torch, threads."""
    facts = machine_facts()
    gpu = f", {facts['gpu']}" if facts["gpu"] else ""
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB{gpu}, "
        f"Python {facts['python']}, torch {torch.__version__}, {facts['threads']} threads"
    )


def machine_facts() -> dict[str, Any]:
    """The machine as JSON values; ``cores`` are those this process may use, ``memory_gib`` is 0 where unknown."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "memory_gib": _memory_gib(),
        "gpu": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of :data:`PACKAGES`; one that is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:  # an editable install keeps the version that it was installed with, and the source moves on
            found[name] = __version__ if name == "visexpert" else version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
        return 0
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)

"""What every test starts from: no network, one thread, figures without a screen, a fixed seed."""

from __future__ import annotations

import functools
import gc
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, hence before it

import numpy as np
import pytest
import torch
from PIL import Image

gc.disable()  # while modules are imported and tests collected: what these make stays

TESTS = Path(__file__).parent

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _quick_speeds() -> Iterator[None]:
    """Measure speeds in a few repeats in place of seconds': tests of the measuring say how long themselves."""
    from visexpert.callbacks.subsets import SubsetTiming
    from visexpert.methods import cost

    def quick(*given: Any, **named: Any) -> SubsetTiming:
        return SubsetTiming(*given, **{**named, "seconds": 0.0})

    given = inspect.unwrap(cost.measure_cost).__kwdefaults__
    assert given is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(given, "seconds", 0.0)
        patch.setattr("visexpert.callbacks.detach.SubsetTiming", quick)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting() -> Iterator[None]:
    """Leave files to the system, which a disk makes wait for some forty times a fit, and ask git once for the commit.

    That files are forced to disk before they get their names, and what git says, is tested by calls.
    """
    from visexpert.callbacks import run_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(run_folder, "git_commit", functools.cache(run_folder.git_commit))
        yield


PAINTED = (
    "report",
    "app",
    "benchmarks",
    "docs",
    "test_caption.py",
    "test_figures.py",
    "test_full_disk.py",
    "test_precision.py",
)
"""Folders and files under tests/ whose figures are painted; elsewhere a figure is built, and a dot stands for it."""


@pytest.fixture(autouse=True, scope="module")
def _unpainted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Spare the painting of figures, seconds a fit, where no test looks at them."""
    if set(PAINTED) & set(request.path.relative_to(TESTS).parts):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", _dot)
        yield


def _dot(_: object, target: BinaryIO, **__: object) -> None:
    Image.new("RGB", (1, 1)).save(target, format="png")


@pytest.fixture(autouse=True, scope="module")
def _no_java(request: pytest.FixtureRequest) -> Iterator[None]:
    """Score captions without METEOR, which starts Java for ten seconds a run; tests/metrics has its tests."""
    if "metrics" in request.path.relative_to(TESTS).parts:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visexpert.metrics.java.has_java", lambda: False)
        yield


@pytest.fixture(scope="session")
def _fresh_process() -> Any:
    from visexpert.export import verify

    return verify._fresh_process


@pytest.fixture(autouse=True, scope="module")
def _exports_are_read_here(_fresh_process: Any) -> Iterator[None]:
    """Read exports back by the same code in this process: a fresh one takes seconds of imports (``read_afresh``)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visexpert.export.verify._fresh_process", _read_here)
        yield


@pytest.fixture
def read_afresh(_exports_are_read_here: None, _fresh_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read exports back in a fresh process, as users' exports are; each format has a test that does."""
    monkeypatch.setattr("visexpert.export.verify._fresh_process", _fresh_process)


def _read_here(
    name: str, folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from visexpert.export import reload

    found = reload.RUNS[name](folder, {key: value.numpy() for key, value in tensors.items()}, facts)
    return {key: torch.from_numpy(np.array(value)) for key, value in found.items()}, reload.versions()


SLOWEST = (
    "test_configs_train.py",
    "test_run_life.py",
    "test_graphs_of_families.py",
    "test_formats.py",
    "test_in_two_processes.py",
    "test_merge.py",
    "test_mole.py",
    "test_configs_at_scale.py",
    "test_kills.py",
    "test_cli.py",
    "test_extract.py",
    "test_native.py",
    "test_checking.py",
    "test_phases_in_two_processes.py",
    "test_precision.py",
    "test_accumulation.py",
    "test_end_to_end.py",
    "test_elastic.py",
    "test_pages.py",
    "test_notebooks.py",
    "test_detach.py",
    "test_export_mole.py",
    "test_trust.py",
    "test_own_code.py",
    "test_cost.py",
    "test_c1.py",
    "test_habits.py",
    "test_walk.py",
    "test_sharded.py",
    "test_one_source.py",
    "test_configs.py",
)
"""Files that take longest: those that share the work begin with them, so that none waits for another at the end."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Make each test draw the same numbers alone and in any order."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files. Skip tests marked ``gpu`` where there is none, even when they were asked for."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Spare Python's garbage collector the half million objects that imports and collection leave."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)  # it looks in vain at most of what a run makes
    gc.enable()

"""A few rendered scenes for the tests that train, and a fixed run seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tabletop.quiet import QUIET
from visexpert.tabletop import TabletopData


@pytest.fixture(autouse=True)
def _run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache that the data modules of all tests here share."""
    return tmp_path_factory.mktemp("tabletop")


@pytest.fixture
def data(scenes: Path) -> Callable[..., TabletopData]:
    """Makes data modules of 16 training scenes, four a batch."""

    def make(**options: Any) -> TabletopData:
        sizes = {"num_train": 16, "num_val": 4, "num_test": 4, "batch_size": 4, "eval_batch_size": 4}
        return TabletopData(root=str(scenes), rendering=QUIET, **{**sizes, **options})

    return make

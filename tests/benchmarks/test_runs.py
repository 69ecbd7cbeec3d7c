"""Runs of the benchmarks go into their own folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import runs
from benchmarks.runs import Run


@pytest.mark.parametrize(
    ("command", "begins", "ends"), [("fit", [], ["--run", "{run}", "--overwrite"]), ("test", ["{run}"], [])]
)
def test_the_folder_of_a_run_wins_over_its_configurations(
    command: str, begins: list[str], ends: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later option overrides an earlier one, and configurations name a folder of their own."""
    said: list[list[str]] = []
    monkeypatch.setattr("visexpert.cli.main", said.append)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = Run(tmp_path / "run", (command, "--config", "base.yaml"), 0, "base")
    runs._execute(run)
    filled = [[word.format(run=run.folder) for word in words] for words in (begins, ends)]
    assert said == [[command, *filled[0], "--config", "base.yaml", *filled[1]]]
    assert run.done

"""Runs say which version wrote them, and those of another one are refused as such where they cannot be read."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import filelock
import pytest

import visexpert
from visexpert.errors import ConfigError
from visexpert.io.run_folder import blamed_on_version, hold, stamped, version_of

CAUSE = ConfigError("visexpert.methods.ToVE has no setting 'lr'; did you mean 'optimizer.lr'?")


@pytest.mark.parametrize(
    ("text", "beside", "version"),
    [
        (stamped("model: {}\n"), "", visexpert.__version__),
        ("# visexpert==7.3.1\nmodel: {}\n", "metrics.json", "7.3.1"),
        ("# lightning.pytorch==2.6.0\nmodel: {}\n", "", "0.1"),
        ("model: {}\nrun: runs/a/merged\n", "checkpoints", "0.1"),
        ("model: {}\nrun: runs/a\n", "", None),
        ("# My own.\nmodel: {}\n", "checkpoints", None),
    ],
)
def test_the_version_is_that_of_the_first_line_or_of_what_had_none(
    tmp_path: Path, text: str, beside: str, version: str | None
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    if beside:
        (tmp_path / beside).mkdir()
    assert version_of(config) == version


@pytest.mark.parametrize(
    ("ours", "theirs", "age"),
    [
        ("0.2.0.dev0", "0.1", "earlier"),
        ("0.10.0", "0.9.4", "earlier"),
        ("0.2.0", "0.3.0", "later"),
        ("1.0", "2", "later"),
    ],
)
def test_another_version_is_named_with_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: str, theirs: str, age: str
) -> None:
    monkeypatch.setattr("visexpert.io.run_folder.__version__", ours)
    config = tmp_path / "config.yaml"
    config.write_text(f"# visexpert=={theirs}\n", encoding="utf-8")
    told = str(blamed_on_version(CAUSE, [config]))
    assert str(config) in told and f"{age} version of visexpert ({theirs})" in told and f"({ours})" in told
    assert "no setting 'lr'" in told and told.endswith(f"train again, or use visexpert {theirs}.")


@pytest.mark.parametrize("text", ["# visexpert==0.2.9\n", "# mine\n"])
def test_a_file_of_this_version_or_of_ones_own_keeps_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("visexpert.io.run_folder.__version__", "0.2.0.dev0")
    config = tmp_path / "mine.yaml"
    config.write_text(text, encoding="utf-8")
    assert blamed_on_version(CAUSE, [config]) is CAUSE
    assert blamed_on_version(CAUSE, []) is CAUSE


@pytest.mark.skipif(filelock.__version__ < "4", reason="earlier ones leave a lock to forked children")
def test_a_lock_ends_with_its_holder_though_a_worker_of_it_lives_on(tmp_path: Path) -> None:
    """A data worker inherits what its parent has open, and outlives one that is killed."""
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with hold(tmp_path):
            worker = os.fork()
            if worker:
                os.write(write, f"{worker}\n".encode())
            signal.pause()
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(ConfigError, match="Another visexpert process"), hold(tmp_path):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with hold(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)

"""SIGKILL at any moment: given the same command again, a fit, a merge and an extraction end as if nothing had been."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from tests.killed import FORK, run, start
from visexpert.io.checkpoints import newest_checkpoint
from visexpert.methods import Method
from visexpert.store import verify

QUICK = ["--data.init_args.rendering.workers", "0", "--data.init_args.num_train", "16", "--test_after_fit", "false"]
STEPS = ["--trainer.max_steps", "4", "--checkpoint_every", "1", "--trainer.limit_val_batches", "0"]


def fit(method: str, folder: Path, *more: str) -> list[str]:
    return ["fit", "--config", f"{method}/smoke", "--run", str(folder), "--ckpt_path", "last", *QUICK, *STEPS, *more]


def merge(folder: Path) -> list[str]:
    every = ["--eval_every", "2", "--checkpoint_every", "1"]
    return ["merge", str(folder), "--steps", "3", "--optimizer.warmup_steps", "1", *every]


def extract(folder: Path) -> list[str]:
    return ["extract", "--config", "tove/smoke", "--store", str(folder), "--shard_mb", "0.03", *QUICK]


def weights(checkpoint: Path) -> dict[str, bytes]:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name: value.numpy().tobytes() for name, value in state.items()}


def of_run(folder: Path) -> dict[str, bytes]:
    return weights(folder / "checkpoints" / "last.ckpt")


def of_merge(folder: Path) -> dict[str, bytes]:
    return weights(folder / "merged" / "checkpoints" / "last.ckpt")


def of_store(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Work:
    """A command that is killed.

    Args:
        command: For a folder.
        result: What counts in the end.
        begun: Whether it works on a finished run.
    """

    command: Callable[[Path], list[str]]
    result: Callable[[Path], dict[str, bytes]]
    begun: bool = False


WORKS = {
    "ToVE": Work(lambda folder: fit("tove", folder), of_run),
    "MoVE-KD": Work(lambda folder: fit("movekd", folder), of_run),
    "merge": Work(merge, of_merge, begun=True),
    "extract": Work(extract, of_store),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(folder / "cache"))
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        yield folder


@pytest.fixture(scope="module")
def finished(cache: Path) -> Path:
    """A run of ToVE that nothing stopped."""
    run(fit("tove", cache / "run"))
    return cache / "run"


@pytest.fixture(params=WORKS)
def work(request: pytest.FixtureRequest) -> Work:
    return WORKS[request.param]


def prepared(work: Work, folder: Path, request: pytest.FixtureRequest) -> Path:
    if work.begun:
        shutil.copytree(request.getfixturevalue("finished"), folder)
    return folder


def unkilled(work: Work, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[int, dict[str, bytes]]:
    """Number of changes of files, and the result, of a command that nothing stops."""
    folder = prepared(work, tmp_path / "whole", request)
    count = run(work.command(folder))
    assert count is not None and count > 5
    return count, work.result(folder)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if "part" in path.name]


def test_a_command_that_was_killed_and_given_again_ends_as_one_that_was_not(
    finished: Path, work: Work, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count, whole = unkilled(work, tmp_path, request)
    folder = prepared(work, tmp_path / "killed", request)
    assert run(work.command(folder), at=count * 2 // 3) is None
    assert run(work.command(folder)) is not None
    assert work.result(folder) == whole and not leftovers(folder)


@pytest.mark.long
def test_ten_kills_at_random_moments_change_no_bit(
    finished: Path, work: Work, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each at a moment of its own; a command that gets through begins anew elsewhere.

    Scenes are rendered anew as well, so that kills hit that too.
    """
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache of one that is not killed"))
    count, whole = unkilled(work, tmp_path, request)
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    moments, kills, attempt = random.Random(18), 0, 0
    folder = prepared(work, tmp_path / "0", request)
    while kills < 10:
        if run(work.command(folder), at=moments.randint(1, count)) is None:
            kills += 1
            continue
        assert work.result(folder) == whole
        attempt += 1
        folder = prepared(work, tmp_path / str(attempt), request)
    run(work.command(folder))
    assert work.result(folder) == whole and not leftovers(folder)


def holding(entered: Event, goes_on: Event) -> Callable[[], None]:
    """Let a fit stand still before its first step, for a sign that it may go on."""

    def patch() -> None:
        begin = Method.on_train_start

        def on_train_start(self: Method) -> None:
            entered.set()
            goes_on.wait(60)
            begin(self)

        setattr(Method, "on_train_start", on_train_start)  # noqa: B010 (in that process alone)

    return patch


def test_of_two_runs_that_are_started_into_one_folder_one_goes_on(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first is killed then, and what it held is free."""
    folder = tmp_path / "run"
    entered, never = FORK.Event(), FORK.Event()
    first = start(fit("tove", folder), holding(entered, never))
    try:
        assert entered.wait(60)
        second = start(fit("tove", folder))
        second.join()
        assert second.exitcode == 2
        (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("visexpert: ")]
        assert "Another visexpert process" in said and f"'{folder}'" in said
    finally:
        first.kill()
        first.join()
    assert run(fit("tove", folder)) is not None
    assert of_run(folder) == of_run(finished)


def test_two_fits_fill_one_store_together_and_train_as_each_alone(finished: Path, tmp_path: Path) -> None:
    """Both are there before either takes its first step, so both have waited for, or made, the other's shards."""
    store = ["--model.init_args.store.folder", str(tmp_path / "store"), "--model.init_args.store.shard_mb", "0.01"]
    entered, goes_on = [FORK.Event(), FORK.Event()], FORK.Event()
    fits = [start(fit("tove", tmp_path / str(k), *store), holding(entered[k], goes_on)) for k in range(2)]
    assert all(each.wait(60) for each in entered)
    goes_on.set()
    for each in fits:
        each.join()
    assert [each.exitcode for each in fits] == [0, 0]
    assert not [found for found in verify(tmp_path / "store") if found.fault]
    assert of_run(tmp_path / "0") == of_run(tmp_path / "1")
    run(fit("tove", tmp_path / "alone", *store))
    assert of_run(tmp_path / "alone") == of_run(tmp_path / "0")


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_any_work_and_the_next_goes_on(
    finished: Path, work: Work, signum: signal.Signals, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ends_by_signal(work, prepared(work, tmp_path / "work", request), signum)


def test_a_signal_ends_an_extraction_and_the_next_goes_on(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends_by_signal(WORKS["extract"], tmp_path / "store", signal.SIGTERM)
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("visexpert: ")]
    assert "SIGTERM" in said and "same command" in said


def ends_by_signal(work: Work, folder: Path, signum: signal.Signals) -> None:
    assert run(work.command(folder), at=25, signum=signum) == 128 + signum
    run(work.command(folder))
    assert work.result(folder) and not leftovers(folder)


def test_of_a_checkpoint_cut_in_half_the_one_before_is_used(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill between two files leaves two, of which the later one is cut."""
    folder = tmp_path / "run"
    assert run(fit("tove", folder), at=40) is None
    cut = newest_checkpoint(folder / "checkpoints")
    assert cut is not None
    os.truncate(cut, cut.stat().st_size // 2)
    caplog.clear()
    before = newest_checkpoint(folder / "checkpoints")
    assert (
        before is not None and before != cut and str(before) in caplog.text and f"{cut} cannot be read" in caplog.text
    )
    run(fit("tove", folder))
    assert of_run(folder) == of_run(finished)

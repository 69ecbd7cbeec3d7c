"""Faults in worker processes: one sentence of the right kind, with workers and without."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
from torch.utils.data import Dataset, IterableDataset

from visexpert.data.source import SourceData
from visexpert.data.workers import CORES, DEFAULT_WORKERS, load
from visexpert.errors import ConfigError, DataError, UserError, WeightsError


class Items(Dataset[int]):
    """0 to 5; item 3 fails."""

    def __init__(self, error: BaseException | int | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 3 and isinstance(self.error, int):
            os.kill(os.getpid(), self.error)  # SIGSTOP: a worker that hangs in a read
        if index == 3 and isinstance(self.error, BaseException):
            raise self.error
        return index


class Stream(IterableDataset[int]):
    """The same as a stream."""

    def __init__(self, error: BaseException | int | None = None) -> None:
        self.items = Items(error)

    def __iter__(self) -> Iterator[int]:
        for index in range(len(self.items)):
            yield self.items[index]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_items_come_in_order(num_workers: int) -> None:
    assert list(load(Items(), num_workers=num_workers)) == list(range(6))
    assert sorted(load(Stream(), num_workers=num_workers)) == sorted(list(range(6)) * max(1, num_workers))


def test_the_default_number_of_workers_is_no_cause_of_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert list(load(Items(), num_workers=DEFAULT_WORKERS)) == list(range(6))
    assert [str(warning.message) for warning in recwarn] == []
    assert list(load(Items(), num_workers=CORES + 1)) == list(range(6))
    assert "worker" in str(recwarn.pop(UserWarning).message)  # torch's, for more workers than cores


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind", "fragments"),
    [
        (DataError("The image x is damaged."), DataError, ["The image x is damaged."]),
        (WeightsError("No weights at x."), WeightsError, ["No weights at x."]),
        (ConfigError("x is 3."), ConfigError, ["x is 3."]),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/nfs/1.jpg"), DataError, ["Input/output error: /nfs/1.jpg"]),
        (MemoryError(), DataError, ["memory", "num_workers"]),
    ],
)
@pytest.mark.parametrize("form", [Items, Stream])
def test_an_error_keeps_its_kind_and_sentence(
    form: Any, error: Exception, kind: type[UserError], fragments: list[str], num_workers: int
) -> None:
    given = []
    with pytest.raises(kind) as raised:
        for item in load(form(error), num_workers=num_workers):
            given.append(item)
    assert given == [0, 1, 2]
    told = str(raised.value)
    assert all(fragment in told for fragment in fragments) and "Traceback" not in told and "\n" not in told


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="Traceback"):
        list(load(Items(KeyError("oops")), num_workers=1))


@pytest.mark.parametrize("form", [Items, Stream])
@pytest.mark.parametrize("error", [DataError("The image x is damaged."), KeyError("oops")])
def test_workers_end_with_the_loading_though_the_error_is_kept(form: Any, error: Exception) -> None:
    """Else they live as long as the traceback, and each wait for them takes seconds."""
    others = set(multiprocessing.active_children())
    with pytest.raises(type(error)) as kept:
        list(load(form(error), num_workers=1))
    assert kept.value is not None
    assert set(multiprocessing.active_children()) <= others


def test_a_worker_that_is_killed_is_told_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"worker.*has died.*num_workers"):
        list(load(Items(int(signal.SIGKILL)), num_workers=1))


@pytest.mark.parametrize("form", [Items, Stream])
def test_a_worker_that_hangs_is_told_with_the_setting(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed in the end: it answers no other signal, and would be waited for at exit."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # torch's wait for workers to end
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError, match=r"0\.5 s.*worker_timeout.*num_workers"):
        list(load(form(int(signal.SIGSTOP)), num_workers=1, timeout=0.5))
    assert set(multiprocessing.active_children()) <= others


def test_workers_that_cannot_be_started_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    with pytest.raises(DataError, match="64 workers cannot be started.*unavailable.*lower num_workers"):
        list(load(Items(), num_workers=64))


def test_default_workers_are_no_more_than_the_cores() -> None:
    given = signature(SourceData.__init__).parameters["num_workers"].default
    assert given == min(4, len(os.sched_getaffinity(0)))

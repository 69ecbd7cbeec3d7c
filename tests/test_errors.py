"""What a terminal is shown, what numbers are refused, and how the machine's faults are told."""

from __future__ import annotations

import ast
import errno
import logging
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import visexpert
from visexpert import cli
from visexpert.callbacks import ShipLanguage
from visexpert.cli import ShownFormatter, main
from visexpert.errors import (
    ConfigError,
    DataError,
    UserError,
    next_step,
    require_checkout,
    require_numbers,
    shown,
    told_by_machine,
)
from visexpert.tabletop.zoo.ship import ShipWeights

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\n\x9b31m\u202egnp\udcff.png"
"""A title, a cleared screen, a new line, a C1 sequence, reversed text and a byte that is no text."""


def test_the_next_commands_can_be_typed_as_they_stand() -> None:
    told = next_step(("merge", "runs/a b"), ("compare", "runs/a", "--out", "x'y"))
    assert told.startswith("Next: ")
    first, second = told.removeprefix("Next: ").split(", or ")
    assert shlex.split(first) == ["visexpert", "merge", "runs/a b"]
    assert shlex.split(second) == ["visexpert", "compare", "runs/a", "--out", "x'y"]


def test_names_are_shown_escaped_and_words_as_they_are() -> None:
    assert shown(HOSTILE) == r"a\x1b]0;owned\x07\x1b[2J\n\x9b31m\u202egnp\udcff.png"
    assert shown("Straße 東京 café 🙂 a b") == "Straße 東京 café 🙂 a b"
    assert shown(Path("a b")) == "a b"


def ended(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command prints that ends in ``error``."""

    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main([])
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_message_is_one_line_whatever_it_quotes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ended(DataError(f"The image {HOSTILE} is missing."), monkeypatch, capsys)
    assert line == rf"visexpert: The image {shown(HOSTILE)} is missing."


def test_a_log_line_escapes_names_and_keeps_its_own_lines() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 1, "first\n%s and %d", (HOSTILE, 3), None)
    assert ShownFormatter("%(message)s").format(record) == f"first\n{shown(HOSTILE)} and 3"
    assert record.args == (HOSTILE, 3)  # other handlers get the record as it was


@pytest.mark.parametrize(
    ("error", "fragments"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/metrics.csv"), ["full", "/runs/a/metrics.csv"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/x"), ["full", "quota", "/runs/x"]),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/ro/x"), ["Read-only", "/ro/x", "another place"]),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/x"), ["denied", "/root/x"]),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/nfs/x"), ["Input/output", "/nfs/x"]),
        (OSError("Can't load the model 'x'.\nSee the page\nfor more."), ["Can't load the model 'x'."]),
        (MemoryError(), ["memory", "batch_size", "num_workers"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0"), ["2.00 GiB", "batch_size"]),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried to "
                "allocate 80000 bytes.\nmore"
            ),
            ["80000 bytes", "batch_size"],
        ),
        (RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "), ["pid 77", "num_workers"]),
        (RuntimeError("DataLoader worker (pid(s) 5, 6) exited unexpectedly"), ["5, 6", "num_workers"]),
        (RuntimeError("DataLoader timed out after 600.0 seconds"), ["600.0 s", "worker_timeout", "num_workers"]),
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:552: Connection "
                "reset by peer. This is typically caused by a remote worker hanging or bugs in the application. GLHF!"
            ),
            ["reached (Read error [10.0.0.2]:552: Connection reset by peer); see", "--ckpt_path last"],
        ),
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 20000ms for "
                "send operation to complete"
            ),
            ["reached (Timed out waiting 20000ms for send operation to complete); see"],
        ),
        (torch.distributed.DistNetworkError("The client socket has timed out after 600000ms"), ["600000ms", "died"]),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), ["full", "data/1"]),
    ],
)
def test_faults_of_the_machine_are_one_sentence(
    error: BaseException, fragments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ended(error, monkeypatch, capsys)
    assert not [fragment for fragment in fragments if fragment not in line], line


def test_a_users_error_inside_a_librarys_is_told() -> None:
    error = RuntimeError("while loading")
    error.__cause__ = DataError("The image x is missing.")
    assert str(told_by_machine(error)) == "The image x is missing."


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError(), RecursionError("too deep")])
def test_a_defect_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(type(error)):
        main([])
    error.__context__ = OSError(errno.ENOENT, "was handled", "/x")
    assert told_by_machine(error) is None


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.5, float("nan"), float("inf"), float("-inf")])
def test_numbers_outside_a_range_are_refused_with_value_and_range(value: float) -> None:
    with pytest.raises(ConfigError, match="Owner: beta is .*above 0 and at most 1") as refused:
        require_numbers("Owner", above=0, most=1, beta=value)
    assert str(value) in str(refused.value) and isinstance(refused.value, UserError)


def test_numbers_inside_a_range_pass() -> None:
    require_numbers("Owner", least=0, lr=0, other=2.5)
    require_numbers("Owner", above=0, most=1, beta=1)


def test_what_writes_into_the_source_is_refused_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    require_checkout("A", "weights/a.safetensors", str(tmp_path / "src" / "visexpert"))
    makes: tuple[Callable[[], object], ...] = (
        lambda: ShipWeights(name="clip"),
        lambda: ShipLanguage(out=f"{SOURCE}/a.safetensors", cards="c", trained_on="x"),
    )
    for make in makes:
        with pytest.raises(ConfigError, match=f"src/visexpert/.*{tmp_path}"):
            make()
    Path("src/visexpert").mkdir(parents=True)
    ShipWeights(name="clip")


SOURCE = "src/visexpert/tabletop/zoo/weights"


PACKAGE = Path(visexpert.__file__).parent

FRONT = {"app", "cli", "commands", "demo", "training"} | {
    "checking",
    "overlays",
    "parse_errors",
    "run_arguments",
    "shipped",
    "trust",
}
"""Rooms and files that commands alone call, or that read what a command line names."""

HARNESS = "integrations"
"""What lmms-eval calls, by its own options."""


def test_messages_of_the_library_name_arguments_instead_of_options() -> None:
    """Whoever calls from Python has no options; a whole command in backticks may have some."""
    told = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in FRONT | {HARNESS}:
            continue
        for raised in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Raise)):
            parts = [node.value for node in ast.walk(raised) if isinstance(node, ast.Constant)]
            text = re.sub("`[^`]*`", "", "".join(part for part in parts if isinstance(part, str)))
            if option := re.search(r"(?<![\w-])--[a-z]\w+", text):
                told[f"{path.name}:{raised.lineno}"] = option[0]
    assert told == {}


def test_ctrl_c_ends_every_command_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", stop)
    with pytest.raises(SystemExit) as ended:
        main([])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 130 and "SIGINT" in line

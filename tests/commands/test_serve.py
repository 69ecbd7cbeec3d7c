"""``visexpert serve``: its options; the page itself is tested in tests/app."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from visexpert.cli import main


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "visexpert serve: the following arguments are required: RUN"),
        (["a", "--port", "0"], "--port is 0, but must be at least 1"),
        (["a", "--max_pixels", "-1"], "--max_pixels is -1, but must be at least 1"),
        (["a", "--share"], "visexpert serve: unrecognized arguments: --share"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(arguments, capsys)


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("visexpert.errors.find_spec", lambda name: None if name == "gradio" else find(name))
    assert "pip install 'visexpert[app]'" in refused(["a"], capsys)


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio", reason="the page needs the extra app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert refused([str(tmp_path), "--port", str(port)], capsys).startswith(f"visexpert: '{tmp_path}' is not a run")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    error: Any = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and len(error.splitlines()) == 1, error
    return str(error)

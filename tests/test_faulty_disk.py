"""Every place that writes, on a full disk and in a read-only folder: one sentence, and the earlier files stay."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.data.formats import write_shard
from tests.faulty_disk import full_disk, read_only
from tests.methods.helpers import tiny_tove
from visexpert.callbacks import ShipLanguage
from visexpert.cli import main
from visexpert.commands.configs import copy
from visexpert.data.faults import FaultLog
from visexpert.data.shards import shard_counts
from visexpert.errors import DataError
from visexpert.io.run_files import append_lines, write_json, write_text
from visexpert.io.weights import write_weights
from visexpert.tabletop.texts import _write as write_texts
from visexpert.tabletop.zoo.contrastive import ContrastiveCLIP
from visexpert.tabletop.zoo.probe_table import write_results
from visexpert.tabletop.zoo.ship import CARDS, write_card
from visexpert.types import Skipped


def ship_language(folder: Path) -> None:
    callback = ShipLanguage(out=str(folder / "a.safetensors"), cards=str(folder), trained_on="noise")
    trainer: Any = SimpleNamespace(is_global_zero=True, callback_metrics={}, global_step=3)
    callback.on_fit_end(trainer, tiny_tove())


def ship_card(folder: Path) -> None:
    facts = folder / "depth.json"
    if not facts.exists():
        facts.write_bytes((CARDS / "depth.json").read_bytes())
    write_card(facts)


def ship_clip(folder: Path) -> None:
    from tests.tabletop.zoo.test_training import model_arguments

    ContrastiveCLIP(**model_arguments("clip")).ship(folder, "clip")


def write_probes(folder: Path) -> None:
    write_results({}, folder / "zoo.md", scenes=2, cards=folder / "cards")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda folder: write_text(folder / "a.md", "text"),
    "JSON": lambda folder: write_json(folder / "a.json", {"a": 1}),
    "weights": lambda folder: write_weights({"a": torch.ones(3)}, folder / "a.safetensors"),
    "language of the zoo": ship_language,
    "card of the zoo": ship_card,
    "CLIP of the zoo": ship_clip,
    "probes of the zoo": write_probes,
    "copies of configurations": lambda folder: copy("tove/smoke", folder, overwrite=True),
    "texts of Tabletop": lambda folder: write_texts(folder / "a.jsonl", [[]]),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["full", "read-only"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractContextManager[None]:
    return full_disk() if request.param == "full" else read_only(tmp_path / "out")


@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_be_written_is_told_and_the_earlier_files_stay(
    writer: str, broken: AbstractContextManager[None], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    WRITERS[writer](folder)
    made = contents(folder)
    earlier = {name: b"earlier" for name in made if not (writer == "card of the zoo" and name == "depth.json")}
    for name, content in earlier.items():
        (folder / name).write_bytes(content)
    before = contents(folder)
    with broken, pytest.raises(DataError) as told:
        WRITERS[writer](folder)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)
    assert contents(folder) == before
    WRITERS[writer](folder)  # there is room again
    assert contents(folder).keys() == made.keys() and all(contents(folder)[name] != b"earlier" for name in earlier)


def test_lines_are_appended_behind_one_that_a_kill_cut(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    append_lines(path, ["one"])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"cut')
    append_lines(path, ["two", "three"])
    assert path.read_text(encoding="utf-8").splitlines() == ["one", '{"cut', "two", "three"]


def test_a_list_of_broken_records_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "out" / "skipped.jsonl"
    log = FaultLog("COCO train", total=100, limit=0.5, file=file)
    with read_only(tmp_path / "out"), caplog.at_level(logging.WARNING):
        log.add([Skipped("a", "a is broken.")])
    assert "skipped.jsonl" in caplog.text and "Read-only" in caplog.text
    log.add([Skipped("b", "b is broken.")])
    assert len(log) == 2
    assert [json.loads(line)["key"] for line in file.read_text(encoding="utf-8").splitlines()] == ["b"]


def test_a_cache_that_cannot_be_written_keeps_no_count_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "out"))
    shard = write_shard(tmp_path / "a.tar", [("1", b"x", "a"), ("2", b"x", "b")])
    with read_only(tmp_path / "out"):
        assert shard_counts([str(shard)], sizes=None) == (2,)
    assert "VISEXPERT_CACHE" in caplog.text


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--config", "tove/smoke", "--run", "{out}/run"],
        ["extract", "--config", "tove/smoke", "--store", "{out}/store"],
        ["configs", "copy", "tove/smoke", "{out}/copies"],
    ],
)
def test_a_command_in_a_read_only_folder_ends_in_one_sentence(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with read_only(out), pytest.raises(SystemExit) as ended:
        main([word.format(out=out) for word in command])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visexpert: ")]
    assert str(out) in line and "Read-only" in line and list(out.iterdir()) == []

"""Large annotation files: an index on disk gives what reading into memory gives."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.formats import write_json
from visexpert.data import LLaVAInstruct, index
from visexpert.data.annotations import StreamError, read_json_list, stream_json_list
from visexpert.errors import ConfigError, DataError


def record(number: int, **change: Any) -> dict[str, Any]:
    said = [
        {"from": "human", "value": "<image>\nwhat is it?" + " really?" * (number % 5)},
        {"from": "gpt", "value": f"number {number} é"},
    ]
    if number % 3 == 0:
        return {"id": number, "conversations": [{"from": "human", "value": "say"}, said[1]]} | change
    return {"id": number, "image": f"a/{number}.jpg", "conversations": said} | change


def records() -> list[Any]:
    made: list[Any] = [record(number) for number in range(40)]
    made[4] = record(4, image="../4.jpg")
    made[7] = "no object"
    two = made[8]["conversations"]
    made[8]["conversations"] = [*two, {"from": "human", "value": "and?"}, {"from": "gpt", "value": ""}]
    made[38] = record(38, conversations=[])
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VISEXPERT_CACHE", str(folder))
    monkeypatch.setattr("visexpert.data.annotations._CHUNK", 97)
    index._told.clear()
    return folder


def llava(root: Path, **options: Any) -> LLaVAInstruct:
    settings: dict[str, Any] = {"num_val": 5, "max_broken": 0.5, "batch_size": 4, "num_workers": 0, "image_size": 8}
    return LLaVAInstruct(root=str(root), annotations="chat.json", **(settings | options))


def faults(data: LLaVAInstruct) -> list[tuple[int, int, int, str, str]]:
    return [(len(log), log.parts, log.total, log.first, log.last) for log in data.fault_logs]


def both(root: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[LLaVAInstruct, LLaVAInstruct]:
    """Return data read into memory, and data read from an index."""
    made = []
    for least in (10**9, 0):
        monkeypatch.setattr(index, "INDEX_FROM", least)
        made.append(llava(root, **options))
        for part in ("train", "val"):
            made[-1].open(part)
    return made[0], made[1]


@pytest.mark.parametrize("lines", [False, True])
def test_an_index_gives_what_memory_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: bool) -> None:
    write_json(tmp_path / "chat.json", records())
    if lines:
        text = "\n".join(["", *(json.dumps(value) for value in records()), "{broken", ""])
        text = text.replace('"no object"', '{"no": "conversations"}')
        (tmp_path / "chat.json").write_text(text)
    whole, stored = both(tmp_path, monkeypatch, train_fraction=0.7)
    assert isinstance(stored.table("train"), index.IndexRows)
    for part in ("train", "val"):
        assert list(stored.table(part)) == list(whole.table(part))
        assert stored.table(part).key(1) == whole.table(part).key(1)
        assert list(stored.table(part).identity()) == list(whole.table(part).identity())
    assert faults(stored) == faults(whole)
    assert [log[0] for log in faults(stored)] == [2, 1 + lines]
    orders = [data.order("train") for data in (whole, stored)]
    for epoch in range(2):
        first, second = (order(epoch) for order in orders if order is not None)
        assert np.array_equal(first, second)
    images = [data.image_sources()["train"].fingerprint for data in (whole, stored)]
    assert images[0] == images[1]
    assert list(pickle.loads(pickle.dumps(stored.table("val")))) == list(whole.table("val"))


def test_a_second_opening_does_not_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    write_json(tmp_path / "chat.json", records())
    _, first = both(tmp_path, monkeypatch)
    monkeypatch.setattr(index, "stream_json_list", None)
    second = llava(tmp_path, num_val=3)
    second.open("train")
    assert len(second.table("train")) == len(first.table("train")) + 2
    assert second.table("train")[0] == first.table("train")[0]
    assert len(list((cache / "annotations").glob("chat-*"))) == 1


def test_a_changed_file_is_read_again_and_its_old_index_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    write_json(tmp_path / "chat.json", records())
    _, before = both(tmp_path, monkeypatch)
    write_json(tmp_path / "chat.json", [record(number) for number in range(50, 70)])
    after = llava(tmp_path)
    after.open("train")
    assert after.table("train")[0].items[0].answer == "number 50 é"
    assert before.table("train")[0].items[0].answer == "number 0 é"
    assert len(list((cache / "annotations").glob("chat-*"))) == 1


def test_limits_hold_from_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "chat.json", records())
    both(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"2 of the 35 .*max_broken=0\.01"):
        llava(tmp_path, max_broken=0.01).open("train")
    with pytest.raises(ConfigError, match=r"num_val is 40.*at most 39"):
        llava(tmp_path, num_val=40).open("train")


def test_a_damaged_index_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    write_json(tmp_path / "chat.json", records())
    whole, _ = both(tmp_path, monkeypatch)
    (folder,) = (cache / "annotations").glob("chat-*")
    os.truncate(folder / "records", 10)
    (cache / "annotations" / f".{folder.name}.part").mkdir()  # left by a killed process
    again = llava(tmp_path)
    again.open("train")
    assert list(again.table("train")) == list(whole.table("train"))
    assert [path.name for path in (cache / "annotations").glob(".chat*.part")] == []


def test_without_a_cache_annotations_are_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder would be")
    write_json(tmp_path / "chat.json", records())
    with caplog.at_level(logging.WARNING):
        whole, other = both(tmp_path, monkeypatch)
    assert list(other.table("train")) == list(whole.table("train"))
    told = [entry.getMessage() for entry in caplog.records if "VISEXPERT_CACHE" in entry.getMessage()]
    assert len(told) == 1 and str(cache) in told[0]


def _open(root: Path, made: Any) -> None:
    stream = stream_json_list

    def counted(path: Path) -> Any:
        with made.get_lock():
            made.value += 1
        return stream(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "INDEX_FROM", 0)
        patch.setattr(index, "stream_json_list", counted)
        llava(root).open("train")


def test_one_process_parses_and_others_wait(tmp_path: Path) -> None:
    write_json(tmp_path / "chat.json", records())
    context = multiprocessing.get_context("fork")
    made = context.Value("i", 0)
    processes = [context.Process(target=_open, args=(tmp_path, made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert made.value == 1


STREAMED = [
    "[]",
    " [ 1 , 22,3.5e1 ] \n",
    '\ufeff[{"a": "[é,]"}, null]',
    '{"a": 1}\n\n{"a": 2}\r\n',
    '{"a": 1}\n{"a"}\n{',
]
REFUSED = ["", "[1, 2", "[1,]", "[1 2]", "[1][2]", "[] x", '{"a":\n 1}', '{"a": 1}', "7", "[" * 200_000, '["\x01"]']


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("text", STREAMED)
def test_streaming_reads_what_reading_the_whole_file_reads(
    tmp_path: Path, text: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visexpert.data.annotations._CHUNK", chunk)
    path = tmp_path / "some.json"
    path.write_text(text, newline="")
    whole = read_json_list(path)
    streamed = list(stream_json_list(path))
    assert [place for place, _ in streamed] == [whole.place(row) for row in range(len(whole))]
    assert [repr(value) for _, value in streamed] == [repr(value) for value in whole]


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_streamed_is_left_to_the_whole_reader(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(StreamError):
        list(stream_json_list(path))

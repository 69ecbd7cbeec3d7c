"""Broken images and records: skipped, counted once, listed, fatal above the limit."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.formats import tokenizer_folder, write_karpathy
from tests.data.recorder import Recorder, trainer
from visexpert.data import COCOCaptions, MixedData
from visexpert.data.annotations import read_json, read_json_lines, read_json_list
from visexpert.data.faults import FaultLog
from visexpert.data.needs import TokenizerNeed, load_tokenizer, missing_images
from visexpert.errors import ConfigError, DataError, WeightsError
from visexpert.types import Skipped


def faults(*keys: str) -> list[Skipped]:
    return [Skipped(key, f"{key} is broken.") for key in keys]


def test_each_record_counts_once(tmp_path: Path) -> None:
    log = FaultLog("COCO train", total=100, limit=0.02, file=tmp_path / "run" / "skipped.jsonl")
    log.add(faults("a", "a"))
    log.add(faults("b", "a"))
    assert len(log) == 2
    with pytest.raises(
        DataError, match=r"3 of the 100 records of COCO train.*max_broken=0.02.*skipped.jsonl.*c is broken"
    ):
        log.add(faults("c"))
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c"]


def test_a_continued_run_lists_nothing_twice(tmp_path: Path) -> None:
    file = tmp_path / "skipped.jsonl"
    FaultLog("x", total=100, limit=1.0, file=file).add(faults("a"))
    with file.open("a") as out:
        out.write('{"source": "x", "ke')  # killed while it wrote
        out.write("\n")
    again = FaultLog("x", total=100, limit=1.0, file=file)
    again.add(faults("a", "b"))
    FaultLog("y", total=100, limit=1.0, file=file).add(faults("a"))
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
    assert [(json.loads(line)["source"], json.loads(line)["key"]) for line in lines] == [
        ("x", "a"),
        ("x", "b"),
        ("y", "a"),
    ]


def coco(root: Path, *, max_broken: float, num_workers: int = 0, batch_size: int = 4) -> COCOCaptions:
    images = [("train", "train2014", "red", ["a dog"])] * 12 + [("test", "val2014", "blue", ["a cat"])] * 3
    images.append(("val", "val2014", "blue", ["a cat"]))
    write_karpathy(root, images)
    for number, folder in ((2, "train2014"), (7, "train2014"), (12, "val2014")):
        path = root / folder / f"COCO_{folder}_{number:012d}.jpg"
        path.write_bytes(path.read_bytes()[:100])
    (root / "train2014" / "COCO_train2014_000000000009.jpg").unlink()
    return COCOCaptions(
        root=str(root),
        tokenizer=tokenizer_folder(root / "words"),
        image_size=8,
        batch_size=batch_size,
        eval_batch_size=1,
        num_workers=num_workers,
        max_broken=max_broken,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_left_out_and_listed_in_the_run(tmp_path: Path, num_workers: int) -> None:
    recorder = Recorder()
    data = coco(tmp_path, max_broken=0.4, num_workers=num_workers)
    fitting = trainer(tmp_path / "run", max_epochs=2)
    fitting.fit(recorder, data)
    assert sorted(row for _, rows in recorder.shown[:3] for row in rows) == [0, 1, 3, 4, 5, 6, 8, 10, 11]
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["source"] for entry in listed] == ["COCOCaptions train"] * 3
    assert {int(entry["key"][-7:-4]) for entry in listed} == {2, 7, 9}
    recorder.scored.clear()
    fitting.test(recorder, data, verbose=False)
    assert recorder.scored == [("", [1]), ("", [2])]  # a batch of one broken image is passed over


def test_too_many_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="3 of the 12 records of COCOCaptions train cannot be used, more than max_broken"
    ):
        trainer(tmp_path / "run", max_epochs=1).fit(Recorder(), coco(tmp_path, max_broken=0.2))


def test_a_training_batch_without_a_single_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="None of the 1 images of a training batch"):
        trainer(tmp_path / "run", max_epochs=1).fit(Recorder(), coco(tmp_path, max_broken=1.0, batch_size=1))


def test_annotations_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(DataError, match="do not exist"):
        read_json_lines(tmp_path / "none.jsonl")
    path = tmp_path / "a.json"
    path.write_text('{"images": 3')
    with pytest.raises(DataError, match="cannot be read"):
        read_json(path)
    path.write_text('{"images": 3}')
    with pytest.raises(DataError, match="list under images"):
        read_json_list(path, "images")


def test_missing_images_are_found_file_by_file_or_by_folder(tmp_path: Path) -> None:
    paths = [str(tmp_path / "many" / f"{k}.jpg") for k in range(100)] + [str(tmp_path / "few" / "a.jpg")]
    (tmp_path / "many").mkdir()
    for path in paths[:99]:
        Path(path).touch()
    assert missing_images(paths) == paths[99:]


def test_tokenizers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer.json, .*`hf download lmsys/vicuna-7b-v1.5`"):
        load_tokenizer("lmsys/vicuna-7b-v1.5")
    with pytest.raises(WeightsError, match="no tokenizer.json, .* in "):
        load_tokenizer(str(tmp_path))
    for name in ("hf:../x", "lmsys/vicuna-7b-v1.5", str(tmp_path)):  # data check goes on behind each
        assert TokenizerNeed(name).found is None and name in TokenizerNeed(name).sentence
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_disk_that_hangs_ends_the_reading_after_worker_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    """A worker that is stopped in the middle of an image, as one that waits for a network drive."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    data: Any = coco(tmp_path, max_broken=0.0, num_workers=1)
    if mixed:
        data = MixedData(sources={"coco": data}, train={"coco": None}, worker_timeout=0.5)
    else:
        data.settings = replace(data.settings, worker_timeout=0.5)
    monkeypatch.setattr("visexpert.data.images.check_regular", lambda path: os.kill(os.getpid(), signal.SIGSTOP))
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(DataError, match=r"0\.5 s.*worker_timeout"):
        next(iter(data.train_dataloader()))


def test_a_time_to_wait_is_none_or_positive(tmp_path: Path) -> None:
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"worker_timeout is {seconds}"):
            COCOCaptions(root=str(tmp_path), worker_timeout=seconds)


def test_a_list_that_is_no_text_counts_for_nothing(tmp_path: Path) -> None:
    """As a crash of the machine may leave it; and a line that a kill cut stays by itself."""
    file = tmp_path / "skipped.jsonl"
    file.write_bytes(b'{"source": "x", "key": "a", "reason": "r"}\n\xff\xfe\n' + b'{"source": "x", "ke')
    FaultLog("x", total=100, limit=1.0, file=file).add(faults("a", "b"))
    last = file.read_bytes().splitlines()[-1]
    assert json.loads(last)["key"] == "b" and len(file.read_bytes().splitlines()) == 4

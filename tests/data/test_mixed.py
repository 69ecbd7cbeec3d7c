"""Several sources in one run: turns by weight, resumption, evaluation under their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.formats import tokenizer_folder, write_json_lines, write_karpathy, write_shards
from tests.data.recorder import Recorder, trainer
from visexpert.data import CC3M, POPE, VSR, COCOCaptions, MixedData
from visexpert.errors import ConfigError, DataError

IMAGES = [("train", "train2014", "red", ["a dog"])] * 6 + [("val", "val2014", "green", ["a bird"])] * 2


def write_all(root: Path) -> None:
    write_karpathy(root / "coco", [*IMAGES, ("test", "val2014", "blue", ["a cat"])])
    write_shards(root / "cc3m", [8, 10])
    for kind in ("random", "popular", "adversarial"):
        name = "COCO_val2014_000000000008.jpg"
        record = {"question_id": 1, "image": name, "text": "is there a cat", "label": "yes"}
        write_json_lines(root / "pope" / f"coco_pope_{kind}.json", [record])


def mixed(root: Path, **options: Any) -> MixedData:
    sources = {
        "coco": COCOCaptions(root=str(root / "coco"), order_seed=3),
        "cc3m": CC3M(root=str(root / "cc3m"), train="{00000..00001}.tar", order_seed=3),
        "pope": POPE(root=str(root / "pope"), images=str(root / "coco")),
    }
    settings: dict[str, Any] = {
        "train": {"coco": None, "cc3m": None},
        "val": ["coco"],
        "test": ["coco", "pope"],
        "image_size": 8,
        "batch_size": 2,
        "num_workers": 0,
        "tokenizer": tokenizer_folder(root / "words"),
    }
    return MixedData(sources=sources, **(settings | options))


def fit(root: Path, data: MixedData, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer(root / "run", **options).fit(recorder, data)
    return recorder


def test_each_source_gets_its_share_evenly(tmp_path: Path) -> None:
    write_all(tmp_path)
    shown = fit(tmp_path, mixed(tmp_path), max_epochs=1).shown
    assert Counter(split for split, _ in shown) == {"coco/train": 3, "cc3m/train": 9}
    assert sorted(row for split, rows in shown if split == "coco/train" for row in rows) == list(range(6))
    assert len({row for split, rows in shown if split == "cc3m/train" for row in rows}) == 18
    places = [place for place, (split, _) in enumerate(shown) if split == "coco/train"]
    assert [b - a for a, b in zip(places, places[1:], strict=False)] == [4, 4]
    weighted = fit(tmp_path, mixed(tmp_path, train={"coco": 3.0, "cc3m": 1.0}), max_epochs=1).shown
    assert Counter(split for split, _ in weighted) == {"coco/train": 9, "cc3m/train": 3}
    rows = Counter(row for split, rows in weighted if split == "coco/train" for row in rows)
    assert set(rows.values()) == {3}  # three epochs of it


@pytest.mark.parametrize("stop", [1, 5, 12, 17])
def test_a_stopped_run_goes_on_with_the_same_batches(tmp_path: Path, stop: int) -> None:
    write_all(tmp_path)
    whole = fit(tmp_path, mixed(tmp_path), max_epochs=2).shown
    assert len(whole) == 24
    first = Recorder()
    stopped = trainer(tmp_path / "run", max_steps=stop)
    stopped.fit(first, mixed(tmp_path))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    second = Recorder()
    goes_on = trainer(tmp_path / "run", max_epochs=-1, max_steps=24)
    goes_on.fit(second, mixed(tmp_path), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.shown + second.shown == whole


def test_evaluation_names_its_sources_where_there_are_several(tmp_path: Path) -> None:
    write_all(tmp_path)
    recorder = Recorder()
    data = mixed(tmp_path)
    fitting = trainer(tmp_path / "run", max_epochs=1, num_sanity_val_steps=0)
    fitting.fit(recorder, data)
    assert recorder.scored == [("", [0, 1])]
    recorder.scored.clear()
    fitting.test(recorder, data, verbose=False)
    assert recorder.scored == [("coco", [0]), ("pope", [0])]


def test_images_are_addressed_by_source(tmp_path: Path) -> None:
    write_all(tmp_path)
    data = mixed(tmp_path, train={"coco": 1.0})
    data.setup()
    assert set(data.image_sources()) == {"coco/train", "coco/val", "coco/test", "pope/test"}
    streaming = mixed(tmp_path)
    streaming.setup("fit")
    batch = next(iter(streaming.sources["cc3m"].loader("train")))
    assert batch.split == "cc3m/train"
    images = streaming.image_sources()["cc3m/train"]
    assert torch.equal(images.read(batch.index_B.tolist()), batch.images_BCHW)


def test_settings_are_given_to_all_sources(tmp_path: Path) -> None:
    data = mixed(tmp_path, eval_batch_size=7)
    assert {source.settings.eval_batch_size for source in data.sources.values()} == {7}
    assert {source.settings.image_size for source in data.sources.values()} == {8}
    assert mixed(tmp_path).sources["coco"].settings.eval_batch_size == 64


def test_what_is_missing_names_the_source(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    with pytest.raises(DataError, match=r"^COCOCaptions \(coco\): Karpathy's split"):
        data.prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": {"coca": 1.0}}, "train names 'coca', but the sources are coco, cc3m, pope"),
        ({"train": {"pope": 1.0}}, r"pope \(POPE\) has no train part"),
        ({"val": ["cc3m"]}, r"cc3m \(CC3M\) has no val part"),
        ({"train": {"coco": 0.0}}, "must be above 0"),
        ({"train": None, "val": None, "test": None}, "uses none of its sources"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixed(tmp_path, **options)


def test_sources_read_with_one_tokenizer(tmp_path: Path) -> None:
    sources = {"a": POPE(root="a", tokenizer="x"), "b": POPE(root="b", tokenizer="y")}
    with pytest.raises(ConfigError, match="different tokenizers"):
        MixedData(sources=dict(sources), test=["a", "b"])


def test_it_is_built_from_a_configuration(tmp_path: Path, parse_data: Callable[[dict[str, Any]], Any]) -> None:
    source = {"class_path": "visexpert.data.VSR", "init_args": {"root": str(tmp_path), "answers": ["true", "false"]}}
    data = parse_data(
        {"class_path": "visexpert.data.MixedData", "init_args": {"sources": {"vsr": source}, "test": ["vsr"]}}
    )
    assert isinstance(data, MixedData) and data.sources["vsr"].label == "vsr"
    vsr = data.sources["vsr"]
    assert isinstance(vsr, VSR) and vsr.answers == ("true", "false")
    assert data.val_dataloader() == []
    with pytest.raises(ConfigError, match="nothing to train on"):
        data.train_dataloader()

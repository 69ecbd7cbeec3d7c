"""CC3M from tar shards as img2dataset writes them: content, order, resumption, faults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.formats import jpeg_bytes, tokenizer_folder, write_json, write_shard, write_shards
from tests.data.recorder import Recorder, trainer
from visexpert import trust
from visexpert.data import CC3M, shards
from visexpert.data.shard_loader import ShardLoader
from visexpert.data.source import AugmentSettings
from visexpert.errors import ConfigError, DataError
from visexpert.types import Batch

COUNTS = [5, 9, 4, 8]


def cc3m(root: Path, **options: Any) -> CC3M:
    settings: dict[str, Any] = {
        "train": "{00000..00003}.tar",
        "image_size": 8,
        "batch_size": 3,
        "num_workers": 0,
        "shuffle_window": 6,
        "order_seed": 1,
    }
    return CC3M(root=str(root), **(settings | options))


def loader(root: Path, *, rank: int = 0, world: int = 1, position: int | None = None, **options: Any) -> ShardLoader:
    data = cc3m(root, **options)

    class Placed(CC3M):
        process = (rank, world)

    data.__class__ = Placed
    return data.loader("train", position=None if position is None else lambda: position)


def rows(batches: Sequence[Batch] | ShardLoader) -> list[list[int]]:
    return [batch.index_B.tolist() for batch in batches]


def test_a_record_is_an_image_with_its_caption(tmp_path: Path) -> None:
    write_shards(tmp_path, COUNTS)
    data = cc3m(tmp_path, tokenizer=tokenizer_folder(tmp_path / "words"), val="00001.tar", eval_batch_size=4)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [item.answer for batch in batches for (item,) in batch.items] == [f"record 1 {k}" for k in range(9)]
    assert {item.kind for batch in batches for (item,) in batch.items} == {"caption"}
    grays = [round(float(image.float().mean())) for batch in batches for image in batch.images_BCHW]
    assert all(abs(gray - 10 * k) <= 2 for k, gray in enumerate(grays))
    assert batches[0].text is not None and batches[0].split == "val"
    train = next(iter(data.train_dataloader()))
    assert train.images_BCHW.shape == (3, 3, 8, 8) and train.items == ()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_epoch_goes_on_with_the_same_records(tmp_path: Path, num_workers: int) -> None:
    write_shards(tmp_path, COUNTS)
    whole = [rows(loader(tmp_path, num_workers=num_workers, position=8 * epoch)) for epoch in (0, 1)]
    assert [len(epoch) for epoch in whole] == [8, 8] and whole[0] != whole[1]
    assert len({row for batch in whole[0] for row in batch}) == 24
    endless = whole[0] + whole[1]
    for stop in (1, 3, 6, 7) if not num_workers else (5,):
        assert rows(loader(tmp_path, num_workers=num_workers, position=stop)) == endless[stop : stop + 8]


@pytest.mark.parametrize(("world", "num_workers"), [(2, 0), (2, 2), (4, 1)])
def test_ranks_and_workers_read_each_record_once(tmp_path: Path, world: int, num_workers: int) -> None:
    write_shards(tmp_path, [6, 6, 12, 0])
    read = [
        row
        for rank in range(world)
        for batch in rows(loader(tmp_path, rank=rank, world=world, num_workers=num_workers))
        for row in batch
    ]
    assert sorted(read) == list(range(24))


@pytest.mark.parametrize("stop", [3, 8, 13])
def test_a_stopped_run_goes_on_with_the_same_batches(tmp_path: Path, stop: int) -> None:
    write_shards(tmp_path, COUNTS)
    uninterrupted = Recorder()
    trainer(tmp_path, max_epochs=2).fit(uninterrupted, cc3m(tmp_path))
    assert len(uninterrupted.shown) == 16
    first = Recorder()
    stopped = trainer(tmp_path, max_steps=stop)
    stopped.fit(first, cc3m(tmp_path))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    second = Recorder()
    goes_on = trainer(tmp_path, max_epochs=-1, max_steps=16)
    goes_on.fit(second, cc3m(tmp_path), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.shown + second.shown == uninterrupted.shown
    assert torch.equal(second.weight, uninterrupted.weight)


def test_another_order_than_the_interrupted_one_is_told(tmp_path: Path) -> None:
    write_shards(tmp_path, COUNTS)
    state = loader(tmp_path).state_dict()
    loader(tmp_path).load_state_dict(state)
    with pytest.warns(UserWarning, match="'seed': 1.*'seed': 2"):
        loader(tmp_path, order_seed=2).load_state_dict(state)


def test_other_workers_go_on_in_the_order_of_the_interrupted_run(tmp_path: Path) -> None:
    write_shards(tmp_path, COUNTS)
    state, whole = loader(tmp_path, num_workers=2).state_dict(), rows(loader(tmp_path, num_workers=2, position=0))
    alone = loader(tmp_path, position=0)
    assert rows(alone) != whole
    alone.load_state_dict(state)
    assert rows(alone) == whole


def test_shards_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.PIPE, "1")
    write_shards(tmp_path / "far", COUNTS)
    sizes = write_json(tmp_path / "sizes.json", {f"0000{k}.tar": count for k, count in enumerate(COUNTS)})
    url = f"pipe:cat {tmp_path}/far/{{00000..00003}}.tar"
    here = rows(loader(tmp_path / "far"))
    assert rows(loader(tmp_path, train=url, sizes=str(sizes))) == here
    with pytest.raises(ConfigError, match="sizes"):
        loader(tmp_path, train="https://host/{00000..00003}.tar")


def test_a_missing_shard_is_named_with_its_source(tmp_path: Path) -> None:
    write_shards(tmp_path, COUNTS[:3])
    with pytest.raises(DataError, match=r"A shard of CC3M should be at .*00003.tar; get it from .*img2dataset"):
        cc3m(tmp_path).prepare_data()


def test_a_share_takes_whole_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, COUNTS)
    data = cc3m(tmp_path, train_fraction=0.5)
    assert len(data.shards("train")) == 2 and set(data.shards("train")) < set(cc3m(tmp_path).shards("train"))


def broken_shards(root: Path) -> None:
    good = jpeg_bytes("red")
    samples: list[tuple[str, bytes | None, str | None]] = [(f"0{k}", good, "a dog") for k in range(20)]
    samples[3] = ("03", good[: len(good) // 2], "cut short")
    samples[7] = ("07", None, "no image")
    samples[11] = ("11", good, " ")
    write_shard(root / "00000.tar", samples)
    write_json(root / "00000_stats.json", {"successes": 20})


def test_broken_records_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    broken_shards(tmp_path)
    recorder = Recorder()
    words = tokenizer_folder(tmp_path / "words")
    data = cc3m(tmp_path, train="00000.tar", max_broken=0.15, batch_size=5, tokenizer=words)
    trainer(tmp_path / "run", max_epochs=3).fit(recorder, data)
    assert sorted(row for _, batch in recorder.shown[:4] for row in batch) == [
        k for k in range(20) if k not in (3, 7, 11)
    ]
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert {entry["key"].rsplit(":")[-1] for entry in entries} == {"3", "7", "11"} and len(entries) == 3  # once each
    reasons = " ".join(entry["reason"] for entry in entries)
    assert "cannot be read" in reasons and "has no image" in reasons and "has an empty caption" in reasons


def test_too_many_broken_records_end_the_run(tmp_path: Path) -> None:
    broken_shards(tmp_path)
    with pytest.raises(DataError, match=r"3 of the 20 records of CC3M train cannot be used, more than max_broken=0.1"):
        words = tokenizer_folder(tmp_path / "words")
        data = cc3m(tmp_path, train="00000.tar", max_broken=0.1, batch_size=5, tokenizer=words)
        trainer(tmp_path / "run", max_epochs=1).fit(Recorder(), data)


def test_a_shard_with_fewer_records_than_noted(tmp_path: Path) -> None:
    write_shards(tmp_path, [4], stats=False)
    write_json(tmp_path / "00000_stats.json", {"successes": 6})
    batches = list(loader(tmp_path, train="00000.tar", max_broken=0.5))
    assert sorted(row for batch in rows(batches) for row in batch) == [0, 1, 2, 3]
    skipped = [fault.reason for batch in batches for fault in batch.skipped]
    assert len(skipped) == 2 and all("ends before record" in reason for reason in skipped)


def test_the_store_reads_each_record_under_the_row_that_batches_name(tmp_path: Path) -> None:
    write_shards(tmp_path, COUNTS)
    data = cc3m(tmp_path)
    data.setup("fit")
    images = data.image_sources()["train"]
    assert len(images) == sum(COUNTS)
    for batch in [*data.loader("train"), *data.plain_batches("train"), *data.plain_batches("train", most=6)]:
        assert torch.equal(images.read(batch.index_B.tolist()), batch.images_BCHW)


def test_reading_on_opens_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, COUNTS)
    data = cc3m(tmp_path)
    data.setup("fit")
    opened: list[str] = []
    iterate = shards.iterate_shard

    def counted(url: str) -> Iterator[Any]:
        opened.append(Path(url).name)
        return iterate(url)

    monkeypatch.setattr(shards, "iterate_shard", counted)
    images = data.image_sources()["train"]
    for start in range(0, sum(COUNTS), 4):
        images.read(range(start, min(start + 4, sum(COUNTS))))
    assert opened == [f"{shard:05}.tar" for shard in range(4)]


def test_what_the_store_keeps_of_shards_depends_on_files_and_pixels(tmp_path: Path) -> None:
    write_shards(tmp_path, COUNTS)

    def fingerprint(**options: Any) -> str:
        data = cc3m(tmp_path, **options)
        data.setup("fit")
        return data.image_sources()["train"].fingerprint

    before = fingerprint()
    assert before == fingerprint(batch_size=2, order_seed=7) != fingerprint(image_size=16)
    assert fingerprint(resize="pad") != before
    write_shards(tmp_path, [5, 9, 4, 7])
    assert fingerprint() != before


def test_augmented_records_are_not_stored_and_broken_ones_are_black(tmp_path: Path) -> None:
    red = jpeg_bytes("red")
    write_shard(tmp_path / "00000.tar", [("0", red, "a"), ("1", b"no image", "b"), ("2", red, "c")])
    data = cc3m(tmp_path, train="00000.tar")
    data.setup("fit")
    images = data.image_sources()["train"].read([0, 1, 2])
    assert torch.equal(images[0], images[2]) and images[0].any() and not images[1].any()
    augmented = cc3m(tmp_path, train="00000.tar", augment=AugmentSettings(flip=True))
    augmented.setup("fit")
    with pytest.raises(ConfigError, match="store.folder to null"):
        augmented.image_sources()["train"].read([0])


@pytest.mark.parametrize("options", [{"num_val": 3}, {"shuffle_window": 0}, {"batch_size": 0}, {"max_broken": 2.0}])
def test_settings_that_cannot_be(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        cc3m(tmp_path, **options)


def test_what_a_damaged_shard_lacks_is_passed_over(tmp_path: Path) -> None:
    write_shards(tmp_path, [10, 10, 10, 10])
    whole = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(whole[: len(whole) * 15 // 100])
    options: dict[str, Any] = {"max_broken": 0.3, "shuffle_window": 2, "batch_size": 2}
    uninterrupted = Recorder()
    trainer(tmp_path / "run", max_epochs=2).fit(uninterrupted, cc3m(tmp_path, **options))
    assert [len(batch) > 0 for _, batch in uninterrupted.shown] == [True] * 40
    read = {row for _, batch in uninterrupted.shown for row in batch}
    left = {row for row in read if 20 <= row < 30}
    assert len(read - left) == 30 and 0 < len(left) < 5 and left == set(range(20, 20 + len(left)))
    first = Recorder()
    stopped = trainer(tmp_path / "run", max_steps=19)
    stopped.fit(first, cc3m(tmp_path, **options))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    second = Recorder()
    goes_on = trainer(tmp_path / "run", max_epochs=-1, max_steps=40)
    goes_on.fit(second, cc3m(tmp_path, **options), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.shown + second.shown == uninterrupted.shown

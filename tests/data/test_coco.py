"""COCO captions from files in Karpathy's and COCO's own form, against what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.formats import close_to, tokenizer_folder, write_coco, write_jpeg, write_karpathy
from visexpert.data import COCOCaptions
from visexpert.data.source import AugmentSettings
from visexpert.errors import ConfigError, DataError
from visexpert.types import IGNORE_INDEX, Batch

IMAGES = [
    ("train", "train2014", "red", ["A dog sits on the mat.", "a red dog"]),
    ("restval", "val2014", "green", ["two birds fly"]),
    ("val", "val2014", "blue", ["a cat", "the cat sits"]),
    ("test", "val2014", "gray", ["a man", "a man and a hat", "the man"]),
]


def coco(root: Path, **options: Any) -> COCOCaptions:
    settings: dict[str, Any] = {
        "image_size": 8,
        "batch_size": 2,
        "num_workers": 0,
        "tokenizer": tokenizer_folder(root / "words"),
    }
    return COCOCaptions(root=str(root), **(settings | options))


def words(data: COCOCaptions, batch: Batch, row: int = 0, *, answers: bool = True) -> str:
    assert batch.text is not None and data.tokenizer is not None
    ids, labels = batch.text.ids_BN[row], batch.text.labels_BN[row]
    chosen = ids[labels != IGNORE_INDEX] if answers else ids[batch.text.segments_BN[row] > 0]
    return str(data.tokenizer.decode(chosen.tolist()))


def test_karpathys_splits_and_pixels(tmp_path: Path) -> None:
    write_karpathy(tmp_path, IMAGES)
    data = coco(tmp_path)
    data.prepare_data()
    data.setup()
    (test,) = data.test_dataloader()
    assert test.split == "test" and test.index_B.tolist() == [0] and test.source == ""
    assert test.images_BCHW.shape == (1, 3, 8, 8) and test.images_BCHW.dtype == torch.uint8
    assert close_to(test.images_BCHW[0].permute(1, 2, 0), "gray")
    assert test.original_hw_B2 is not None and test.original_hw_B2.tolist() == [[8, 12]]
    ((item,),) = test.items
    assert (item.kind, item.prompt, item.answer) == ("caption", "a picture of", "a man")
    assert item.references == ("a man", "a man and a hat", "the man") and item.generate
    assert words(data, test, answers=False) == "<s> a picture of a man </s>"
    assert words(data, test) == "a man </s>"
    (val,) = data.val_dataloader()
    assert close_to(val.images_BCHW[0].permute(1, 2, 0), "blue") and val.items[0][0].answer == "a cat"


def test_training_draws_one_of_the_captions_each_epoch(tmp_path: Path) -> None:
    write_karpathy(tmp_path, IMAGES)
    data = coco(tmp_path)
    data.setup("fit")
    loader = data.loader("train")
    assert len(loader) == 1
    seen = set()
    for epoch in range(12):
        loader.set_epoch(epoch)
        (batch,) = loader
        assert batch.items == () and sorted(batch.index_B.tolist()) == [0, 1]
        seen.add(words(data, batch, batch.index_B.tolist().index(0)))
        assert words(data, batch, batch.index_B.tolist().index(1)) == "two birds fly </s>"
    assert seen == {"<unk> dog sits on the <unk> </s>", "a red dog </s>"}


def test_restval_may_be_left_out(tmp_path: Path) -> None:
    write_karpathy(tmp_path, IMAGES)
    data = coco(tmp_path, restval=False)
    assert [sample.items[0].answer for sample in data.table("train")] == ["A dog sits on the mat."]


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_official_files(tmp_path: Path, year: str) -> None:
    for part, color, number in (("train", "red", 9), ("val", "blue", 391895)):
        prefix = f"COCO_{part}2014_" if year == "2014" else ""
        name = f"{prefix}{number:012d}.jpg"
        write_jpeg(tmp_path / f"{part}{year}" / name, color)
        image = {"license": 3, "file_name": name, "height": 8, "width": 12, "id": number}
        write_coco(
            tmp_path / "annotations" / f"captions_{part}{year}.json",
            [image],
            [(number, f"the {color} cat\n"), (number, "a cat")],
        )
    data = coco(tmp_path, annotations=year, batch_size=1)
    data.prepare_data()
    data.setup()
    (train,) = data.loader("train")
    assert close_to(train.images_BCHW[0].permute(1, 2, 0), "red")
    (test,) = data.test_dataloader()
    assert test.items[0][0].references == ("the blue cat", "a cat")


def test_a_share_lies_inside_a_larger_one(tmp_path: Path) -> None:
    write_karpathy(tmp_path, [("train", "train2014", "red", [f"dog {k}"]) for k in range(20)])
    chosen = []
    for share in (0.2, 0.5, 1.0):
        table = coco(tmp_path, train_fraction=share).table("train")
        chosen.append({sample.items[0].answer for sample in table})
    assert [len(texts) for texts in chosen] == [4, 10, 20]
    assert chosen[0] < chosen[1] < chosen[2]


def test_rows_are_what_the_feature_store_reads(tmp_path: Path) -> None:
    write_karpathy(tmp_path, IMAGES)
    data = coco(tmp_path)
    data.setup("fit")
    sources = data.image_sources()
    assert set(sources) == {"train", "val"}
    loader = data.loader("train")
    (batch,) = loader
    assert torch.equal(sources["train"].read(batch.index_B.tolist()), batch.images_BCHW)
    before = sources["train"].fingerprint
    assert before == data.image_sources()["train"].fingerprint
    write_jpeg(tmp_path / "train2014" / "COCO_train2014_000000000000.jpg", "gray", size=(20, 20))
    again = coco(tmp_path)
    again.setup("fit")
    assert again.image_sources()["train"].fingerprint != before


def test_augmented_images_are_not_stored(tmp_path: Path) -> None:
    write_karpathy(tmp_path, IMAGES)
    data = coco(tmp_path, augment=AugmentSettings(crop_scale=0.5))
    data.setup("fit")
    sources = data.image_sources()
    with pytest.raises(ConfigError, match="store.folder to null"):
        sources["train"].read([0])
    assert sources["val"].read([0]).shape == (1, 3, 8, 8)


def test_what_is_missing_is_named_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_coco.json.*https://cs.stanford.edu.*37 MB.*2 more"):
        coco(tmp_path).prepare_data()
    write_karpathy(tmp_path, [IMAGES[0]])
    with pytest.raises(
        DataError, match=r"val2014; get it from http://images.cocodataset.org/zips/val2014.zip \(6.6 GB"
    ):
        coco(tmp_path).prepare_data()


def test_broken_records_are_fatal_above_the_limit(tmp_path: Path) -> None:
    path = write_karpathy(tmp_path, [*IMAGES[:3], ("test", "val2014", "red", []), *[IMAGES[3]] * 3])
    with pytest.raises(
        DataError, match=rf"1 of the 4 records.*max_broken=0.1.*images\[3\] of {path} is broken \(it has no"
    ):
        coco(tmp_path, max_broken=0.1).setup("test")
    data = coco(tmp_path, max_broken=0.25)
    assert len(data.table("test")) == 3


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_coco(
        tmp_path / "annotations" / "captions_val2017.json", [{"id": 1, "file_name": "../../secret.jpg"}], [(1, "a cat")]
    )
    with pytest.raises(DataError, match="secret.jpg.*inside"):
        coco(tmp_path, annotations="2017").setup("test")

"""Data sets of Hugging Face's ``datasets``, written by that library, read row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.data.formats import close_to, jpeg_bytes, tokenizer_folder, write_jpeg
from tests.data.recorder import Recorder, trainer
from visexpert.commands.data import findings
from visexpert.data import HuggingFaceData
from visexpert.errors import ConfigError, DataError
from visexpert.planning.amount import data_needs

COLORS = ("red", "green", "blue")
CAPTIONS = ("a red cat", "a green dog", "a blue cat")
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "all": datasets.List(datasets.Value("string")),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "number": datasets.Value("float32"),
    }
)


def rows(images: Sequence[bytes] = tuple(map(jpeg_bytes, COLORS)), **columns: Any) -> datasets.Dataset:
    given = {
        "image": [{"bytes": content, "path": None} for content in images],
        "caption": list(CAPTIONS),
        "all": [[caption, "the image"] for caption in CAPTIONS],
        "label": [0, 1, 0],
        "number": [0.0, 1.0, 2.0],
    }
    return datasets.Dataset.from_dict(given | columns, features=FEATURES)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def saved(root: Path) -> Path:
    rows().save_to_disk(str(root / "saved"))
    return root / "saved"


def hugging(folder: Path | str, **settings: Any) -> HuggingFaceData:
    given = {"image_size": 8, "num_workers": 0, "batch_size": 1, "max_broken": 0.5, "order_seed": 1, **settings}
    return HuggingFaceData(root=str(folder), **given)


def write_layout(kind: str, folder: Path) -> dict[str, str]:
    """Write a set in one of the forms that people have; return the settings that name its splits."""
    if kind == "saved":
        rows().with_format("numpy").save_to_disk(str(folder))
        return {"val": "train"}
    if kind == "splits":
        datasets.DatasetDict(train=rows(), validation=rows()).save_to_disk(str(folder))
        return {"val": "validation"}
    for split in ("train", "test"):
        rows().to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return {"val": "test"}


@pytest.mark.parametrize("kind", ["saved", "splits", "hub"])
def test_images_captions_and_classes_are_those_that_were_written(kind: str, root: Path) -> None:
    given = write_layout(kind, root / "set") | {"label_column": "label", "tokenizer": tokenizer_folder(root / "words")}
    data = hugging(root / "set", **given)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.val_dataloader())
    (batch,) = batches
    assert batch.keys == tuple(f"{given['val']}[{number}]" for number in range(3))
    assert batch.labels == ("cat", "dog", "cat") and batch.text is not None
    assert tuple(item.answer for (item,) in batch.items) == CAPTIONS
    assert all(close_to(image.permute(1, 2, 0), color) for image, color in zip(batch.images_BCHW, COLORS, strict=True))
    stored = data.image_sources()[data.split_of("val")]
    assert (stored.read([2, 0]) == batch.images_BCHW[[2, 0]]).all()
    assert {state for state, _ in findings(data, ["train", "val"], images="some")} == {"ok"}
    assert [(need.what, need.is_here) for need in data_needs(data)] == [(f"The data set {root / 'set'}", True)]
    assert data.training_rows() == 3


def test_images_alone_need_no_text_and_several_captions_are_drawn(saved: Path, root: Path) -> None:
    recorder = Recorder()
    trainer(root / "run", max_epochs=1).fit(recorder, hugging(saved, caption_column="nowhere"))
    assert sorted(row for _, shown in recorder.shown for row in shown) == [0, 1, 2]
    data = hugging(saved, caption_column="all", tokenizer=tokenizer_folder(root / "words"))
    assert data.table("train")[1].items[0].references == ("a green dog", "the image")
    asked = hugging(saved, question_column="caption", answer_column="all", tokenizer=str(root / "words"))
    (item,) = asked.table("train")[1].items
    assert (item.kind, item.prompt, item.references) == ("vqa", "a green dog", ("a green dog", "the image"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"image_column": "photo"}, r"no column 'photo', only image, caption, all, label, number; set image_column"),
        ({"image_column": "number"}, r"'number' is of type float32, but must hold images.*image_column.*\(image"),
        ({"caption_column": "label", "tokenizer": "words"}, r"'label' is of type int64.*text.*\(caption, all\)"),
        ({"label_column": "number"}, r"'number' is of type float32.*classes.*\(caption, label\)"),
        ({"train": "training"}, "no split 'training', only train"),
        ({"val_share": 0.9}, "val_share=0.9 of 3 images"),
    ],
)
def test_wrong_columns_and_splits_are_told_with_those_that_are_there(
    settings: dict[str, Any], told: str, saved: Path
) -> None:
    with pytest.raises(DataError, match=told):
        hugging(saved, **settings).open("train")


def test_what_is_broken_is_skipped_and_listed(root: Path) -> None:
    content = [jpeg_bytes("red"), b"", jpeg_bytes("blue")]
    rows(content, caption=["a red cat", "x", None]).save_to_disk(str(root / "set"))
    data = hugging(root / "set", val="train", tokenizer=tokenizer_folder(root / "words"), max_broken=0.7)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch.keys == ("train[0]",)
    assert {lost.key for lost in batch.skipped} == {"train[1]", "train[2]"}
    reasons = " ".join(lost.reason for lost in batch.skipped)
    assert "train[1] cannot be read" in reasons and "caption is null" in reasons
    (told,) = [text for state, text in findings(data, ["train"], images="some") if state == "BROKEN"]
    assert "images of 3 rows read, 2 cannot be used" in told
    with pytest.raises(DataError, match="2 of the 3 records .* max_broken=0.5"):
        list(hugging(root / "set", val="train", tokenizer=str(root / "words")).loader("val"))
    assert (data.image_sources()["train"].read([1]) == 0).all()


def test_a_class_that_is_unknown_or_alone_is_told(root: Path) -> None:
    rows(label=[0, -1, 1]).save_to_disk(str(root / "set"))
    with pytest.raises(DataError, match="label is the number -1, which is none of the 2 classes"):
        hugging(root / "set", label_column="label").table("train")[1]
    rows(label=[0, 0, 0]).save_to_disk(str(root / "one"))
    with pytest.raises(DataError, match="train' are of the class 'cat'"):
        hugging(root / "one", label_column="label").open("train")


def test_paths_in_a_column_lead_inside_the_folder(root: Path) -> None:
    write_jpeg(root / "set" / "a.jpg", "red")
    write_jpeg(root / "secret.jpg", "blue")
    names = ["a.jpg", str(root / "set" / "a.jpg"), str(root / "secret.jpg"), "../secret.jpg", "zip://a.jpg::/b.zip"]
    datasets.Dataset.from_dict({"file": names}).to_parquet(str(root / "set" / "train.parquet"))
    data = hugging(root / "set", image_column="file", val="train", max_broken=1.0)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert len(batch) == 2 and [lost.key for lost in batch.skipped] == ["train[2]", "train[3]", "train[4]"]
    assert "archive" in batch.skipped[2].reason


def test_a_set_of_the_hub_is_read_from_the_cache_and_never_fetched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORG/NAME", "hf:ORG/NAME@v1"):
        with pytest.raises(DataError, match=r"'ORG/NAME' is not in .*hf download --repo-type dataset ORG/NAME"):
            hugging(name).prepare_data()
    with pytest.raises(ConfigError, match="hf:ORG/NAME@REVISION"):
        hugging("hf:a/b/c")
    with pytest.raises(DataError, match="should be a folder at .*nowhere"):
        hugging(root / "nowhere").prepare_data()
    snapshot = root / "snapshot"
    write_layout("hub", snapshot)
    asked: list[tuple[Any, ...]] = []

    def find(repo: str, *, repo_type: str, revision: str | None, local_files_only: bool) -> str:
        asked.append((repo, repo_type, revision, local_files_only))
        return str(snapshot)

    monkeypatch.setattr("visexpert.data.needs.snapshot_download", find)
    assert len(hugging("hf:ORG/NAME@v1").table("train")) == 3
    assert set(asked) == {("ORG/NAME", "dataset", "v1", True)}


def test_damaged_and_foreign_folders_are_one_sentence(root: Path, saved: Path) -> None:
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="empty cannot be read as a data set"):
        hugging(root / "empty").open("train")
    next(saved.glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(DataError, match="saved cannot be read as a data set"):
        hugging(saved).open("train")
    write_layout("hub", root / "set")
    with pytest.raises(ConfigError, match="subset is 'fine'.*default"):
        hugging(root / "set", subset="fine").open("train")
    parts = (
        "configs:",
        "- config_name: a",
        "  data_files: data/train-*",
        "- config_name: b",
        "  data_files: data/test-*",
    )
    (root / "set" / "README.md").write_text("\n".join(["---", *parts, "---", ""]), encoding="utf-8")
    for subset in (None, "c"):
        with pytest.raises(ConfigError, match=f"subset is {subset!r}, but .* has a, b"):
            hugging(root / "set", subset=subset).open("train")
    assert len(hugging(root / "set", subset="b").table("train")) == 3
    (root / "set" / "README.md").unlink()
    (root / "set" / "data" / "train-00000-of-00001.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="set cannot be read as a data set"):
        hugging(root / "set").open("train")


@pytest.mark.parametrize("name", ["https://host/x.parquet", "/etc/passwd", "../x.csv", "hf://datasets/a/b/x.parquet"])
def test_a_card_names_no_data_elsewhere(name: str, root: Path) -> None:
    write_layout("hub", root / "set")
    lines = (
        "---",
        "configs:",
        "- config_name: a",
        "  data_files:",
        "  - split: train",
        f"    path: [{name}]",
        "---",
        "",
    )
    (root / "set" / "README.md").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=f"README.md names data at {name}"):
        hugging(root / "set").open("train")


def test_rows_stay_on_disk_and_their_identity_is_that_of_the_files(root: Path) -> None:
    many = rows([jpeg_bytes(COLORS[number % 3]) for number in range(3)])
    many.save_to_disk(str(root / "set"))
    data = hugging(root / "set")
    data.open("train")
    stored = data.image_sources()["train"]
    same = hugging(root / "set")
    same.open("train")
    assert stored.fingerprint == same.image_sources()["train"].fingerprint
    other = hugging(root / "set", train_fraction=0.4)
    other.open("train")
    assert other.image_sources()["train"].fingerprint != stored.fingerprint
    rows([jpeg_bytes("blue")] * 3).save_to_disk(str(root / "next"))
    changed = hugging(root / "next")
    changed.open("train")
    assert changed.image_sources()["train"].fingerprint != stored.fingerprint


def test_workers_and_processes_share_the_rows(root: Path) -> None:
    images = [jpeg_bytes("red")] * 9
    given = {"caption": ["x"] * 9, "all": [["x"]] * 9, "label": [0] * 9, "number": [0.0] * 9}
    rows(images, **given).save_to_disk(str(root / "set"))
    seen: list[int] = []
    for rank in range(2):

        class Placed(HuggingFaceData):
            process = (rank, 2)

        data = hugging(root / "set", val_share=0.1, num_workers=2, batch_size=2)
        data.__class__ = Placed
        seen += [row for batch in data.loader("train") for row in batch.index_B.tolist()]
    assert sorted(seen) == list(range(8))
    held_out = {sample.key for sample in data.table("val")}
    assert len(held_out) == 1 and held_out.isdisjoint(sample.key for sample in data.table("train"))


def test_a_resumed_run_continues_with_the_rows_that_were_due(root: Path) -> None:
    datasets.concatenate_datasets([rows(), rows()]).save_to_disk(str(root / "set"))

    def run(folder: str, steps: int, ckpt: Path | None = None) -> list[tuple[str, list[int]]]:
        recorder, runner = Recorder(), trainer(root / folder, max_steps=steps)
        runner.fit(recorder, hugging(root / "set"), ckpt_path=ckpt)
        runner.save_checkpoint(root / f"{folder}.ckpt")
        return recorder.shown

    whole = run("whole", 8)
    assert run("cut", 4) + run("rest", 8, root / "cut.ckpt") == whole and len(whole) == 8


def test_images_of_all_modes_are_read_as_from_files(root: Path) -> None:
    pictures = [Image.new("CMYK", (8, 8), (0, 255, 255, 0)), Image.new("L", (8, 8), 255)]
    pictures.append(Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)))
    datasets.Dataset.from_dict({"image": pictures}).save_to_disk(str(root / "set"))
    data = hugging(root / "set")
    data.open("train")
    images = data.image_sources()["train"].read([0, 1, 2]).float().mean(dim=(2, 3))
    assert images.round().tolist()[1:] == [[255] * 3] * 2 and images[0, 0] > 245 and images[0, 1:].max() < 10

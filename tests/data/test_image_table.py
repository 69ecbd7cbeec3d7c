"""Images of one's own from CSV, TSV, JSON and folders, held against what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.formats import tokenizer_folder, write_jpeg, write_json, write_json_lines
from visexpert.commands.data import findings
from visexpert.data import ImageTable
from visexpert.errors import ConfigError, DataError

CSV = 'image,caption,note\na.jpg,"a red image , it is red",x\nb.jpg,a blue dog,y\na.jpg,the red image,z\n'
TEXTS = {"a.jpg": ("a red image , it is red", "the red image"), "b.jpg": ("a blue dog",)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, colour in (("a", "red"), ("b", "blue")):
        write_jpeg(tmp_path / f"{name}.jpg", colour)
    tokenizer_folder(tmp_path / "tokenizer")
    return tmp_path


def table(root: Path, **settings: Any) -> ImageTable:
    given = {"tokenizer": str(root / "tokenizer"), "image_size": 16, "num_workers": 0, "batch_size": 2, **settings}
    return ImageTable(root=str(root), **given)


def texts_of(data: ImageTable, root: Path) -> dict[str, tuple[str, ...]]:
    found = {Path(sample.image or "").relative_to(root).as_posix(): sample.items for sample in data.table("train")}
    return {name: tuple(text for item in items for text in item.references) for name, items in found.items()}


def write_as(kind: str, root: Path) -> str:
    records = [{"image": name, "caption": text} for name, texts in TEXTS.items() for text in texts]
    if kind == "csv":
        (root / "train.csv").write_text("\ufeff" + CSV.replace("\n", "\r\n"), encoding="utf-8")
    elif kind == "tsv":
        lines = ["image\tcaption", *(record["image"] + "\t" + record["caption"] for record in records)]
        (root / "train.tsv").write_text("\n".join(lines), encoding="utf-8")
    elif kind == "jsonl":
        write_json_lines(root / "train.jsonl", records)
    else:
        write_json(root / "train.json", [{"image": name, "caption": list(texts)} for name, texts in TEXTS.items()])
    return f"train.{kind}"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_captions_of_an_image_are_read_together(kind: str, root: Path) -> None:
    data = table(root, train=write_as(kind, root))
    assert texts_of(data, root) == TEXTS
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.images_BCHW.shape == (2, 3, 16, 16) and batch.text is not None


def test_columns_are_named_and_questions_have_all_their_answers(root: Path) -> None:
    write_json_lines(root / "q.jsonl", [{"file": "a.jpg", "q": "what colour is it ?", "a": ["red", "blue"]}])
    data = table(root, train="q.jsonl", image_column="file", question_column="q", answer_column="a")
    ((item,),) = (sample.items for sample in data.table("train"))
    assert (item.kind, item.prompt, item.answer, item.references) == (
        "vqa",
        "what colour is it ?",
        "red",
        ("red", "blue"),
    )


def test_a_folder_brings_its_captions_beside_the_images_or_none(root: Path) -> None:
    for name in ("one", "deep/two"):
        write_jpeg(root / "photos" / f"{name}.jpg", "green")
    (root / "photos" / "one.txt").write_text("a green\n image\n", encoding="utf-8")
    data = table(root, train="photos", max_broken=0.5)
    assert texts_of(data, root) == {"photos/one.jpg": ("a green image",)}
    assert data.fault_logs[0].total == 2 and len(data.fault_logs[0]) == 1  # one has no caption
    alone = table(root, train="photos", tokenizer=None)
    assert texts_of(alone, root) == {"photos/deep/two.jpg": (), "photos/one.jpg": ()}
    alone.setup("fit")
    batch = next(iter(alone.train_dataloader()))
    assert batch.text is None and len(batch) == 2


def test_what_cannot_be_read_is_told_by_its_place(root: Path) -> None:
    (root / "train.csv").write_text("image,caption\na.jpg,a red image\n../b.jpg,x\nb.jpg,one,two\nb.jpg,\n")
    data = table(root, max_broken=1.0)
    assert texts_of(data, root) == {"a.jpg": ("a red image",)}
    (log,) = data.fault_logs
    assert sorted(log._keys) == ["train.csv:Line 3", "train.csv:Line 4", "train.csv:Line 5"]
    (root / "other.csv").write_text("file,text\na.jpg,x\n")
    with pytest.raises(DataError, match=r"no column 'image', only file, text.*image_column"):
        table(root, train="other.csv").open("train")
    with pytest.raises(ConfigError, match=r"train\.xlsx.*\.csv"):
        table(root, train="train.xlsx")
    with pytest.raises(ConfigError, match="question_column='q'"):
        table(root, train="tokenizer", question_column="q").open("train")


def test_data_check_says_what_is_missing(root: Path) -> None:
    write_as("csv", root)
    data = table(root, val="val.csv")
    found = list(findings(data, ["train", "val"], images="some"))
    assert any("val.csv" in text for _, text in found)
    (root / "b.jpg").unlink()
    assert any("b.jpg" in text for _, text in findings(table(root), ["train"], images="all"))

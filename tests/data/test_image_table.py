"""Images of one's own from CSV, TSV, JSON and folders, held against what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.formats import jpeg_bytes, tokenizer_folder, write_jpeg, write_json, write_json_lines
from tests.data.recorder import Recorder, trainer
from visexpert.commands.data import findings
from visexpert.data import ImageTable, MixedData
from visexpert.data.loader import BatchKey
from visexpert.data.source import AugmentSettings
from visexpert.errors import ConfigError, DataError

CSV = 'image,caption,note\na.jpg,"a red image , it is red",x\nb.jpg,a blue dog,y\na.jpg,the red image,z\n'
TEXTS = {"a.jpg": ("a red image , it is red", "the red image"), "b.jpg": ("a blue dog",)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, color in (("a", "red"), ("b", "blue")):
        write_jpeg(tmp_path / f"{name}.jpg", color)
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


def test_a_captioner_finds_the_prompt_of_the_captions(root: Path) -> None:
    assert ImageTable(root=str(root)).prompt == "a picture of" and alone(root, prompt="say").prompt == "say"


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


def names_of(data: ImageTable, part: str = "train") -> list[str]:
    return [Path(sample.image).relative_to(data.root).as_posix() for sample in data.table(part)]


def alone(root: Path, **settings: Any) -> ImageTable:
    return table(root, tokenizer=None, **settings)


@pytest.fixture
def tree(root: Path) -> Path:
    """Two classes; images also lie deeper."""
    for name in ("cats/1.jpg", "cats/deep/2.png", "dogs/1.jpg", "dogs/3.webp"):
        image = Image.new("RGB", (12, 8), "red" if "cats" in name else "blue")
        (root / "v1.5" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / "v1.5" / name)
    return root


def test_a_folder_with_a_dot_in_its_name_is_a_folder(tree: Path) -> None:
    data = alone(tree, train="v1.5")
    assert names_of(data) == [f"v1.5/{name}" for name in ("cats/1.jpg", "cats/deep/2.png", "dogs/1.jpg", "dogs/3.webp")]
    assert [need.path.name for need in data.needs("train")] == ["v1.5"]
    (tree / "v1.5").rename(tree / "set.csv")
    assert len(alone(tree, train="set.csv").table("train")) == 4
    (tree / "list").write_text("image\n")
    with pytest.raises(ConfigError, match=r"train is 'list'.*\.csv"):
        alone(tree, train="list")


def test_class_folders_become_classes_of_evaluation(tree: Path) -> None:
    data = alone(tree, train="v1.5", val="v1.5", class_folders=True)
    data.setup("fit")
    assert [sample.label for sample in data.table("train")] == ["cats", "cats", "dogs", "dogs"]
    (batch,) = data.val_dataloader()
    assert batch.labels == ("cats", "cats", "dogs", "dogs") and batch.text is None
    assert next(iter(data.train_dataloader())).labels == ()
    assert [sample.label for sample in alone(tree, train="v1.5").table("train")] == [""] * 4
    write_jpeg(tree / "v1.5" / "stray.jpg", "red")
    stray = alone(tree, train="v1.5", class_folders=True, max_broken=0.5)
    assert len(stray.table("train")) == 4 and "stray.jpg lies in no folder" in stray.fault_logs[0].first
    with pytest.raises(DataError, match="all images of .*cats are of the class 'deep'"):
        (tree / "v1.5/cats/1.jpg").unlink()
        alone(tree, train="v1.5/cats", class_folders=True).open("train")
    with pytest.raises(ConfigError, match="class_folders needs a folder"):
        alone(tree, train=write_as("csv", tree), class_folders=True).open("train")
    with pytest.raises(ConfigError, match="label_column='x'.*class_folders"):
        alone(tree, train="v1.5", label_column="x").open("train")


def test_a_tree_is_listed_without_what_is_hidden_and_with_what_is_linked(tree: Path) -> None:
    photos = tree / "v1.5"
    for name in (".DS_Store", "._1.jpg", ".thumbs/1.jpg", "__MACOSX/1.jpg", "Thumbs.db", "1.txt"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"x")
    odd = ["Ünï 猫 \n.JPG", "x" * 250 + ".jpg", "a..b.jpg", "café.pgm", "cafe\u0301.pgm"]
    for name in odd:
        Image.new("RGB", (4, 4)).convert("L").save(photos / name, "PPM")
    (photos / "loop").symlink_to(photos)
    (photos / "self").symlink_to(photos / "self")
    (photos / "again").symlink_to(photos / "cats")
    (photos / "gone.jpg").symlink_to(tree / "nowhere.jpg")
    data = alone(tree, train="v1.5", max_broken=0.5)
    linked = ["again/1.jpg", "again/deep/2.png"]
    expected = ["cats/1.jpg", "cats/deep/2.png", "dogs/1.jpg", "dogs/3.webp", "gone.jpg", *linked, *odd]
    assert names_of(data) == [f"v1.5/{name}" for name in sorted(expected)]
    dataset = data.dataset("train")
    batch = dataset[BatchKey(0, np.arange(len(dataset)))]
    assert len(batch) == len(expected) - 1 and [Path(lost.key).name for lost in batch.skipped] == ["gone.jpg"]


def test_a_tree_without_images_says_what_it_has(root: Path) -> None:
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no images.*no files at all"):
        alone(root, train="empty").open("train")
    (root / "empty" / "a.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"has no images \(\.jpg.*only 1 other files"):
        alone(root, train="empty").open("train")


def test_broken_images_are_skipped_and_odd_ones_read(root: Path, tmp_path: Path) -> None:
    photos = root / "photos"
    write_jpeg(photos / "good.jpg", "red")
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.png").write_bytes(b"not an image")
    (photos / "cut.jpg").write_bytes(jpeg_bytes("red", (400, 400))[:700])
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(photos / "cmyk.jpg")
    Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)).save(photos / "deep.png")
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(photos / "moving.gif", save_all=True, append_images=[second])
    turned = Image.new("RGB", (16, 8), "red")
    turned.paste("blue", (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    turned.save(photos / "turned.png", exif=exif)
    data = alone(root, train="photos", val="photos", max_broken=0.5, resize="stretch")
    data.setup("fit")
    (batch,) = data.val_dataloader()
    names = [Path(key).name for key in batch.keys]
    shown = dict(zip(names, batch.images_BCHW.float().mean(dim=(2, 3)), strict=True))
    assert sorted(Path(lost.key).name for lost in batch.skipped) == ["cut.jpg", "empty.jpg", "text.png"]
    (told,) = [text for state, text in findings(data, ["train"], images="sample") if state == "BROKEN"]
    assert "images of 8 rows read, 3 cannot be used" in told and "cut.jpg" in told
    assert shown.keys() == {"good.jpg", "cmyk.jpg", "deep.png", "moving.gif", "turned.png"}
    for name, color in (("cmyk.jpg", (255, 0, 0)), ("deep.png", (255, 255, 255)), ("moving.gif", (255, 0, 0))):
        assert torch.allclose(shown[name], torch.tensor(color).float(), atol=8), name
    image = batch.images_BCHW[names.index("turned.png")].float()
    assert image[0, :6].mean() > 200 and image[2, -6:].mean() > 200  # red above, blue below


def test_a_share_of_the_training_images_is_held_out(root: Path) -> None:
    for number in range(20):
        write_jpeg(root / "photos" / f"{number:02}.jpg", "red")
    data = alone(root, train="photos", val_share=0.2)
    assert data.parts == ("train", "val")
    train, val = names_of(data), names_of(data, "val")
    assert len(train) == 16 and len(val) == 4 and len(set(train) | set(val)) == 20
    later = alone(root, train="photos", val_share=0.2, train_fraction=0.5, num_val=2)
    assert set(names_of(later, "val")) < set(val) and set(names_of(later)) < set(train)
    assert len(names_of(later, "val")) == 2 and len(names_of(later)) == 8
    assert names_of(alone(root, train="photos", val_share=0.2, seed=1), "val") != val
    for wrong in (0.0, 1.0, -0.5):
        with pytest.raises(ConfigError, match=rf"val_share must be in \(0, 1\), got {wrong:g}"):
            alone(root, train="photos", val_share=wrong)
    with pytest.raises(ConfigError, match="val is set, too"):
        alone(root, train="photos", val="photos", val_share=0.5)
    (root / "one.csv").write_text("image\na.jpg\n")
    with pytest.raises(DataError, match="val_share=0.9 of 1 images"):
        alone(root, train="one.csv", val_share=0.9).open("val")


def test_every_process_sees_its_share_once(root: Path) -> None:
    for number in range(11):
        write_jpeg(root / "photos" / f"{number:02}.jpg", "red")
    seen: list[int] = []
    for rank in range(2):

        class Placed(ImageTable):
            process = (rank, 2)

        data = alone(root, train="photos", val_share=0.2)
        data.__class__ = Placed
        batches = list(data.loader("train"))
        assert len(batches) == 2
        seen += [row for batch in batches for row in batch.index_B.tolist()]
    assert len(seen) == len(set(seen)) == 8


def test_classes_of_a_table_are_words_or_numbers(root: Path) -> None:
    (root / "c.csv").write_text("image,kind\na.jpg,cat\nb.jpg,dog\na.jpg,dog\n")
    data = alone(root, train="c.csv", label_column="kind", max_broken=0.5)
    assert [sample.label for sample in data.table("train")] == ["cat", "dog"]
    assert "class of" in data.fault_logs[0].first and "'cat'" in data.fault_logs[0].first
    write_json_lines(root / "c.jsonl", [{"image": "a.jpg", "kind": 0}, {"image": "b.jpg", "kind": [1]}] * 2)
    with pytest.raises(DataError, match="of the class '0'"):
        alone(root, train="c.jsonl", label_column="kind", max_broken=0.5).open("train")
    with pytest.raises(DataError, match=r"no column 'label', only image, kind.*label_column"):
        alone(root, train="c.jsonl", label_column="label").open("train")


def test_images_alone_train_and_resume_with_the_rows_that_were_due(root: Path) -> None:
    for number in range(12):
        write_jpeg(root / "photos" / f"{number:02}.jpg", "red")

    def run(folder: str, ckpt: str | None = None, **limits: int) -> list[tuple[str, list[int]]]:
        recorder, runner = Recorder(), trainer(root / folder, **limits)
        runner.fit(recorder, alone(root, train="photos"), ckpt_path=ckpt)
        runner.save_checkpoint(root / folder / "end.ckpt")
        return recorder.shown

    whole = run("whole", max_steps=10)
    first = run("cut", max_steps=4)
    rest = run("rest", str(root / "cut" / "end.ckpt"), max_steps=10)
    assert len(whole) == 10 and len(first) == 4 and first + rest == whole


def test_training_images_are_read_plainly_for_probes(tree: Path) -> None:
    data = alone(tree, train="v1.5", class_folders=True, augment=AugmentSettings(crop_scale=0.1, flip=True))
    batches = list(data.plain_batches("train"))
    assert [label for batch in batches for label in batch.labels] == ["cats", "cats", "dogs", "dogs"]
    stored = alone(tree, train="v1.5")
    stored.open("train")
    assert (batches[0].images_BCHW == stored.image_sources()["train"].read([0, 1, 2, 3])).all()
    some = [row for batch in data.plain_batches("train", most=3) for row in batch.index_B.tolist()]
    assert len(some) == 3 and some == sorted(set(some)) and max(some) <= 3
    with pytest.raises(DataError, match="nowhere"):
        alone(tree, train="nowhere").plain_batches("train")


def test_a_shared_tokenizer_makes_a_mixture_read_captions(root: Path) -> None:
    """The tokenizer comes after the source was made."""
    own = alone(root, train=write_as("jsonl", root), val=write_as("jsonl", root))
    mixed = MixedData(sources={"own": own}, train={"own": None}, val=["own"], tokenizer=str(root / "tokenizer"))
    mixed.setup("fit")
    batches = list(mixed.val_dataloader())
    assert batches and all(row for batch in batches for row in batch.items)

"""Shards of one's own: images alone, classes, a share for validation."""

from __future__ import annotations

import inspect
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

import visexpert as vx
from tests.data.formats import jpeg_bytes, tokenizer_folder
from tests.data.recorder import Recorder, trainer
from visexpert.commands.data import findings
from visexpert.data import ImageShards
from visexpert.errors import ConfigError

CLASSES = ("cat", "dog", "cat", "dog")


def write_members(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four shards of four images without captions, each with its class."""
    for shard in range(4):
        members: dict[str, bytes] = {}
        for place, label in enumerate(CLASSES):
            members[f"{place}.jpg"] = jpeg_bytes("red")
            members[f"{place}.cls"] = f"{label}\n".encode()
        write_members(tmp_path / f"{shard}.tar", members)
    return tmp_path


def shards(root: Path, **settings: Any) -> ImageShards:
    given = {"train": "{0..3}.tar", "image_size": 8, "num_workers": 0, "batch_size": 4, "order_seed": 1, **settings}
    return ImageShards(root=str(root), **given)


def test_images_alone_need_neither_captions_nor_a_tokenizer(root: Path) -> None:
    recorder = Recorder()
    trainer(root / "run", max_epochs=1).fit(recorder, shards(root))
    assert sum(len(rows) for _, rows in recorder.shown) == 16
    data = shards(root, val="0.tar")
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch.text is None and batch.items == ((),) * 4 and batch.labels == ()
    found = list(findings(data, ["train", "val"], images="some"))
    assert {state for state, _ in found} == {"ok"}
    captioned = shards(root, tokenizer=tokenizer_folder(root / "words"))
    told = [text for state, text in findings(captioned, ["train"], images="some") if state == "BROKEN"]
    assert len(told) == 4 and all("has no caption" in text for text in told)


def test_classes_come_with_the_images(root: Path) -> None:
    data = shards(root, val="0.tar", class_member="cls")
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch.labels == CLASSES
    write_members(root / "0.tar", {"0.jpg": jpeg_bytes("red"), "0.cls": b" ", "1.jpg": jpeg_bytes("red")})
    told = [text for _, text in findings(data, ["val"], images="some")]
    assert any("2 of the first 16 records" in text and "empty class" in text for text in told)


def test_a_share_of_the_shards_is_held_out(root: Path) -> None:
    data = shards(root, val_share=0.25)
    train, val = data.shards("train"), data.shards("val")
    assert len(train) == 3 and len(val) == 1
    assert sorted(train + val) == [str(root / f"{shard}.tar") for shard in range(4)]
    assert shards(root, val_share=0.25).shards("val") == val  # the same ones each time
    assert {tuple(shards(root, val_share=0.25, seed=seed).shards("val")) for seed in range(8)} > {tuple(val)}
    with pytest.raises(ConfigError, match=r"val_share=0\.5 of 1 shards"):
        shards(root, train="0.tar", val_share=0.5).shards("train")
    with pytest.raises(ConfigError, match="val_share"):
        shards(root, val="0.tar", val_share=0.5)
    with pytest.raises(ConfigError, match=r"\(0, 1\), got 1"):
        shards(root, val_share=1.0)


def test_training_images_are_read_plainly_for_probes(root: Path) -> None:
    data = shards(root, class_member="cls", eval_batch_size=8)
    batches = list(data.plain_batches("train"))
    assert [label for batch in batches for label in batch.labels] == list(CLASSES) * 4
    assert len({row for batch in batches for row in batch.index_B.tolist()}) == 16
    some = [label for batch in data.plain_batches("train", most=5) for label in batch.labels]
    assert some == list(CLASSES) * 2  # whole shards


def test_a_test_part_is_read_whole_and_in_order_beside_a_share_for_validation(root: Path) -> None:
    data = shards(root, train="{0..2}.tar", test="3.tar", val_share=0.4, class_member="cls", train_fraction=0.5)
    assert data.shards("test") == [str(root / "3.tar")]
    assert len(data.shards("val")) == 1 and str(root / "3.tar") not in data.shards("train") + data.shards("val")
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert batch.labels == CLASSES and batch.split == "test"
    (again,) = data.predict_dataloader()
    assert again.index_B.tolist() == batch.index_B.tolist() == [0, 1, 2, 3]
    without = shards(root)
    assert without.test_dataloader() == []
    told = [text for state, text in findings(shards(root, test="9.tar"), ["test"], images="some") if state != "ok"]
    assert len(told) == 1 and "9.tar" in told[0]


def test_questions_come_from_json(root: Path) -> None:
    records = [{"q": "what is it ?", "a": ["cat", "kitten"]}, {"q": "where ?", "a": "here"}, {"q": "why ?"}]
    members = {f"{n}.json": json.dumps(record).encode() for n, record in enumerate(records)}
    images = {f"{n}.jpg": jpeg_bytes("red") for n in range(len(records))}
    write_members(root / "0.tar", dict(sorted({**members, **images}.items())))
    keys = {"question_key": "q", "answer_key": "a", "tokenizer": tokenizer_folder(root / "words"), "max_broken": 1.0}
    data = shards(root, val="0.tar", **keys)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    items = [item for (item,) in batch.items]
    assert [(item.kind, item.prompt, item.answer) for item in items] == [
        ("vqa", "what is it ?", "cat"),
        ("vqa", "where ?", "here"),
    ]
    assert items[0].references == ("cat", "kitten") and items[0].generate
    assert batch.skipped and "'a'" in batch.skipped[0].reason and "answer_key" in batch.skipped[0].reason


def test_the_table_of_abilities_names_settings_that_each_class_has() -> None:
    page = Path(__file__).parents[2] / "docs" / "your-data.md"
    table = page.read_text("utf-8").partition("## What each can do")[2].partition("\n\n")[2].partition("\n\n")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    classes = [getattr(vx, re.findall(r"`(\w+)`", cell)[0]) for cell in head[1:]]
    assert classes == [vx.ImageTable, vx.ImageTable, vx.HuggingFaceData, vx.ImageShards]
    named: dict[type, set[str]] = {}
    for row in rows:
        for kind, cell in zip(classes, row[1:], strict=True):
            named.setdefault(kind, set()).update(re.findall(r"`(\w+)`", cell))
    for kind, settings in named.items():
        known = {name for each in kind.__mro__[:-1] for name in inspect.signature(each.__init__).parameters}  # type: ignore[misc]
        assert settings <= known, kind
        own = set(inspect.signature(kind).parameters) - {"kwargs", "root", "sizes", "prompt", "images", "subset"}
        own -= {"image_column", "answer_column", "answer_key", "shuffle_window"}
        assert own <= settings, kind

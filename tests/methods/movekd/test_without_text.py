"""Distillation on images alone, as people have them: no tokenizer, no language model, from fit to test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tests.data.formats import jpeg_bytes, write_jpeg, write_shard
from tests.methods.helpers import bare_trainer
from tests.methods.movekd.helpers import tiny_movekd
from visexpert.callbacks import NearestNeighbors
from visexpert.data import HuggingFaceData, ImageShards, ImageTable, SourceData
from visexpert.language import NoLanguage
from visexpert.methods.settings import StoreSettings

COLORS = ("red", "blue", "red", "blue")
COMMON: dict[str, Any] = {"image_size": 32, "num_workers": 0, "batch_size": 2, "order_seed": 0}


def tree(root: Path) -> SourceData:
    for number, color in enumerate(COLORS):
        write_jpeg(root / "v1.0" / color / f"{number}.jpg", color, (32, 32))
    return ImageTable(root=str(root), train="v1.0", val="v1.0", test="v1.0", class_folders=True, **COMMON)


def table(root: Path) -> SourceData:
    for number, color in enumerate(COLORS):
        write_jpeg(root / f"{number}.jpg", color, (32, 32))
    lines = ["file,kind", *(f"{number}.jpg,{color}" for number, color in enumerate(COLORS))]
    (root / "all.csv").write_text("\n".join(lines), encoding="utf-8")
    given: dict[str, Any] = dict.fromkeys(("train", "val", "test"), "all.csv")
    return ImageTable(root=str(root), image_column="file", label_column="kind", **given, **COMMON)


def hugging_face(root: Path) -> SourceData:
    images = [{"bytes": jpeg_bytes(color, (32, 32)), "path": None} for color in COLORS]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"picture": images, "kind": list(COLORS)}, features=features)
    rows.save_to_disk(str(root / "set"))
    given: dict[str, Any] = dict.fromkeys(("train", "val", "test"), "train")
    return HuggingFaceData(root=str(root / "set"), image_column="picture", label_column="kind", **given, **COMMON)


def shards(root: Path) -> SourceData:
    for shard, colors in enumerate((COLORS[:1], COLORS[1:])):
        images = [(str(number), jpeg_bytes(color, (32, 32)), None) for number, color in enumerate(colors)]
        write_shard(root / f"{shard}.tar", images)
    return ImageShards(root=str(root), train="{0..1}.tar", val="1.tar", **COMMON)


@pytest.mark.parametrize("make", [tree, table, hugging_face, shards])
def test_images_alone_distil_and_are_scored(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    data = make(tmp_path)
    stored: dict[str, Any] = {"store": StoreSettings(folder=str(tmp_path / "store"), dtype="float32", batch_size=2)}
    losses = []
    for options in (dict[str, Any](), stored):
        model = tiny_movekd(language=NoLanguage(), lm_weight=0.0, **options)
        trainer = bare_trainer(tmp_path, steps=3, limit_val_batches=1.0, val_check_interval=1)
        trainer.fit(model, datamodule=make(tmp_path))
        losses.append(float(trainer.callback_metrics["val/kd_loss"]))
    # Products of other sizes may round otherwise: the store encodes two images at a time.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and torch.isfinite(torch.tensor(losses[0]))
    assert any((tmp_path / "store").rglob("*"))
    if not isinstance(data, ImageShards):
        (found,) = bare_trainer(tmp_path, steps=1, callbacks=[NearestNeighbors()]).test(model, datamodule=data)
        assert found["test/knn/student"] == found["test/knn/frozen"] == 1.0  # each image is among those compared with

"""Nearest neighbors of a run's test images, held against tokens encoded and compared by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

from tests.methods.helpers import bare_trainer, sorted_settings, tiny_experts
from tests.methods.movekd.helpers import shaken, tiny_movekd
from visexpert.callbacks import NearestNeighbors, TextAlignment
from visexpert.data import ImageTable, MixedData
from visexpert.data.source import AugmentSettings
from visexpert.language import NoLanguage
from visexpert.methods import MoVEKD
from visexpert.metrics.neighbors import knn_accuracy
from visexpert.tabletop.text_tower import TabletopTextTower
from visexpert.vision import ClipEncoder, VisionEncoder

CLASSES = ("red cube", "red sphere")
"""Words that the shipped text tower knows."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise whose contrast is the class, hard enough that neighbors err."""
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 6)):
        for label, spread in zip(CLASSES, (40, 50), strict=True):
            for number in range(count):
                pixels = rng.normal(128, spread, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                path = folder / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder


def tree(root: Path, **options: Any) -> ImageTable:
    given = {"test": "test", "class_folders": True, "image_size": 32, "num_workers": 0, "eval_batch_size": 5, **options}
    return ImageTable(root=str(root), train="train", **given)


def movekd(**options: Any) -> MoVEKD:
    return shaken(tiny_movekd(language=NoLanguage(), lm_weight=0.0, **options), std=1.0)


def uncopied() -> MoVEKD:
    """A student whose frozen encoder is no teacher."""
    settings = {"experts": tiny_experts(), "language": NoLanguage(), "lm_weight": 0.0, "tokens": "uniform"}
    return MoVEKD(
        clip=ClipEncoder(source="zoo:clip"), **sorted_settings(MoVEKD, {**settings, "clip_teacher_weight": None})
    )


def scores_of(folder: Path, model: MoVEKD, data: Any) -> dict[str, float]:
    trainer = bare_trainer(folder, steps=1, callbacks=[NearestNeighbors()])
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    return {name: value for name, value in found.items() if "knn" in name}


def by_hand(encoder: VisionEncoder, root: Path) -> float:
    """Top-1 with the images of a second reading."""
    means, labels = {}, {}
    for part in ("train", "test"):
        files = sorted((root / part).rglob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            means[part] = encoder.eval()(images).tokens_BTD.mean(1)
        labels[part] = [file.parent.name for file in files]
    return knn_accuracy(means["test"], labels["test"], train_MD=means["train"], train_labels=labels["train"])


def test_student_and_frozen_encoder_are_scored_by_their_own_tokens(root: Path, tmp_path: Path) -> None:
    """Training images are read without their augmentation."""
    model = movekd()
    found = scores_of(tmp_path, model, tree(root, augment=AugmentSettings(crop_scale=0.1)))
    assert model.anchor is not None
    expected = {"test/knn/student": by_hand(model.clip, root), "test/knn/frozen": by_hand(model.anchor, root)}
    assert found == pytest.approx(expected) and len(set(expected.values())) == 2


def test_a_frozen_encoder_that_no_teacher_keeps_is_read_from_its_source(root: Path, tmp_path: Path) -> None:
    model, source = uncopied(), ClipEncoder(source="zoo:clip")
    trainer = bare_trainer(tmp_path, steps=1, callbacks=[NearestNeighbors(), Disturb()])
    (found,) = trainer.test(model, datamodule=tree(root), verbose=False)
    source.load_weights()
    expected = {"test/knn/student": by_hand(model.clip, root), "test/knn/frozen": by_hand(source, root)}
    assert model.anchor is None and len(set(expected.values())) == 2
    assert {name: value for name, value in found.items() if "knn" in name} == pytest.approx(expected)


class Disturb(Callback):
    """Stands for training."""

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        for parameter in pl_module.clip.parameters():
            torch.nn.init.normal_(parameter, std=0.3)


def test_text_alignment_shares_the_frozen_encoder_that_neighbors_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[ClipEncoder] = []
    copy = ClipEncoder.plain_copy

    def counted(encoder: ClipEncoder) -> ClipEncoder:
        read.append(encoder)
        return copy(encoder)

    monkeypatch.setattr(ClipEncoder, "plain_copy", counted)
    model = uncopied()
    trainer = bare_trainer(tmp_path, steps=1, callbacks=[NearestNeighbors(), TextAlignment()])
    data = tree(root)
    monkeypatch.setattr(data, "text_tower", TabletopTextTower, raising=False)
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    assert {"test/knn/frozen", "test/alignment/frozen/zero_shot"} <= found.keys()
    assert read == [model.clip]


def test_data_without_classes_or_images_to_compare_have_no_such_scores(root: Path, tmp_path: Path) -> None:
    assert scores_of(tmp_path, movekd(), tree(root, class_folders=False)) == {}
    assert scores_of(tmp_path, movekd(knn_images=0), tree(root)) == {}
    with pytest.warns(UserWarning, match="No nearest neighbors are looked for: .*nowhere"):
        gone = ImageTable(
            root=str(root), train="nowhere", test="test", class_folders=True, image_size=32, num_workers=0
        )
        assert scores_of(tmp_path, movekd(), gone) == {}


def test_sources_are_read_together(root: Path, tmp_path: Path) -> None:
    mixed = MixedData(sources={"mine": tree(root)}, train={"mine": None}, test=["mine"])
    assert scores_of(tmp_path, movekd(), mixed) == scores_of(tmp_path, movekd(), tree(root))

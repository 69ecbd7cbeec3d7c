"""Text alignment in a run's test scores, against embeddings made and compared by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.methods.helpers import CLIP_FIELDS, bare_trainer, sorted_settings, tiny_experts
from visexpert.callbacks import TextAlignment
from visexpert.data import ImageTable
from visexpert.language import NoLanguage
from visexpert.methods import MoVEKD
from visexpert.methods.alignment import AlignmentProbe
from visexpert.methods.settings import EvaluationSettings
from visexpert.metrics.alignment import retrieval_recall
from visexpert.tabletop import TabletopData
from visexpert.tabletop.text_tower import TabletopTextTower
from visexpert.types import Batch, TextItem
from visexpert.vision import ClipEncoder


def movekd(source: str | None = "zoo:clip", **options: Any) -> MoVEKD:
    settings = {"experts": tiny_experts(), "language": NoLanguage(), "lm_weight": 0.0, "tokens": "uniform", **options}
    settings = sorted_settings(MoVEKD, {**settings, "clip_teacher_weight": None})
    clip = ClipEncoder(source=source) if source else ClipEncoder(config=CLIP_FIELDS)
    return MoVEKD(clip=clip, **settings)


def tabletop(**options: Any) -> TabletopData:
    return TabletopData(num_train=16, num_val=12, num_test=12, eval_batch_size=5, **options)


def scores_of(model: MoVEKD, data: Any, folder: Path, *others: Any) -> dict[str, float]:
    trainer = bare_trainer(folder, steps=1, callbacks=[TextAlignment(), *others])
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    return {name: value for name, value in found.items() if "alignment" in name}


def test_student_and_frozen_encoder_are_scored_through_the_shipped_text_tower(tmp_path: Path) -> None:
    model = movekd(evaluation=EvaluationSettings(alignment_images=9))
    model.load_weights()
    model.mark_loaded()
    with torch.no_grad():
        for parameter in model.clip.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    data = tabletop()
    found = scores_of(model, data, tmp_path)
    graphs = data.split_cache("test").graphs[:9]
    images = torch.cat([batch.images_01() for batch in data.image_dataloader("test")])[:9]
    tower, frozen = TabletopTextTower("zoo:clip"), ClipEncoder(source="zoo:clip")
    captions = list(dict.fromkeys(graph.caption for graph in graphs))
    matches = torch.tensor([[text == graph.caption for text in captions] for graph in graphs])
    for name, encoder in (("student", model.clip), ("frozen", frozen)):
        with torch.no_grad():
            embedded = encoder.embed(images)
        expected = retrieval_recall(embedded, tower(captions), matches)
        labels = sorted({graph.label for graph in graphs})
        nearest = torch.nn.functional.cosine_similarity(
            embedded[:, None], tower([tower.class_text(label) for label in labels])[None], dim=-1
        ).argmax(1)
        expected["zero_shot"] = np.mean([labels[at] == g.label for at, g in zip(nearest.tolist(), graphs, strict=True)])
        own = {key.removeprefix(f"test/alignment/{name}/"): value for key, value in found.items() if f"/{name}/" in key}
        assert own == pytest.approx({key.replace("@", ""): value for key, value in expected.items()})
    assert len(found) == 14


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: movekd(None), "random weights"),
        (lambda: movekd(evaluation=EvaluationSettings(alignment_images=0)), ""),
    ],
)
def test_what_cannot_be_measured_is_absent_and_said(
    model: Any, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert scores_of(model(), tabletop(), tmp_path) == {}
    assert words in caplog.text


@pytest.mark.parametrize(("source", "said"), [(None, ["random weights"]), ("zoo:clip", [])])
def test_what_will_not_be_measured_is_said_before_training(
    source: str | None, said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, trainer = movekd(source), bare_trainer(tmp_path, steps=1)
    trainer.datamodule = tabletop()  # type: ignore[attr-defined]
    with caplog.at_level("INFO"):
        TextAlignment().on_fit_start(trainer, model)
    told = [message for message in caplog.messages if "will not be measured" in message]
    assert len(told) == len(said) and all(words in message for words, message in zip(said, told, strict=True))


def test_images_without_caption_or_class_are_not_scored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / part / "a.png")
    data = ImageTable(root=str(tmp_path), train="train", test="test", image_size=64, num_workers=0)
    data.text_tower = TabletopTextTower  # type: ignore[attr-defined]
    with caplog.at_level("INFO"):
        assert scores_of(movekd(), data, tmp_path / "run") == {}
    assert "neither captions nor classes" in caplog.text


def test_captions_of_caption_tasks_and_folders_classes_are_read() -> None:
    """Only texts of caption tasks are captions; samples without an image are left out."""
    encoder = ClipEncoder(source="zoo:clip")
    probe = AlignmentProbe({"own": encoder}, most=None)
    items = (
        (TextItem("vqa", "what ?", "red"), TextItem("dense", "describe", "a red cube", scored_as="caption")),
        (TextItem("caption", "describe", "x", references=("a blue sphere", "a sphere")),),
        (TextItem("caption", "describe", "a green cube"),),
    )
    batch = Batch(
        torch.rand(3, 3, 64, 64),
        torch.arange(3),
        split="test",
        items=items,
        has_image_B=torch.tensor([True, True, False]),
    )
    read: list[str] = []

    class Tower(TabletopTextTower):
        def __call__(self, texts: Any) -> torch.Tensor:
            read.extend(texts)
            return super().__call__(texts)

    probe.add(batch)
    scores = probe.scores(Tower("zoo:clip"))
    assert read == ["a red cube", "a blue sphere", "a sphere"] and "zero_shot" not in scores["own"]
    assert len(scores["own"]) == 6 and probe.num_images == 2


def labeled(labels: list[str], items: tuple[tuple[TextItem, ...], ...] = ()) -> Batch:
    images = torch.rand(len(labels), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(len(labels)), split="test", items=items, labels=tuple(labels))


def test_images_without_a_class_do_not_count_in_zero_shot_accuracy() -> None:
    encoder, tower = ClipEncoder(source="zoo:clip"), TabletopTextTower("zoo:clip")
    mixed = labeled(["red cube", "", "blue sphere", "", "red cube"])
    alone = Batch(mixed.images_BCHW[::2], mixed.index_B[::2], split="test", labels=mixed.labels[::2])
    found = []
    for batch in (mixed, alone):
        probe = AlignmentProbe({"own": encoder}, most=None)
        probe.add(batch)
        found.append(probe.scores(tower)["own"])
    assert found[0] == found[1] and found[0].keys() == {"zero_shot"}


def test_one_class_or_one_caption_says_nothing() -> None:
    probe = AlignmentProbe({"own": ClipEncoder(source="zoo:clip")}, most=None)
    probe.add(labeled(["red cube"] * 3, ((TextItem("caption", "describe", "a red cube"),),) * 3))
    assert probe.scores(TabletopTextTower("zoo:clip")) == {}

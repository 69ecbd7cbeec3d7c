"""What ``visexpert export`` reports of the alignment with the text tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.commands.test_export import write_run
from tests.methods.helpers import CLIP_FIELDS
from visexpert.cli import main
from visexpert.methods.alignment import text_alignment
from visexpert.runs import load_run
from visexpert.tabletop import TabletopData
from visexpert.tabletop.text_tower import TabletopTextTower
from visexpert.vision import ClipEncoder


def shaken_run(folder: Path) -> Path:
    """A run whose training moved CLIP's weights."""
    run = write_run(folder, clip={"source": "zoo:clip"})
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for key, value in checkpoint["state_dict"].items():
        if key.startswith("clip.model") and value.is_floating_point():
            value *= 1 + 0.5 * torch.randn(value.shape, generator=generator)
    torch.save(checkpoint, path)
    return run


def test_the_report_holds_scores_before_training_and_now(tmp_path: Path) -> None:
    run = shaken_run(tmp_path / "run")
    main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "out"), "--alignment_images", "7"])
    found = json.loads((tmp_path / "out" / "fidelity.json").read_text(encoding="utf-8"))["text_alignment"]
    saved = load_run(run)
    assert isinstance(saved.data, TabletopData)
    graphs = saved.data.split_cache("val").graphs[:7]
    images = torch.cat([batch.images_BCHW for batch in saved.data.image_dataloader("val")])[:7]
    tower = TabletopTextTower("zoo:clip")
    labels = {graph.label: tower.class_text(graph.label) for graph in graphs}
    texts = ([[graph.caption] for graph in graphs], labels, [graph.label for graph in graphs])
    for name, encoder in (("before", ClipEncoder(source="zoo:clip")), ("after", saved.model.clip)):
        assert found[name] == pytest.approx(text_alignment(encoder, tower, images, *texts))
    assert found["images"] == 7 and found["before"] != found["after"]
    page = (tmp_path / "out" / "fidelity.md").read_text(encoding="utf-8")
    assert f"| zero shot | {found['before']['zero_shot']:.1%} | {found['after']['zero_shot']:.1%} |" in page


@pytest.mark.parametrize(("more", "reason"), [([], "random weights"), (["--alignment_images", "0"], "asked")])
def test_the_report_says_why_nothing_was_measured(more: list[str], reason: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", clip={"config": CLIP_FIELDS})
    main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "out"), *more])
    found = json.loads((tmp_path / "out" / "fidelity.json").read_text(encoding="utf-8"))["text_alignment"]
    assert reason in found["not_measured"] and found.keys() == {"not_measured"}
    assert found["not_measured"].rstrip(".") in (tmp_path / "out" / "fidelity.md").read_text(encoding="utf-8")


def test_a_number_below_0_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), "--format", "hf", "--out", str(tmp_path / "out"), "--alignment_images", "-3"])
    assert "-3" in capsys.readouterr().err

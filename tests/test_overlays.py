"""A class that takes the place of another one: what of the earlier settings it gets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from visexpert.commands.data import build_data
from visexpert.data import COCOCaptions, LLaVAInstruct
from visexpert.overlays import are_related
from visexpert.training import build_cli

BASE = {
    "model": {
        "class_path": "visexpert.methods.ToVE",
        "init_args": {
            "clip": {
                "class_path": "visexpert.vision.ClipEncoder",
                "init_args": {"source": "zoo:clip", "layer": -1},
            },
            "experts": {
                "one": {"class_path": "visexpert.tabletop.TinyExpert", "init_args": {"source": "zoo:depth"}},
            },
            "language": {"class_path": "visexpert.language.NoLanguage"},
        },
    },
    "data": {
        "class_path": "visexpert.data.LLaVAInstruct",
        "init_args": {"root": "talk", "num_val": 8, "batch_size": 3, "eval_batch_size": 5, "max_broken": 0.5},
    },
    "trainer": {"max_steps": 1},
}  # fmt: skip


def files(folder: Path, overlay: Any) -> list[Path]:
    paths = [folder / "base.yaml", folder / "overlay.yaml"]
    for path, content in zip(paths, (BASE, overlay), strict=True):
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return paths


def parsed(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("sys.argv", ["visexpert"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    arguments = [part for path in paths for part in ("--config", str(path))]
    return build_cli(arguments, run=False)


def test_data_of_another_class_take_no_settings_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    overlay = {"data": {"class_path": "visexpert.data.COCOCaptions", "init_args": {"root": "coco"}}}
    paths = files(tmp_path, overlay)
    with caplog.at_level(logging.INFO):
        data = parsed(paths, monkeypatch).datamodule
    plain = COCOCaptions(root="coco")
    assert isinstance(data, COCOCaptions) and data.settings == plain.settings and data.root == plain.root
    checked = build_data(paths)
    assert isinstance(checked, COCOCaptions) and checked.settings == data.settings
    (told,) = [record.getMessage() for record in caplog.records if "takes the place" in record.getMessage()]
    assert told.startswith("COCOCaptions takes the place of LLaVAInstruct")
    assert all(part in told for part in ("num_val=8", "batch_size=3", "max_broken=0.5")) and "root" not in told


def test_settings_of_one_class_are_laid_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = {"data": {"class_path": "visexpert.data.LLaVAInstruct", "init_args": {"batch_size": 4}}}
    paths = files(tmp_path, overlay)
    data = parsed(paths, monkeypatch).datamodule
    assert isinstance(data, LLaVAInstruct) and (data.settings.num_val, data.settings.batch_size) == (8, 4)
    checked = build_data(paths)
    assert isinstance(checked, LLaVAInstruct) and checked.settings == data.settings


def test_parts_of_the_model_follow_the_same_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A derived encoder keeps the source; an expert of an unrelated class keeps nothing."""
    clip = {"class_path": "visexpert.vision.TiledClipEncoder", "init_args": {"pinpoints": [[1, 2]]}}
    experts = {"one": {"class_path": "visexpert.experts.KorniaEdges", "init_args": {"image_size": 32}}}
    paths = files(tmp_path, {"model": {"init_args": {"clip": clip, "experts": experts}}})
    model = parsed(paths, monkeypatch).model
    assert (model.clip.source, model.clip.layer) == ("zoo:clip", -1) and model.hub["one"].image_size == 32


def test_classes_are_related_by_descent_alone() -> None:
    assert are_related("visexpert.vision.TiledClipEncoder", "visexpert.vision.ClipEncoder")
    assert not are_related("visexpert.data.COCOCaptions", "visexpert.data.LLaVAInstruct")
    assert not are_related("visexpert.data.COCOCaptions", "no.such.Class")


def test_a_setting_inside_a_class_can_be_null_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = {"init_args": {"mole": {"rank": 2}, "layer": -2}}
    paths = files(tmp_path, {"model": {"init_args": {"clip": clip}}})
    monkeypatch.setattr("sys.argv", ["visexpert"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    arguments = [part for path in paths for part in ("--config", str(path))]
    assert build_cli(arguments, run=False).model.clip.mole_layers()
    name = "--model.init_args.clip.init_args.mole"
    for word in (f"{name}=null", f"{name}=~"):
        assert not build_cli([*arguments, word], run=False).model.clip.mole_layers()
    assert not build_cli([*arguments, name, "null"], run=False).model.clip.mole_layers()
    changed = build_cli([*arguments, f"{name}.rank=3"], run=False).model.clip
    assert {layer.fc1_experts.rank for layer in changed.mole_layers()} == {3}

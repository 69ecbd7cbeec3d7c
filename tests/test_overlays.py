"""A class that takes the place of another one: what of the earlier settings it gets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_configs import CONFIGS
from visexpert.commands.data import build_data
from visexpert.data import COCOCaptions, LLaVAInstruct
from visexpert.errors import ConfigError
from visexpert.overlays import are_related
from visexpert.planning.read import read_configs
from visexpert.shipped import find
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
}


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
    (told,) = [record.getMessage() for record in caplog.records if "replaces" in record.getMessage()]
    assert told.startswith("COCOCaptions replaces LLaVAInstruct")
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


ALONE = [
    ("tove/paper/vit-l14.yaml", "model", ["tove/paper/vit-b16.yaml", "hubs/tove.yaml", "tove/paper/vit-l14.yaml"]),
    ("tove/smoke-merge.yaml", "data and model", ["tove/smoke.yaml", "tove/smoke-merge.yaml"]),
    (
        "movekd/llava/next.yaml",
        "model",
        ["movekd/llava/stage2.yaml", "hubs/movekd-v1.0.yaml", "movekd/llava/next.yaml"],
    ),
]


def alone(*arguments: str) -> str:
    """What a fit with these says, which must be one sentence."""
    with pytest.raises(ConfigError) as caught:
        build_cli(["fit", *arguments])
    assert "\n" not in str(caught.value) and "lightning" not in str(caught.value).lower()
    return str(caught.value)


@pytest.mark.parametrize(("name", "part", "base"), ALONE, ids=lambda value: str(value)[:30])
def test_an_overlay_alone_names_the_base_of_its_header(name: str, part: str, base: list[str]) -> None:
    message = alone("--config", str(CONFIGS / name))
    assert message.startswith(f"{name.removesuffix('.yaml')} names no class for {part}")
    assert message.endswith(" ".join(f"--config {each.removesuffix('.yaml')}" for each in base) + ".")


def test_a_part_of_the_base_is_not_asked_for_twice() -> None:
    hub, overlay = "hubs/tove", "tove/paper/vit-l14"
    message = alone(f"--config={CONFIGS / hub}.yaml", f"--config={overlay}")
    assert message.startswith(f"{hub} and {overlay} name no class for model")
    assert message.endswith(f"--config tove/paper/vit-b16 --config {hub} --config {overlay}.")
    message = alone("--config", "movekd/one-stage", "--config", "movekd/ablations/mole-dense")
    assert message.count("movekd/one-stage") == 2 and "--config configs/movekd/tabletop-stage2.yaml" in message


@pytest.mark.parametrize("folder", ["tove/paper", "."])
def test_the_base_is_named_as_the_overlay_is(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent if folder == "." else CONFIGS / folder)
    given = "configs/tove/smoke-merge.yaml" if folder == "." else "../smoke-merge.yaml"
    (base,) = [word for word in alone("--config", given).split() if word.partition(".")[0].endswith("tove/smoke")]
    assert find(base).samefile(CONFIGS / "tove/smoke.yaml")
    assert (base == "configs/tove/smoke.yaml") is (folder == ".")


def test_an_overlay_without_a_command_in_its_header_asks_for_a_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# Over something.\ndata: {init_args: {batch_size: 2}}\n", encoding="utf-8")
    message = alone("--config", str(path))
    assert message == (
        f"{path} names no class for data, so it is an overlay; give its base before it: --config BASE --config {path}."
    )
    with pytest.raises(ConfigError, match="names no class for data, so it is an overlay"):
        read_configs([path])


def test_no_configuration_at_all_asks_for_one() -> None:
    assert alone() == "No class is named for data and model; give a configuration that does: --config FILE."
    assert alone("--model.init_args.clip=null").startswith("No class is named for model; give a configuration")


def test_a_class_that_lacks_a_setting_is_no_overlay(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {class_path: visexpert.methods.ToVE}\n", encoding="utf-8")
    said = alone("--config", str(path))
    assert "ToVE" in said and "clip" in said and "overlay" not in said

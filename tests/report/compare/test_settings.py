"""Configurations as flat settings, and what differs between them."""

from __future__ import annotations

import copy
from typing import Any

from tests.report.compare.made import CONFIG
from visexpert.report.compare.settings import differences, flatten, without_seed


def test_objects_are_named_by_their_class_and_arguments_lie_below() -> None:
    settings = flatten(CONFIG)
    assert settings["model"] == "ToVE" and settings["data"] == "TabletopData"
    assert settings["model.language"] == "CrossAttentionDecoder" and settings["model.language.width"] == 64
    assert settings["model.experts"] == "depth" and settings["model.experts.depth.source"] == "zoo:depth"
    assert not {"seed_everything", "run", "trainer.logger"} & settings.keys()


def test_callbacks_in_a_list_are_settings_by_their_names() -> None:
    budget = {"class_path": "visexpert.callbacks.TrainingBudget", "init_args": {"gflop": 5.0, "seconds": None}}
    settings = flatten({"trainer": {"callbacks": [budget]}})
    assert settings["trainer.callbacks.TrainingBudget.gflop"] == 5.0
    assert "trainer.callbacks" in differences([settings, flatten({"trainer": {"callbacks": None}})])


def test_seeds_and_places_make_no_difference_but_experts_do() -> None:
    other: dict[str, Any] = copy.deepcopy(CONFIG)
    other["seed_everything"], other["run"] = 3, "elsewhere"
    other["data"]["init_args"]["order_seed"] = 9
    assert differences([flatten(CONFIG), flatten(other)]) == {}
    other["model"]["init_args"]["experts"]["edges"] = other["model"]["init_args"]["experts"]["depth"]
    assert differences([flatten(CONFIG), flatten(other)]) == {"model.experts": ["depth", "depth, edges"]}


def test_a_setting_of_a_later_version_is_no_difference() -> None:
    assert differences([{"a": 1}, {"a": 1, "new": 2}]) == {}
    assert differences([{"a": 1}, {"a": 2, "new": 2}, {}]) == {"a": [1, 2, None]}
    assert differences([{"a": None}, {"a": 0}]) == {"a": [None, 0]}


def test_paths_lose_the_number_of_the_seed_only() -> None:
    assert without_seed("runs/tove/seed12/checkpoints/last.ckpt") == "runs/tove/seed*/checkpoints/last.ckpt"
    assert without_seed("runs/tove-s3/x") == "runs/tove-s*/x"
    assert without_seed("openai/clip-vit-large-patch14-336") == "openai/clip-vit-large-patch14-336"
    assert without_seed("runs/stage1/x") == "runs/stage1/x"

"""What methods say of themselves, against what they are and do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.experts.helpers import MemoryImages
from tests.methods.helpers import merging_of, tiny_tove
from tests.methods.movekd.helpers import tiny_movekd
from visexpert.experts import FeatureCache
from visexpert.language import NoLanguage
from visexpert.methods import Method


def methods() -> dict[str, Method]:
    """Every method of the package, in forms whose parts differ."""
    return {
        "tove": tiny_tove(),
        "tove of clip alone": tiny_tove(use=[]),
        "movekd": tiny_movekd(),
        "movekd with a gate": tiny_movekd(teachers="gate"),
        "movekd without text": tiny_movekd(language=NoLanguage(), lm_weight=0.0),
        "merging": merging_of(teacher=tiny_tove()),
    }


def test_every_parameter_is_in_some_part_and_roles_are_those_of_a_plan() -> None:
    for name, method in methods().items():
        listed = {id(p) for part in method.parts() for module in part.modules for p in module.parameters()}
        assert {id(p) for p in method.parameters()} == listed, name
        names = [part.name for part in method.parts()]
        assert len(names) == len(set(names)), name


def test_experts_that_are_read_are_those_that_a_deployed_model_runs() -> None:
    read = {name: method.read_experts for name, method in methods().items()}
    assert read.pop("tove") == ("semantic", "depth", "edges")
    assert set(read.values()) == {()}  # MoVE-KD's experts are teachers, a merged CLIP has none
    assert tiny_tove(detached=["depth"]).read_experts == ("semantic", "edges")


@pytest.mark.parametrize(
    "method",
    [
        tiny_tove(),
        tiny_tove(detached=["depth"]),
        tiny_tove(clip_lr=1e-3),
        tiny_tove(use=["edges"], transfer="replacement"),
        tiny_movekd(alignment="to_student"),
        tiny_movekd(clip_teacher_weight=None),
    ],
    ids=["tove", "detached", "clip trains", "clip unread", "movekd", "no clip"],
)
def test_a_method_stores_what_it_says(method: Any, tmp_path: Path) -> None:
    images = MemoryImages(3, size=32)
    method.read_features(FeatureCache(tmp_path, dtype="float16"), {"train": images})
    stored = sorted(tuple(load_file(path)["tokens"].shape) for path in tmp_path.glob("*/shard-*"))
    assert stored == sorted((len(images), kept.rows, kept.width) for kept in method.stored_tokens().values())
    assert stored and set(method.stored_tokens()) <= {part.name for part in method.parts()}


def test_nothing_is_stored_where_nothing_is_distilled() -> None:
    assert tiny_movekd(kd_weight=0.0).stored_tokens() == {}

"""The shipped text tower against the module that it was trained in, and what it is asked."""

from __future__ import annotations

from pathlib import Path

import torch

from visexpert.methods.alignment import text_alignment
from visexpert.tabletop.graph import ObjectNode, SceneGraph
from visexpert.tabletop.render import render, scene_graphs
from visexpert.tabletop.scenes import sample_scenes
from visexpert.tabletop.text_tower import CLASSES, TabletopTextTower, text_tower
from visexpert.tabletop.world import TabletopWorld
from visexpert.vision import ClipEncoder


def node(colour: str, shape: str, pixels: int) -> ObjectNode:
    return ObjectNode(shape, colour, "small", "matte", 0.0, 0.0, 7.0, 0.5, pixels)


def test_captions_and_classes_name_the_largest_objects_first() -> None:
    graph = SceneGraph(objects=(node("red", "cube", 10), node("orange", "sphere", 30), node("blue", "cube", 20)))
    assert graph.caption == "an orange sphere and a blue cube and a red cube"
    assert graph.label == "orange sphere" and TabletopTextTower.class_text("orange sphere") == "an orange sphere"
    assert len(CLASSES) == 24 and graph.label in CLASSES


def test_padding_changes_no_embedding() -> None:
    tower = TabletopTextTower("zoo:clip")
    both = tower(["a red cube", "a red cube and a blue sphere and a green cylinder"])
    torch.testing.assert_close(both[:1], tower(["a red cube"]))


def test_only_shipped_encoders_have_it(tmp_path: Path) -> None:
    assert text_tower("zoo:clip") is not None
    assert text_tower(None) is None and text_tower(str(tmp_path)) is None


def test_the_shipped_pair_finds_one_another_far_above_chance() -> None:
    scenes = sample_scenes(32, seed=5, world=TabletopWorld())
    rendered = render(scenes, size=64)
    images = torch.as_tensor(rendered.rgb_NHW3).permute(0, 3, 1, 2)
    captions = [[graph.caption] for graph in scene_graphs(scenes, rendered)]
    scores = text_alignment(ClipEncoder(source="zoo:clip"), TabletopTextTower("zoo:clip"), images, captions)
    assert scores["image_to_text/R@10"] > 0.8 > 10 / 32

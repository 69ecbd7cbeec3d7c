"""Captions judged against a scene laid out by hand."""

from __future__ import annotations

import pytest

from visexpert.metrics import JudgedCaptions
from visexpert.tabletop.graph import ObjectNode, SceneGraph, parse_relation


def caption_holds(caption: str, graph: SceneGraph) -> bool:
    return all(graph.judge(caption).values())


def _node(colour: str, shape: str, size: str, *, u: float, depth: float, height: float) -> ObjectNode:
    return ObjectNode(shape, colour, size, "matte", u=u, v=0.0, depth=depth, height=height, pixels=100)


# The red cube is small, left, near and low; the blue sphere large, right, far and high; the green one between.
SCENE = SceneGraph(
    (
        _node("red", "cube", "small", u=-0.6, depth=3.0, height=0.3),
        _node("blue", "sphere", "large", u=0.6, depth=7.0, height=1.5),
        _node("green", "cylinder", "small", u=0.0, depth=5.0, height=0.9),
    )
)


@pytest.mark.parametrize(
    ("relation", "inverse"),
    [("left of", "right of"), ("in front of", "behind"), ("below", "above"), ("smaller than", "larger than")],
)
def test_each_relation_and_its_inverse(relation: str, inverse: str) -> None:
    red, blue = "a red cube", "a blue sphere"
    assert caption_holds(f"{red} {relation} {blue}", SCENE)
    assert caption_holds(f"{blue} {inverse} {red}", SCENE)
    assert not caption_holds(f"{red} {inverse} {blue}", SCENE)
    assert not caption_holds(f"{blue} {relation} {red}", SCENE)


def test_equal_sizes_are_neither_larger_nor_smaller() -> None:
    assert not caption_holds("a red cube larger than a green cylinder", SCENE)
    assert not caption_holds("a red cube smaller than a green cylinder", SCENE)


def test_by_hand() -> None:
    metric = JudgedCaptions()
    captions = (
        "A red cube left of a blue sphere.",  # true
        "a red cube behind a blue sphere",  # objects there, relation wrong
        "a blue cube left of a red cube",  # no blue cube
        "a red cube left of",  # not of the form
    )
    metric.update([SCENE.judge(caption) for caption in captions])
    assert metric.compute() == {
        "parsed": 0.75,
        "object": 0.5,
        "relation": 0.25,
        "family/depth": 0.0,
        "family/left-right": 0.5,
    }


def test_an_object_does_not_stand_beside_itself() -> None:
    assert not SCENE.judge("a red cube left of a red cube")["object"]


def test_one_fitting_pair_of_a_kind_is_enough() -> None:
    twice = SceneGraph((*SCENE.objects, _node("red", "cube", "large", u=0.9, depth=8.0, height=0.3)))
    assert caption_holds("a red cube right of a blue sphere", twice)
    assert caption_holds("a red cube left of a blue sphere", twice)
    assert caption_holds("a red cube left of a red cube", twice)


@pytest.mark.parametrize(
    "text", ["", "a red cube", "red cube left of blue sphere", "a red cube left of a blue sphere behind a green cube"]
)
def test_other_forms_are_not_parsed(text: str) -> None:
    assert parse_relation(text) is None


def test_parts_of_a_caption() -> None:
    claim = parse_relation("An  orange cube is in front of a red sphere .")
    assert claim is not None
    assert (claim.subject, claim.relation, claim.object) == ("orange cube", "in front of", "red sphere")

"""Every text is true in its scene graph: the texts are read back and checked against the numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from tests.tabletop.some_graphs import node, random_graphs
from visexpert.tabletop.captions import dense_caption, object_captions, relation_captions
from visexpert.tabletop.graph import ObjectNode, SceneGraph, facts_of
from visexpert.tabletop.questions import Balancer, popular_phrases, probes, questions, statements
from visexpert.tabletop.texts import POOL_SIZES, Pools, generate_pools
from visexpert.types import TextItem

WORDS = ("zero", "one", "two", "three", "four", "five")
RANK = {"small": 1, "medium": 2, "large": 3}
RELATION = "left of|right of|in front of|behind|above|below|larger than|smaller than"

# Positive: true; negative: the inverse is true; the third number is the dead margin.
SCORE: dict[str, tuple[Callable[[ObjectNode, ObjectNode], float], float]] = {
    "left of": (lambda a, b: b.u - a.u, 0.14),
    "right of": (lambda a, b: a.u - b.u, 0.14),
    "in front of": (lambda a, b: b.depth - a.depth, 0.7),
    "behind": (lambda a, b: a.depth - b.depth, 0.7),
    "above": (lambda a, b: a.height - b.height, 0.5),
    "below": (lambda a, b: b.height - a.height, 0.5),
    "larger than": (lambda a, b: RANK[a.size] - RANK[b.size], 0.0),
    "smaller than": (lambda a, b: RANK[b.size] - RANK[a.size], 0.0),
}


@pytest.fixture(scope="module")
def graphs() -> list[SceneGraph]:
    return random_graphs(400, seed=5) + random_graphs(100, seed=6, unique_colours=False)


@pytest.fixture(scope="module")
def pools(graphs: list[SceneGraph]) -> Pools:
    return generate_pools(graphs, split="train", seed=0, progress=False)


def pairs(graphs: list[SceneGraph], pools: Pools, kind: str) -> list[tuple[SceneGraph, TextItem]]:
    return [(graph, item) for graph, pool in zip(graphs, pools, strict=True) for item in pool if item.kind == kind]


def find(graph: SceneGraph, phrase: str) -> ObjectNode:
    """Return the one object of that name."""
    (found,) = [obj for obj in graph.objects if f"{obj.colour} {obj.shape}" == phrase]
    return found


def verdict(graph: SceneGraph, subject: str, relation: str, other: str) -> str:
    """Judge a relation from the numbers: true, false (the inverse is true), or borderline."""
    score, margin = SCORE[relation]
    value = score(find(graph, subject), find(graph, other))
    return "true" if value > margin else "false" if value < -margin else "borderline"


def parse_caption(text: str) -> tuple[str, str, str]:
    match = re.fullmatch(rf"an? (\w+ \w+) ({RELATION}) an? (\w+ \w+)", text)
    assert match, text
    return match[1], match[2], match[3]


def test_dense_captions_list_every_object_from_left_to_right(graphs: list[SceneGraph], pools: Pools) -> None:
    for graph, item in pairs(graphs, pools, "dense"):
        words = item.answer.split()
        ordered = sorted(graph.objects, key=lambda obj: (obj.u, obj.phrase))
        assert len(words) == 4 * len(ordered)
        for obj, said in zip(ordered, np.reshape(words, (-1, 4)).tolist(), strict=True):
            distance = "near" if obj.depth < 7.2 else "middle" if obj.depth < 8.8 else "far"
            assert said == [obj.size, obj.colour, obj.shape, distance]


def test_relation_captions_and_all_their_references_are_true(graphs: list[SceneGraph], pools: Pools) -> None:
    items = pairs(graphs, pools, "relation")
    assert len(items) > 1900
    for graph, item in items:
        assert item.references[0] == item.answer
        assert len(set(item.references)) == len(item.references) <= 5
        for text in item.references:
            assert verdict(graph, *parse_caption(text)) == "true", (graph, text)


def test_relation_captions_have_three_references_where_two_facts_hold(graphs: list[SceneGraph], pools: Pools) -> None:
    for graph, item in pairs(graphs, pools, "relation"):
        facts = sum(map(len, facts_of(graph).values()))
        assert len(item.references) >= min(3, 2 * facts)


def test_articles_fit_the_colour() -> None:
    graph = SceneGraph((node("orange cube", u=-0.5), node("red cube", u=0.5)))
    (item,) = relation_captions(graph, np.random.default_rng(0), 1)
    assert item.answer in ("an orange cube left of a red cube", "a red cube right of an orange cube")


def test_statements_are_true_or_turned_round_and_never_borderline(graphs: list[SceneGraph], pools: Pools) -> None:
    families = Counter()  # type: Counter[str]
    for graph, item in pairs(graphs, pools, "vsr"):
        match = re.fullmatch(rf"the (\w+ \w+) is ({RELATION}) the (\w+ \w+) \?", item.prompt)
        assert match, item.prompt
        assert verdict(graph, match[1], match[2], match[3]) == {"yes": "true", "no": "false"}[item.answer]
        pair_of = {"left": "left-right", "right": "left-right", "in": "depth", "behind": "depth"}
        expected = pair_of.get(match[2].split()[0], "height" if match[2] in ("above", "below") else "size")
        assert item.family == expected
        families[item.family] += 1
    assert min(families.values()) > 300 and len(families) == 4


def test_probes_ask_for_what_is_there_and_what_is_not(graphs: list[SceneGraph], pools: Pools) -> None:
    popular = popular_phrases(graphs)
    assert len(popular) == 8
    for graph, item in pairs(graphs, pools, "pope"):
        match = re.fullmatch(r"is there an? (\w+) (\w+) in the image \?", item.prompt)
        assert match, item.prompt
        colour, shape = match[1], match[2]
        there = any((obj.colour, obj.shape) == (colour, shape) for obj in graph.objects)
        assert item.answer == ("yes" if there else "no")
        if item.family == "popular":
            assert (colour, shape) in popular
        if item.family == "adversarial" and not there:
            assert any(obj.colour == colour for obj in graph.objects)
            assert any(obj.shape == shape for obj in graph.objects)


def test_popular_phrases_are_the_most_frequent_ones() -> None:
    graphs = [SceneGraph((node("cyan cylinder"), node("red cube")))] * 3 + [SceneGraph((node("cyan cylinder"),))]
    popular = popular_phrases(graphs)
    assert {("cyan", "cylinder"), ("red", "cube")} <= popular and len(popular) == 8


def answer_of(graph: SceneGraph, item: TextItem) -> str:
    """Answer a question from the numbers, by patterns of its words."""
    objects, prompt = graph.objects, item.prompt
    if match := re.fullmatch(r"is there an? (\w+) ?(\w+)? \?", prompt):
        wanted = set(match.groups()) - {"object", None}
        return "yes" if any(wanted <= {o.shape, o.colour, o.size, o.material} for o in objects) else "no"
    if match := re.fullmatch(r"how many (\w+?)s? ?(objects)? are there \?", prompt):
        number = sum(match[1] in (o.shape, o.material, "object") for o in objects)
        return WORDS[number]
    if match := re.fullmatch(r"what colour is the (\w+ )?(\w+) \?", prompt):
        (found,) = [o for o in objects if o.shape == match[2] and (not match[1] or o.size == match[1].strip())]
        return found.colour
    if match := re.fullmatch(r"what shape is the (\w+) object \?", prompt):
        (found,) = [o for o in objects if o.colour == match[1]]
        return found.shape
    if match := re.fullmatch(r"what (size|material) is the (\w+ \w+) \?", prompt):
        return str(getattr(find(graph, match[2]), match[1]))
    if match := re.fullmatch(r"which side is the (\w+ \w+) on \?", prompt):
        u = find(graph, match[1]).u
        return "center" if abs(u) <= 0.2 else "left" if u <= -0.4 else "right" if u >= 0.4 else "borderline"
    if match := re.fullmatch(r"how far is the (\w+ \w+) \?", prompt):
        depth = find(graph, match[1]).depth
        near, middle, far = depth <= 7.2 - 0.25, 7.2 + 0.25 <= depth <= 8.8 - 0.25, depth >= 8.8 + 0.25
        return "near" if near else "middle" if middle else "far" if far else "borderline"
    match = re.fullmatch(rf"what is ({RELATION}) the (\w+ \w+) \?", prompt)
    assert match and len(objects) >= 3, prompt
    score, margin = SCORE[match[1]]
    anchor = find(graph, match[2])
    values = {o.shape: score(o, anchor) for o in objects if o is not anchor and score(o, anchor) > margin}
    assert sum(score(o, anchor) > margin for o in objects if o is not anchor) == 1
    if margin:
        assert all(abs(score(o, anchor)) > margin for o in objects if o is not anchor)
    return next(iter(values))


def test_questions_have_the_right_answer(graphs: list[SceneGraph], pools: Pools) -> None:
    families = Counter()  # type: Counter[str]
    for graph, item in pairs(graphs, pools, "vqa"):
        assert item.answer == answer_of(graph, item), (item, graph)
        assert len(item.answer.split()) == 1
        families[item.family] += 1
    expected = {"exist", "count", "colour", "shape", "size", "material", "relation", "side", "distance"}
    assert set(families) == expected and min(families.values()) > 100


def test_object_captions_name_one_to_four_objects_and_nothing_else(graphs: list[SceneGraph], pools: Pools) -> None:
    lengths = set()
    for graph, item in pairs(graphs, pools, "objects"):
        names = [part.split(maxsplit=1)[1] for part in item.answer.split(" and ")]
        assert len(set(names)) == len(names)
        assert all(find(graph, name) for name in names)
        lengths.add(len(names))
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("family", "apart", "decided"),
    [
        ("left-right", {"u": 0.13}, False),
        ("left-right", {"u": 0.15}, True),
        ("depth", {"depth": 8.69}, False),
        ("depth", {"depth": 8.71}, True),
        ("height", {"height": 0.99}, False),
        ("height", {"height": 1.01}, True),
        ("size", {"size": "medium"}, False),
        ("size", {"size": "large"}, True),
    ],
)
def test_relations_have_dead_margins(family: str, apart: dict[str, float | str], decided: bool) -> None:
    graph = SceneGraph((node("red cube"), node("blue cube", **apart)))
    facts = facts_of(graph)
    assert bool(facts[family]) is decided
    assert sum(map(len, facts.values())) == decided


@pytest.mark.parametrize(("u", "asked"), [(0.19, True), (0.21, False), (0.39, False), (0.41, True), (-0.39, False)])
def test_side_is_not_asked_between_center_and_side(u: float, asked: bool) -> None:
    graph = SceneGraph((node("red cube", u=u),))
    assert any(item.family == "side" for item in asked_about(graph)) is asked


@pytest.mark.parametrize(("depth", "asked"), [(6.9, True), (7.1, False), (7.4, False), (8.0, True), (8.7, False)])
def test_distance_is_not_asked_near_a_boundary(depth: float, asked: bool) -> None:
    graph = SceneGraph((node("red cube", depth=depth),))
    assert any(item.family == "distance" for item in asked_about(graph)) is asked


def test_what_is_left_of_needs_three_objects_and_one_clear_answer() -> None:
    two = (node("red cube", u=0.0), node("blue sphere", u=-0.5))
    left = "what is left of the red cube ?"
    assert left not in {item.prompt for item in asked_about(SceneGraph(two))}
    assert left in {item.prompt for item in asked_about(SceneGraph((*two, node("green cube", u=0.5))))}
    assert left not in {item.prompt for item in asked_about(SceneGraph((*two, node("green cube", u=0.1))))}
    assert left not in {item.prompt for item in asked_about(SceneGraph((*two, node("green cube", u=-0.3))))}


def asked_about(graph: SceneGraph) -> list[TextItem]:
    """Return all questions that random draws ask about a scene."""
    rng = np.random.default_rng(0)
    return [item for _ in range(20) for item in questions(graph, rng, Balancer(slack=1000), 100)]


def test_texts_are_a_pure_function_of_graph_and_generator(graphs: list[SceneGraph]) -> None:
    def write(seed: int) -> list[TextItem]:
        rng = np.random.default_rng(seed)
        graph = graphs[3]
        popular = popular_phrases(graphs)
        texts = [dense_caption(graph), *relation_captions(graph, rng, 4), *object_captions(graph, rng, 4)]
        texts += statements(graph, rng, Balancer(), 6) + questions(graph, rng, Balancer(), 8)
        return texts + probes(graph, rng, Balancer(), popular, 4)

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_objects_that_share_a_name_are_not_named() -> None:
    twins = SceneGraph((node("red cube", u=-0.8), node("red cube", u=0.0), node("blue cube", u=0.8)))
    rng = np.random.default_rng(0)
    assert not any(facts_of(twins).values())
    assert statements(twins, rng, Balancer(), 6) == []
    for item in asked_about(twins):
        assert item.family in ("exist", "count") or "red" not in item.prompt


def test_pools_hold_the_kinds_in_order_and_within_their_sizes(pools: Pools) -> None:
    order = list(POOL_SIZES)
    for pool in pools:
        kinds = [item.kind for item in pool]
        assert kinds == sorted(kinds, key=order.index)
        assert all(kinds.count(kind) <= most for kind, most in POOL_SIZES.items())
        assert len({(item.kind, item.prompt) for item in pool if item.kind in ("vqa", "vsr", "pope")}) == sum(
            kind in ("vqa", "vsr", "pope") for kind in kinds
        )

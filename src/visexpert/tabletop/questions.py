"""Questions with one-word answers about a scene (VQA), balanced per prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from numpy.random import Generator

from visexpert.tabletop.balance import Balancer
from visexpert.tabletop.captions import FAR_FROM, NEAR_UNTIL, article
from visexpert.tabletop.graph import SceneGraph
from visexpert.tabletop.relations import LEADING, RELATIONS, leading_matrices, named_objects
from visexpert.tabletop.world import COLOURS, MATERIALS, SHAPES, SIZES
from visexpert.types import TextItem

SIDES = ("left", "center", "right")
DISTANCES = ("near", "middle", "far")
NUMBERS = ("zero", "one", "two", "three", "four", "five")

CENTER_WITHIN = 0.2
"""|u| up to which an object is in the center."""
SIDE_BEYOND = 0.4
"""|u| from which an object is on the left or on the right; between the two nothing is asked."""
DISTANCE_MARGIN = 0.25
"""Half width (scene units) of the dead margin round each boundary between near, middle and far."""

MAX_PER_FAMILY = 2
"""Most questions of one family about one scene: families whose answers balance easily do not crowd out the others."""


class Candidate(NamedTuple):
    """A question that could be asked about a scene.

    Args:
        family: One of :data:`FAMILIES`.
        prompt: The question.
        answer: Its one-word answer.
        options: Every answer that the prompt can have; chance is one in ``len(options)``.
        template: Prompts that are balanced together beside each prompt alone.
    """

    family: str
    prompt: str
    answer: str
    options: tuple[str, ...]
    template: str


def questions(graph: SceneGraph, rng: Generator, balancer: Balancer, count: int) -> list[TextItem]:
    """Draw questions about a scene, families in turn.

    Args:
        graph: The scene.
        rng: Source of the choice.
        balancer: Keeps the answers of each prompt, and of each template, uniform over the possible ones.
        count: Most questions.
    """
    by_family = {family: list(build(graph)) for family, build in _BUILDERS.items()}
    queues = [[items[k] for k in rng.permutation(len(items))] for items in by_family.values()]
    order = [queues[k] for k in rng.permutation(len(queues))]
    items: list[TextItem] = []
    for queue in order * MAX_PER_FAMILY:
        if len(items) < count:
            candidate = _next_allowed(queue, balancer)
            if candidate is not None:
                items.append(TextItem("vqa", candidate.prompt, candidate.answer, family=candidate.family))
    return items


def candidates(graph: SceneGraph) -> Iterator[Candidate]:
    """Yield every question that has one clear answer in the scene, outside all dead margins."""
    for build in _BUILDERS.values():
        yield from build(graph)


def _next_allowed(queue: list[Candidate], balancer: Balancer) -> Candidate | None:
    while queue:
        candidate = queue.pop()
        keys = (candidate.prompt, (candidate.family, candidate.template))
        if balancer.allows(keys, candidate.answer, candidate.options):
            balancer.use(keys, candidate.answer)
            return candidate
    return None


def _exist(graph: SceneGraph) -> Iterator[Candidate]:
    objects = graph.objects
    wanted: list[tuple[str, str, bool]] = []
    for shape in SHAPES:
        of_shape = [node for node in objects if node.shape == shape]
        wanted.append(("shape", shape, bool(of_shape)))
        wanted += [("size", f"{size} {shape}", any(node.size == size for node in of_shape)) for size in SIZES]
        for material in MATERIALS:
            wanted.append(("material", f"{material} {shape}", any(node.material == material for node in of_shape)))
    wanted += [("colour", f"{colour} object", any(node.colour == colour for node in objects)) for colour in COLOURS]
    for template, name, true in wanted:
        yield Candidate("exist", f"is there {article(name)} {name} ?", "yes" if true else "no", ("yes", "no"), template)


def _count(graph: SceneGraph) -> Iterator[Candidate]:
    if 2 <= len(graph.objects) <= 5:
        yield Candidate("count", "how many objects are there ?", NUMBERS[len(graph.objects)], NUMBERS[2:6], "all")
    for shape in SHAPES:
        number = sum(node.shape == shape for node in graph.objects)
        if number < 4:
            yield Candidate("count", f"how many {shape}s are there ?", NUMBERS[number], NUMBERS[:4], "shape")
    for material in MATERIALS:
        number = sum(node.material == material for node in graph.objects)
        if number < 4:
            yield Candidate(
                "count", f"how many {material} objects are there ?", NUMBERS[number], NUMBERS[:4], "material"
            )


def _colour(graph: SceneGraph) -> Iterator[Candidate]:
    for shape in SHAPES:
        found = [node for node in graph.objects if node.shape == shape]
        if len(found) == 1:
            yield Candidate("colour", f"what colour is the {shape} ?", found[0].colour, COLOURS, "shape")
        for size in SIZES:
            of_size = [node for node in found if node.size == size]
            if len(of_size) == 1:
                yield Candidate("colour", f"what colour is the {size} {shape} ?", of_size[0].colour, COLOURS, "size")


def _shape(graph: SceneGraph) -> Iterator[Candidate]:
    for colour in COLOURS:
        found = [node for node in graph.objects if node.colour == colour]
        if len(found) == 1:
            yield Candidate("shape", f"what shape is the {colour} object ?", found[0].shape, SHAPES, "")


def _size(graph: SceneGraph) -> Iterator[Candidate]:
    for k in named_objects(graph):
        node = graph.objects[k]
        yield Candidate("size", f"what size is the {node.phrase} ?", node.size, SIZES, node.shape)


def _material(graph: SceneGraph) -> Iterator[Candidate]:
    for k in named_objects(graph):
        node = graph.objects[k]
        yield Candidate("material", f"what material is the {node.phrase} ?", node.material, MATERIALS, node.shape)


def _relation(graph: SceneGraph) -> Iterator[Candidate]:
    """Ask for the shape of the only object in a relation to another; with two objects it would be "the other one".

    Nothing is asked where another object is inside the dead margin. Equal size classes are neither larger nor smaller.
    """
    if len(graph.objects) < 3:
        return
    named = named_objects(graph)
    for family, matrix in leading_matrices(graph).items():
        for anchor in named:
            column = [row[anchor] for k, row in enumerate(matrix) if k != anchor]
            if family != "size" and None in column:
                continue
            for wanted, relation in ((True, LEADING[family]), (False, RELATIONS[LEADING[family].inverse])):
                if column.count(wanted) == 1:
                    found = next(k for k, row in enumerate(matrix) if k != anchor and row[anchor] is wanted)
                    prompt = f"what is {relation.words} the {graph.objects[anchor].phrase} ?"
                    yield Candidate("relation", prompt, graph.objects[found].shape, SHAPES, relation.words)


def _side(graph: SceneGraph) -> Iterator[Candidate]:
    for k in named_objects(graph):
        node = graph.objects[k]
        if CENTER_WITHIN < abs(node.u) < SIDE_BEYOND:
            continue
        answer = "center" if abs(node.u) <= CENTER_WITHIN else "left" if node.u < 0 else "right"
        yield Candidate("side", f"which side is the {node.phrase} on ?", answer, SIDES, node.shape)


def _distance(graph: SceneGraph) -> Iterator[Candidate]:
    for k in named_objects(graph):
        node = graph.objects[k]
        if min(abs(node.depth - NEAR_UNTIL), abs(node.depth - FAR_FROM)) < DISTANCE_MARGIN:
            continue
        answer = "near" if node.depth < NEAR_UNTIL else "far" if node.depth > FAR_FROM else "middle"
        yield Candidate("distance", f"how far is the {node.phrase} ?", answer, DISTANCES, node.shape)


_BUILDERS = {
    "exist": _exist,
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "material": _material,
    "relation": _relation,
    "side": _side,
    "distance": _distance,
}

FAMILIES: tuple[str, ...] = tuple(_BUILDERS)

CHANCE: dict[str, float] = {
    "exist": 1 / 2,
    "count": 1 / 4,
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "size": 1 / len(SIZES),
    "material": 1 / len(MATERIALS),
    "relation": 1 / len(SHAPES),
    "side": 1 / len(SIDES),
    "distance": 1 / len(DISTANCES),
}
"""Accuracy of a guess per family: one in the number of answers that a prompt can have."""

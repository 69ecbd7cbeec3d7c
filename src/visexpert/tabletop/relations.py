"""Which spatial relations hold in a scene, with dead margins so that no label is borderline."""

from __future__ import annotations

from typing import NamedTuple

from visexpert.tabletop.graph import ObjectNode, SceneGraph

SIDE_MARGIN = 0.14
"""Least |u - u'| of left / right, in half image widths."""
DEPTH_MARGIN = 0.7
"""Least |depth - depth'| of in front of / behind, scene units."""
HEIGHT_MARGIN = 0.5
"""Least |height - height'| of above / below, scene units."""

SIZE_RANK = {"small": 0, "medium": 1, "large": 2}
"""True size classes in order: larger / smaller never means apparent size."""


class Relation(NamedTuple):
    """A relation between two objects.

    Args:
        words: As it stands between two noun phrases: ``"in front of"``.
        inverse: The relation with the objects exchanged, which is also its false twin.
        family: ``left-right``, ``depth``, ``height`` or ``size``.
    """

    words: str
    inverse: str
    family: str


RELATIONS: dict[str, Relation] = {
    words: Relation(words, inverse, family)
    for one, other, family in (
        ("left of", "right of", "left-right"),
        ("in front of", "behind", "depth"),
        ("above", "below", "height"),
        ("larger than", "smaller than", "size"),
    )
    for words, inverse in ((one, other), (other, one))
}
"""All relations by their words."""

LEADING: dict[str, Relation] = {
    "left-right": RELATIONS["left of"],
    "depth": RELATIONS["in front of"],
    "height": RELATIONS["above"],
    "size": RELATIONS["larger than"],
}
"""The leading direction of each family."""

FAMILIES: tuple[str, ...] = ("left-right", "depth", "height", "size")


class Fact(NamedTuple):
    """A decided relation: ``objects[subject] relation objects[other]`` is true, beyond the dead margin."""

    subject: int
    relation: Relation
    other: int


def facts_of(graph: SceneGraph) -> dict[str, list[Fact]]:
    """Find every decided pair of a scene, once per pair and family.

    Args:
        graph: The scene.

    Returns:
        Per family of :data:`FAMILIES` the facts, each with the relation that holds from the first object to the
        second in the family's leading direction (left of, in front of, above, larger than); exchange the objects and
        take ``inverse`` for the other wording. Objects that share their name with another are left out.
    """
    facts: dict[str, list[Fact]] = {family: [] for family in FAMILIES}
    named = named_objects(graph)
    for position, i in enumerate(named):
        for j in named[position + 1 :]:
            for family, leads in _leads(graph.objects[i], graph.objects[j]):
                first, second = (i, j) if leads else (j, i)
                facts[family].append(Fact(first, LEADING[family], second))
    return facts


def leading_matrices(graph: SceneGraph) -> dict[str, list[list[bool | None]]]:
    """Return for each family and ordered pair (i, j) whether object i stands in the leading direction to object j.

    Returns:
        Per family a square matrix: True (left of, in front of, above, larger than), False (the inverse), or None inside
        the dead margin and on the diagonal.
    """
    count = len(graph.objects)
    matrices: dict[str, list[list[bool | None]]] = {
        family: [[None] * count for _ in range(count)] for family in FAMILIES
    }
    for i in range(count):
        for j in range(i + 1, count):
            for family, leads in _leads(graph.objects[i], graph.objects[j]):
                matrices[family][i][j] = leads
                matrices[family][j][i] = not leads
    return matrices


def named_objects(graph: SceneGraph) -> list[int]:
    """Return the indices of the objects that ``colour shape`` names unambiguously."""
    phrases = [(node.colour, node.shape) for node in graph.objects]
    return [i for i, phrase in enumerate(phrases) if phrases.count(phrase) == 1]


def _leads(a: ObjectNode, b: ObjectNode) -> list[tuple[str, bool]]:
    """List the decided families of a pair, each with True where ``a`` stands in the leading direction to ``b``."""
    decided = []
    if abs(a.u - b.u) > SIDE_MARGIN:
        decided.append(("left-right", a.u < b.u))
    if abs(a.depth - b.depth) > DEPTH_MARGIN:
        decided.append(("depth", a.depth < b.depth))
    if abs(a.height - b.height) > HEIGHT_MARGIN:
        decided.append(("height", a.height > b.height))
    if a.size != b.size:
        decided.append(("size", SIZE_RANK[a.size] > SIZE_RANK[b.size]))
    return decided

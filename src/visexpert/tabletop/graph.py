"""Scene graphs: the exact content of an image, and which relations hold in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from visexpert.tabletop.world import SIZES

MOST_NAMED = 4
"""Objects that :attr:`SceneGraph.caption` names: the shipped text tower was trained on captions of one to four."""


def with_article(phrase: str) -> str:
    """Return ``a red cube`` for ``red cube``, ``an orange cube`` for ``orange cube``."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True)
class ObjectNode:
    """One object of a scene graph.

    Args:
        shape: ``sphere``, ``cube`` or ``cylinder``.
        colour: Colour word.
        size: ``small``, ``medium`` or ``large`` (true 3-D size class, not apparent size).
        material: ``matte`` or ``shiny``.
        u: Horizontal center in the image, -1 (left edge) to 1 (right edge).
        v: Vertical center in the image, -1 (top edge) to 1 (bottom edge).
        depth: Distance of the center along the optical axis, scene units.
        height: Height of the center above the table, scene units.
        pixels: Visible pixels in the rendered image.
    """

    shape: str
    colour: str
    size: str
    material: str
    u: float
    v: float
    depth: float
    height: float
    pixels: int

    @property
    def phrase(self) -> str:
        """The object's name in text: ``"red cube"``."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class SceneGraph:
    """The exact content of one image: its objects, in no particular order."""

    objects: tuple[ObjectNode, ...]

    @property
    def caption(self) -> str:
        """The objects with the most visible pixels, four at most, largest first: ``a red cube and a blue sphere``."""
        return " and ".join(with_article(node.phrase) for node in self._by_pixels()[:MOST_NAMED])

    @property
    def label(self) -> str:
        """The scene's class: color and shape of the object with the most visible pixels."""
        return self._by_pixels()[0].phrase

    def _by_pixels(self) -> list[ObjectNode]:
        return sorted(self.objects, key=lambda node: (-node.pixels, node.u))

    def judge(self, caption: str) -> dict[str, bool]:
        """Judge a caption ``a <colour> <shape> <relation> a <colour> <shape>``.

        The whole caption must have this form; case and a final period do not matter. A relation holds if its sign is
        right, without a margin: training captions describe pairs with a clear margin, but a model that describes a
        close pair correctly is right. "A red cube" means any red cube: with several of a kind, one fitting pair of
        different objects is enough.

        Returns:
            ``parsed``: whether the caption has this form; ``object``: whether both objects are in the scene;
            ``relation``: whether the stated relation holds as well; ``family/<name>``: the same, under the family of
            the stated relation (``left-right``, ``depth``, ``height``, ``size``).
        """
        claim = parse_relation(caption)
        if claim is None:
            return {"parsed": False, "object": False, "relation": False}
        pairs = [
            (first, second)
            for first, second in permutations(self.objects, 2)
            if first.phrase == claim.subject and second.phrase == claim.object
        ]
        relation = RELATIONS[claim.relation]
        true = any(relation.holds(first, second) for first, second in pairs)
        return {"parsed": True, "object": bool(pairs), "relation": true, f"family/{relation.family}": true}


@dataclass(frozen=True)
class RelationClaim:
    """What a relation caption says: ``subject relation object``, the two as phrases (``"red cube"``)."""

    subject: str
    relation: str
    object: str


class Relation(NamedTuple):
    """A relation between two objects.

    Args:
        words: The words between two noun phrases: ``"in front of"``.
        inverse: The relation with the objects exchanged, which is also its false twin.
        family: ``left-right``, ``depth``, ``height`` or ``size``.
        sign: 1 if the relation says that the first object measures more, -1 if it measures less.
        measure: What is compared: position in the image, depth, height above the table, or size class.
    """

    words: str
    inverse: str
    family: str
    sign: int
    measure: Callable[[ObjectNode], float]

    def holds(self, first: ObjectNode, second: ObjectNode) -> bool:
        """Return whether ``first <relation> second`` is true, by the sign of the difference alone.

        Left and right are those of the image; in front of means nearer to the camera; above and below compare heights
        above the table; larger and smaller compare true size classes, never apparent sizes.
        """
        return self.sign * (self.measure(first) - self.measure(second)) > 0


SIDE_MARGIN = 0.14
"""Least |u - u'| of left / right, in half image widths."""
DEPTH_MARGIN = 0.7
"""Least |depth - depth'| of in front of / behind, scene units."""
HEIGHT_MARGIN = 0.5
"""Least |height - height'| of above / below, scene units."""

LEADING: dict[str, Relation] = {
    "left-right": Relation("left of", "right of", "left-right", -1, lambda node: node.u),
    "depth": Relation("in front of", "behind", "depth", -1, lambda node: node.depth),
    "height": Relation("above", "below", "height", 1, lambda node: node.height),
    "size": Relation("larger than", "smaller than", "size", 1, lambda node: SIZES.index(node.size)),
}
"""The leading relation of each family."""

RELATION_FAMILIES: tuple[str, ...] = tuple(LEADING)

RELATIONS: dict[str, Relation] = {
    relation.words: relation
    for one in LEADING.values()
    for relation in (one, Relation(one.inverse, one.words, one.family, -one.sign, one.measure))
}
"""All relations by their words."""

_MARGINS = {"left-right": SIDE_MARGIN, "depth": DEPTH_MARGIN, "height": HEIGHT_MARGIN, "size": 0.0}
_CAPTION = re.compile(
    rf"an? (?P<subject>\w+ \w+)(?: is)? (?P<relation>{'|'.join(RELATIONS)}) an? (?P<object>\w+ \w+) ?\.?"
)


class Fact(NamedTuple):
    """A relation that is true beyond the dead margin: ``objects[subject] relation objects[other]``."""

    subject: int
    relation: Relation
    other: int


def parse_relation(caption: str) -> RelationClaim | None:
    """Parse a relation caption; return None if it has another form."""
    found = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    return RelationClaim(found["subject"], found["relation"], found["object"]) if found else None


def facts_of(graph: SceneGraph) -> dict[str, list[Fact]]:
    """Find every decided pair of a scene, once per pair and family.

    Args:
        graph: The scene.

    Returns:
        The facts by family. Each states the family's leading relation (left of, in front of, above, larger than);
        exchange the objects and take ``inverse`` for the other wording. Objects that share their name with another are
        left out.
    """
    facts: dict[str, list[Fact]] = {family: [] for family in RELATION_FAMILIES}
    named = named_objects(graph)
    for position, i in enumerate(named):
        for j in named[position + 1 :]:
            for family, leads in _leads(graph.objects[i], graph.objects[j]):
                first, second = (i, j) if leads else (j, i)
                facts[family].append(Fact(first, LEADING[family], second))
    return facts


def leading_matrices(graph: SceneGraph) -> dict[str, list[list[bool | None]]]:
    """Return for each family and ordered pair (i, j) whether the leading relation holds from object i to object j.

    Returns:
        One square matrix per family: True (left of, in front of, above, larger than), False (the inverse), or None
        inside the dead margin and on the diagonal.
    """
    count = len(graph.objects)
    matrices: dict[str, list[list[bool | None]]] = {
        family: [[None] * count for _ in range(count)] for family in RELATION_FAMILIES
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
    """List the decided families of a pair, each with True if the leading relation holds from ``a`` to ``b``."""
    return [
        (family, relation.holds(a, b))
        for family, relation in LEADING.items()
        if abs(relation.measure(a) - relation.measure(b)) > _MARGINS[family]
    ]

"""Scene graphs: the exact content of an image, and what is true of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations


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

    def judge(self, caption: str) -> dict[str, bool]:
        """Judge a caption ``a <colour> <shape> <relation> a <colour> <shape>``.

        It must be of this form as a whole; case and a final full stop do not matter. A relation holds if its sign is
        right: captions are written about pairs with a clear margin, but a model that picks a narrow pair and gets it
        right has told the truth. "A red cube" means any red cube: with several of a kind, one pair of different objects
        that fits is enough.

        Returns:
            ``parsed``, whether it is of this form; ``object``, whether both objects are there; ``relation``, whether
            they stand in the stated relation, too; ``family/<name>`` likewise, of the one that is stated
            (``left-right``, ``depth``, ``height``, ``size``): here the model chose what to state.
        """
        claim = parse_relation(caption)
        if claim is None:
            return {"parsed": False, "object": False, "relation": False}
        pairs = [
            (first, second)
            for first, second in permutations(self.objects, 2)
            if first.phrase == claim.subject and second.phrase == claim.object
        ]
        true = any(relation_holds(claim.relation, first, second) for first, second in pairs)
        family = _RELATIONS[claim.relation][0]
        return {"parsed": True, "object": bool(pairs), "relation": true, f"family/{family}": true}


@dataclass(frozen=True)
class RelationClaim:
    """What a relation caption says: ``subject relation object``, the two as phrases (``"red cube"``)."""

    subject: str
    relation: str
    object: str


def parse_relation(caption: str) -> RelationClaim | None:
    """Parse a relation caption; return None if it has another form."""
    found = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    return RelationClaim(found["subject"], found["relation"], found["object"]) if found else None


def relation_holds(relation: str, first: ObjectNode, second: ObjectNode) -> bool:
    """Return whether ``first <relation> second`` is true, by the sign of the difference alone.

    Left and right are those of the image; in front of means nearer to the camera; above and below compare the heights
    over the table; larger and smaller the true size classes.
    """
    _, sign, measure = _RELATIONS[relation]
    return sign * (measure(first) - measure(second)) > 0


def _size_rank(node: ObjectNode) -> float:
    return float(("small", "medium", "large").index(node.size))


_RELATIONS: dict[str, tuple[str, int, Callable[[ObjectNode], float]]] = {
    "left of": ("left-right", -1, lambda node: node.u),
    "right of": ("left-right", 1, lambda node: node.u),
    "in front of": ("depth", -1, lambda node: node.depth),
    "behind": ("depth", 1, lambda node: node.depth),
    "above": ("height", 1, lambda node: node.height),
    "below": ("height", -1, lambda node: node.height),
    "larger than": ("size", 1, _size_rank),
    "smaller than": ("size", -1, _size_rank),
}
_CAPTION = re.compile(
    rf"an? (?P<subject>\w+ \w+)(?: is)? (?P<relation>{'|'.join(_RELATIONS)}) an? (?P<object>\w+ \w+) ?\.?"
)

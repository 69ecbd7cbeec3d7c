"""Are generated relation captions true of the scene?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from visexpert.metrics.records import RecordMetric, Row, check_lengths
from visexpert.types import ObjectNode, SceneGraph


class SceneCaptionAccuracy(RecordMetric):
    """Truth of captions ``a <colour> <shape> <relation> a <colour> <shape>`` against scene graphs.

    ``compute()``, all in [0, 1]:

    - ``parsed``: share of captions of this form.
    - ``object``: share of all captions whose two objects are both in the scene.
    - ``relation``: share of all captions whose objects are there and stand in the stated relation.
    - ``family/<name>``: of the captions that state a relation of this family (``left-right``, ``depth``, ``height``,
      ``size``), the share that is true. Here the model chose what to state.

    A caption must be of the form as a whole; case and a final full stop do not matter. A relation holds if its sign is
    right: captions are written about pairs with a clear margin, but a model that picks a narrow pair and gets it
    right has told the truth. "A red cube" means any red cube: with several of a kind, one pair of different objects
    that fits is enough.
    """

    higher_is_better = True

    def update(self, captions: Sequence[str], graphs: Sequence[SceneGraph]) -> None:
        """Score a batch.

        Args:
            captions: One generated caption per image.
            graphs: The scene of each.
        """
        check_lengths(captions=captions, graphs=graphs)
        self.add_rows(_judge(caption, graph) for caption, graph in zip(captions, graphs, strict=True))

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Average over captions."""
        scores = {
            "parsed": sum(family is not None for family, _, _ in rows) / len(rows),
            "object": sum(there for _, there, _ in rows) / len(rows),
            "relation": sum(true for _, _, true in rows) / len(rows),
        }
        for family in sorted({family for family, _, _ in rows if family}):
            truths = [true for stated, _, true in rows if stated == family]
            scores[f"family/{family}"] = sum(truths) / len(truths)
        return scores


@dataclass(frozen=True)
class RelationClaim:
    """What a relation caption says: ``subject relation object``, the two as phrases (``"red cube"``)."""

    subject: str
    relation: str
    object: str


def parse_relation(caption: str) -> RelationClaim | None:
    """Read a relation caption; None if it is not of the form."""
    found = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    return RelationClaim(found["subject"], found["relation"], found["object"]) if found else None


def relation_holds(relation: str, first: ObjectNode, second: ObjectNode) -> bool:
    """Tell whether ``first <relation> second`` is true, by the sign of the difference alone.

    Left and right are those of the image; in front of means nearer to the camera; above and below compare the heights
    over the table; larger and smaller the true size classes.
    """
    _, sign, measure = _RELATIONS[relation]
    return sign * (measure(first) - measure(second)) > 0


def caption_holds(caption: str, graph: SceneGraph) -> bool:
    """Tell whether a relation caption is true of a scene: of the form, both objects there, the relation right."""
    return bool(_judge(caption, graph)[2])


def _judge(caption: str, graph: SceneGraph) -> Row:
    claim = parse_relation(caption)
    if claim is None:
        return [None, False, False]
    pairs = [
        (first, second)
        for first, second in permutations(graph.objects, 2)
        if first.phrase == claim.subject and second.phrase == claim.object
    ]
    true = any(relation_holds(claim.relation, first, second) for first, second in pairs)
    return [_RELATIONS[claim.relation][0], bool(pairs), true]


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

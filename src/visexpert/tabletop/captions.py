"""Captions of a scene: dense, relational, and bare object words."""

from __future__ import annotations

from numpy.random import Generator

from visexpert.tabletop.graph import RELATION_FAMILIES, Fact, SceneGraph, facts_of, with_article
from visexpert.types import TextItem

DENSE_PROMPT = "list objects"
RELATION_PROMPT = "describe the image"

NEAR_UNTIL = 7.2
"""Depth (scene units) up to which a dense caption says ``near``."""
FAR_FROM = 8.8
"""Depth (scene units) from which a dense caption says ``far``."""

MAX_REFERENCES = 5

SCORED_AS = {"dense": "slots", "relation": "caption"}
"""Metrics of the kinds of text that are not scored under their own name."""


def dense_caption(graph: SceneGraph) -> TextItem:
    """Name every object from left to right as ``size colour shape distance``.

    The distance word has no dead margin here, since every object needs one; the VQA family ``distance`` has.

    Args:
        graph: The scene.

    Returns:
        For example ``medium yellow cube far large red sphere near``.
    """
    ordered = sorted(graph.objects, key=lambda node: (node.u, node.phrase))
    words = [f"{node.size} {node.phrase} {distance_word(node.depth)}" for node in ordered]
    return TextItem("dense", DENSE_PROMPT, " ".join(words), scored_as=SCORED_AS["dense"])


def relation_captions(
    graph: SceneGraph, rng: Generator, count: int, *, facts: dict[str, list[Fact]] | None = None
) -> list[TextItem]:
    """Draw true captions such as ``a red cube left of a blue sphere``, each with other true ones as references.

    Args:
        graph: The scene.
        rng: Source of the choice; families are equally frequent as far as the scene decides them.
        count: Number of captions; fewer, or none, if the scene decides too few relations.
        facts: The scene's :func:`~visexpert.tabletop.graph.facts_of`, if already known.
    """
    facts = facts_of(graph) if facts is None else facts
    queues = [[facts[family][k] for k in rng.permutation(len(facts[family]))] for family in RELATION_FAMILIES]
    order = [queues[k] for k in rng.permutation(len(queues))]
    wanted = max(count, MAX_REFERENCES)
    picked: list[tuple[str, str]] = []
    while len(picked) < wanted and any(order):
        for queue in order:
            if queue:
                forward, backward = _wordings(graph, queue.pop())
                first, second = (forward, backward) if rng.random() < 0.5 else (backward, forward)
                picked.append((first, second))
    texts = [first for first, _ in picked]
    spare = [second for _, second in picked]
    captions = []
    for text in (texts + spare)[:count]:
        others = [other for other in texts + spare if other != text][: MAX_REFERENCES - 1]
        references = (text, *others)
        captions.append(
            TextItem("relation", RELATION_PROMPT, text, references=references, scored_as=SCORED_AS["relation"])
        )
    return captions


def object_captions(graph: SceneGraph, rng: Generator, count: int) -> list[TextItem]:
    """Draw captions that only name one to four objects: ``a red cube and a blue sphere``.

    They state no position and no relation, which makes a CLIP trained on them semantic and spatially weak.

    Args:
        graph: The scene.
        rng: Source of the choice.
        count: Number of captions.
    """
    captions = []
    limit = min(4, len(graph.objects))
    for _ in range(count):
        chosen = rng.permutation(len(graph.objects))[: rng.integers(1, limit + 1)]
        answer = " and ".join(with_article(graph.objects[k].phrase) for k in chosen)
        captions.append(TextItem("objects", "", answer))
    return captions


def distance_word(depth: float) -> str:
    """Return ``near``, ``middle`` or ``far`` for a depth in scene units."""
    return "near" if depth < NEAR_UNTIL else "far" if depth >= FAR_FROM else "middle"


def _wordings(graph: SceneGraph, fact: Fact) -> tuple[str, str]:
    """Word a fact from the side of its subject and from that of its other object."""
    one, two = (with_article(graph.objects[each].phrase) for each in (fact.subject, fact.other))
    return f"{one} {fact.relation.words} {two}", f"{two} {fact.relation.inverse} {one}"

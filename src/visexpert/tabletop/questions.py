"""Balanced questions (VQA), true / false statements (VSR) and existence probes (POPE) about a scene."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from numpy.random import Generator

from visexpert.tabletop.captions import FAR_FROM, NEAR_UNTIL
from visexpert.tabletop.graph import (
    LEADING,
    RELATION_FAMILIES,
    RELATIONS,
    Fact,
    SceneGraph,
    facts_of,
    leading_matrices,
    named_objects,
    with_article,
)
from visexpert.tabletop.world import COLOURS, MATERIALS, SHAPES, SIZES
from visexpert.types import TextItem

SIDES = ("left", "center", "right")
DISTANCES = ("near", "middle", "far")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
YES_NO = ("yes", "no")
PROBE_KINDS = ("random", "popular", "adversarial")
ALL_PHRASES: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
CENTER_WITHIN = 0.2
"""|u| up to which an object is in the center."""
SIDE_BEYOND = 0.4
"""|u| from which an object is on the left or on the right; between the two limits nothing is asked."""
DISTANCE_MARGIN = 0.25
"""Half width (scene units) of the dead margin around each boundary between near, middle and far."""
MAX_PER_FAMILY = 2
"""Maximum number of questions per family and scene: families that balance easily do not crowd out the others."""
POPULAR_SHARE = 1 / 3
"""Share of all colour-shape phrases that counts as popular."""


class Balancer:
    """Counts answers per key and decides which answers may still be used.

    A candidate is allowed while its answer is less than ``slack`` ahead of the rarest of its possible answers under
    each of its keys (the exact prompt, its template, its family). So the rarest answer sets the pace, common ones are
    subsampled, and every prefix of a split is as balanced as the whole.

    Args:
        slack: Largest lead of an answer over the rarest one.
    """

    def __init__(self, *, slack: int = 1) -> None:
        self.slack = slack
        self._counts: dict[Hashable, dict[str, int]] = {}

    def lead(self, key: Hashable, answer: str, options: Sequence[str]) -> int:
        """Return how far ``answer`` is ahead of the rarest of ``options`` under ``key``.

        Args:
            key: Where the answer counts; always with the same options.
            answer: One of ``options``.
            options: All answers that the prompt can have.
        """
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = dict.fromkeys(options, 0)
        return counts[answer] - min(counts.values())

    def allows(self, keys: Sequence[Hashable], answer: str, options: Sequence[str]) -> bool:
        """Return whether using ``answer`` keeps each of ``keys`` within the slack."""
        for key in keys:
            if self.lead(key, answer, options) >= self.slack:
                return False
        return True

    def use(self, keys: Sequence[Hashable], answer: str) -> None:
        """Count ``answer`` under each of ``keys``, all of which :meth:`allows` or :meth:`lead` has seen."""
        for key in keys:
            self._counts[key][answer] += 1


class Candidate(NamedTuple):
    """A question that could be asked about a scene.

    Args:
        family: One of :data:`FAMILIES`.
        prompt: The question.
        answer: Its one-word answer.
        options: Every answer that the prompt can have; chance is one in ``len(options)``.
        template: Group of prompts that is balanced as a whole, in addition to each prompt.
    """

    family: str
    prompt: str
    answer: str
    options: tuple[str, ...]
    template: str


def questions(graph: SceneGraph, rng: Generator, balancer: Balancer, count: int) -> list[TextItem]:
    """Draw questions about a scene, from each family in turn.

    Args:
        graph: The scene.
        rng: Source of the choice.
        balancer: Keeps the answers of each prompt, and of each template, uniform over the possible ones.
        count: Maximum number of questions.
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


def statements(
    graph: SceneGraph, rng: Generator, balancer: Balancer, count: int, *, facts: dict[str, list[Fact]] | None = None
) -> list[TextItem]:
    """Draw statements such as ``the red cube is left of the blue sphere ?``, half of them false.

    A false statement inverts the relation of a decided pair (``left of`` for ``right of``). Each decided pair has four
    wordings, two true and two false; the one that balance needs most is used.

    Args:
        graph: The scene.
        rng: Source of the choice; families are equally frequent as far as the scene decides them.
        balancer: Keeps yes and no equally frequent per exact prompt, per relation and pair of shapes, and per relation.
        count: Maximum number of statements; at most one per decided pair and family.
        facts: The scene's :func:`~visexpert.tabletop.graph.facts_of`, if already known.
    """
    facts = facts_of(graph) if facts is None else facts
    queues = [[facts[family][k] for k in rng.permutation(len(facts[family]))] for family in RELATION_FAMILIES]
    order = [queues[k] for k in rng.permutation(len(queues))]
    items: list[TextItem] = []
    while len(items) < count and any(order):
        for queue in order:
            if queue and len(items) < count:
                item = _statement(graph, queue.pop(), rng, balancer)
                if item is not None:
                    items.append(item)
    return items


def probes(
    graph: SceneGraph, rng: Generator, balancer: Balancer, popular: frozenset[tuple[str, str]], count: int
) -> list[TextItem]:
    """Draw existence probes ``is there a red cube in the image ?``, half of them about absent objects.

    Absent objects are drawn as in POPE: ``random`` from all absent ones, ``popular`` from the absent ones that are
    frequent in the split, ``adversarial`` from those whose colour and shape are both in the image, but not together.

    Args:
        graph: The scene.
        rng: Source of the choice.
        balancer: Keeps yes and no equally frequent per kind and phrase, and per kind.
        popular: (colour, shape) pairs that count as popular, see :func:`popular_phrases`.
        count: Maximum number of probes; the first three are one of each kind if the scene allows.
    """
    present = {(node.colour, node.shape) for node in graph.objects}
    colours, shapes = {colour for colour, _ in present}, {shape for _, shape in present}
    items: list[TextItem] = []
    used: set[tuple[str, str]] = set()
    kinds = [*PROBE_KINDS, *(PROBE_KINDS[k] for k in rng.integers(0, 3, size=max(0, count - 3)))]
    for kind in kinds[:count]:
        eligible = popular if kind == "popular" else ALL_PHRASES
        absent = [pair for pair in eligible if pair not in present]
        if kind == "adversarial":
            absent = [(colour, shape) for colour, shape in absent if colour in colours and shape in shapes]
        options = {"yes": sorted((present & set(eligible)) - used), "no": sorted(set(absent) - used)}
        choice = _probe(kind, options, rng, balancer)
        if choice is not None:
            (colour, shape), answer = choice
            used.add((colour, shape))
            prompt = f"is there {with_article(f'{colour} {shape}')} in the image ?"
            items.append(TextItem("pope", prompt, answer, family=kind))
    return items


def popular_phrases(graphs: Iterable[SceneGraph]) -> frozenset[tuple[str, str]]:
    """Return the most frequent third of all (colour, shape) pairs in a split (ties by name)."""
    counts = Counter((node.colour, node.shape) for graph in graphs for node in graph.objects)
    ranked = sorted(ALL_PHRASES, key=lambda pair: (-counts[pair], pair))
    return frozenset(ranked[: round(len(ranked) * POPULAR_SHARE)])


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
        yield Candidate("exist", f"is there {with_article(name)} ?", "yes" if true else "no", ("yes", "no"), template)


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
    """Ask for the shape of the only object in a relation to another, if there are at least three objects.

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


def _statement(graph: SceneGraph, fact: Fact, rng: Generator, balancer: Balancer) -> TextItem | None:
    """Return the wording of a fact that balance needs most, or None if every wording would upset it."""
    turned = Fact(fact.other, RELATIONS[fact.relation.inverse], fact.subject)
    best: tuple[int, TextItem, tuple[object, ...]] | None = None
    start = int(rng.integers(0, 4))
    for k in range(4):
        said, answer = (fact, turned)[(start + k) % 2], YES_NO[(start + k) % 4 // 2]
        words = said.relation.words if answer == "yes" else said.relation.inverse
        one, two = graph.objects[said.subject], graph.objects[said.other]
        prompt = f"the {one.phrase} is {words} the {two.phrase} ?"
        keys = (prompt, (words, one.shape, two.shape), ("vsr", words))
        lead = balancer.lead(prompt, answer, YES_NO)
        if (best is None or lead < best[0]) and balancer.allows(keys, answer, YES_NO):
            best = (lead, TextItem("vsr", prompt, answer, family=fact.relation.family), keys)
    if best is None:
        return None
    balancer.use(best[2], best[1].answer)
    return best[1]


def _probe(
    kind: str, options: dict[str, list[tuple[str, str]]], rng: Generator, balancer: Balancer
) -> tuple[tuple[str, str], str] | None:
    """Choose an answer at random, then the phrase that lacks this answer most."""
    answers = YES_NO if rng.random() < 0.5 else YES_NO[::-1]
    for answer in answers:
        pairs = options[answer]
        scored = [
            (balancer.lead((kind, pairs[k]), answer, YES_NO), pairs[k])
            for k in rng.permutation(len(pairs))
            if balancer.allows(((kind, pairs[k]), kind), answer, YES_NO)
        ]
        if scored:
            pair = min(scored, key=lambda entry: entry[0])[1]
            balancer.use(((kind, pair), kind), answer)
            return pair, answer
    return None

"""True / false statements about two objects (VSR) and existence probes (POPE), balanced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from numpy.random import Generator

from visexpert.tabletop.balance import Balancer
from visexpert.tabletop.captions import article
from visexpert.tabletop.graph import SceneGraph
from visexpert.tabletop.relations import FAMILIES, RELATIONS, Fact, facts_of
from visexpert.tabletop.world import COLOURS, SHAPES
from visexpert.types import TextItem

YES_NO = ("yes", "no")

PROBE_KINDS = ("random", "popular", "adversarial")

POPULAR_SHARE = 1 / 3
"""Share of all colour-shape phrases that counts as popular."""


def statements(
    graph: SceneGraph, rng: Generator, balancer: Balancer, count: int, *, facts: dict[str, list[Fact]] | None = None
) -> list[TextItem]:
    """Draw statements such as ``the red cube is left of the blue sphere ?``, half of them false.

    A false statement turns the relation of a decided pair round (``left of`` for ``right of``). Each decided pair
    has four wordings, two true and two false; the one that its prompt is shortest of is taken.

    Args:
        graph: The scene.
        rng: Source of the choice; families come equally often where the scene decides them.
        balancer: Keeps yes and no equal per exact prompt, per relation and pair of shapes, and per relation.
        count: Most statements, at most one per decided pair and family.
        facts: The scene's :func:`~visexpert.tabletop.relations.facts_of`, if already known.
    """
    facts = facts_of(graph) if facts is None else facts
    queues = [[facts[family][k] for k in rng.permutation(len(facts[family]))] for family in FAMILIES]
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

    Absent objects are drawn as POPE does: ``random`` from all absent ones, ``popular`` from the absent ones that are
    frequent in the split, ``adversarial`` where colour and shape are both in the image, but never together.

    Args:
        graph: The scene.
        rng: Source of the choice.
        balancer: Keeps yes and no equal per kind and phrase, and per kind.
        popular: (colour, shape) pairs that count as popular, see :func:`popular_phrases`.
        count: Most probes; the first three are one of each kind where the scene allows.
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
            prompt = f"is there {article(colour)} {colour} {shape} in the image ?"
            items.append(TextItem("pope", prompt, answer, family=kind))
    return items


def popular_phrases(graphs: Iterable[SceneGraph]) -> frozenset[tuple[str, str]]:
    """Return the most frequent third of all (colour, shape) pairs in a split (ties by name)."""
    counts = Counter((node.colour, node.shape) for graph in graphs for node in graph.objects)
    ranked = sorted(ALL_PHRASES, key=lambda pair: (-counts[pair], pair))
    return frozenset(ranked[: round(len(ranked) * POPULAR_SHARE)])


ALL_PHRASES: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


def _statement(graph: SceneGraph, fact: Fact, rng: Generator, balancer: Balancer) -> TextItem | None:
    """Word a fact in the way that its prompts need most, or give None where each would tilt the balance."""
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
    """Pick a phrase and its answer: a coin for the answer, then the phrase that lacks this answer most."""
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

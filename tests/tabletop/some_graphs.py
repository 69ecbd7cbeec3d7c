"""Random scene graphs without a picture, for tests of texts."""

from __future__ import annotations

import numpy as np

from visexpert.tabletop.graph import ObjectNode, SceneGraph
from visexpert.tabletop.world import COLOURS, MATERIALS, SHAPES, SIZES, TabletopWorld


def random_graphs(num: int, seed: int, *, unique_colours: bool = True) -> list[SceneGraph]:
    """Draw graphs of 2 to 5 objects with the world's priors; numbers lie on a coarse grid, so that margins are hit."""
    rng = np.random.default_rng(seed)
    world = TabletopWorld()
    graphs = []
    for _ in range(num):
        count = int(rng.integers(2, 6))
        nodes: list[ObjectNode] = []
        while len(nodes) < count:
            node = ObjectNode(
                shape=SHAPES[rng.choice(3, p=world.shape_prior)],
                colour=COLOURS[rng.choice(8, p=world.colour_prior)],
                size=SIZES[rng.integers(3)],
                material=MATERIALS[rng.integers(2)],
                u=round(float(rng.uniform(-0.9, 0.9)), 2),
                v=round(float(rng.uniform(-0.9, 0.9)), 2),
                depth=round(float(rng.uniform(5.5, 10.5)), 1),
                height=round(float(rng.choice([0.34, 0.5, 0.72]) + (rng.random() < 0.5) * rng.uniform(0.2, 1.7)), 1),
                pixels=60,
            )
            taken = {(other.colour, "" if unique_colours else other.shape) for other in nodes}
            if (node.colour, "" if unique_colours else node.shape) not in taken:
                nodes.append(node)
        graphs.append(SceneGraph(tuple(nodes)))
    return graphs


def node(phrase: str = "red cube", **changes: float | str) -> ObjectNode:
    """Make one object; the phrase gives colour and shape."""
    colour, shape = phrase.split()
    numbers: dict[str, object] = {"u": 0.0, "v": 0.0, "depth": 8.0, "height": 0.5, "pixels": 60}
    settings = {"size": "medium", "material": "matte"} | numbers | changes
    return ObjectNode(shape=shape, colour=colour, **settings)  # type: ignore[arg-type]

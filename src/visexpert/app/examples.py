"""Images and prompts that a visitor can click: scenes of the embedded world and the words it was trained with."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from visexpert.captioning import Captioner
from visexpert.data import TabletopData
from visexpert.data.tabletop.captions import DENSE_PROMPT, RELATION_PROMPT
from visexpert.data.tabletop.render import render
from visexpert.data.tabletop.scenes import sample_scenes

SEED = 20_260_101
"""Of scenes that no training or score uses (those take seeds made of a split's name)."""

PROMPTS = (
    RELATION_PROMPT,
    DENSE_PROMPT,
    "how many objects are there ?",
    "is there a red cube in the image ?",
    "what colour is the cube ?",
    "what size is the blue sphere ?",
    "how far is the red cylinder ?",
    "the red cube is left of the blue sphere ?",
)
"""One of each kind that the models of Tabletop were trained with."""


def example_prompts(captioner: Captioner) -> tuple[str, ...]:
    """Prompts that fit the run's data; none where it is not the embedded world."""
    return PROMPTS if isinstance(captioner.run.data, TabletopData) else ()


def write_examples(captioner: Captioner, folder: Path, *, count: int = 4) -> list[Path]:
    """Render scenes that fit the run's data into PNG files; none where it is not the embedded world."""
    data = captioner.run.data
    if not isinstance(data, TabletopData):
        return []
    rendered = render(sample_scenes(count, seed=SEED, world=data.world), size=data.world.image_size)
    paths = [folder / f"scene{index + 1}.png" for index in range(count)]
    for path, pixels_HW3 in zip(paths, rendered.rgb_NHW3.numpy(), strict=True):
        Image.fromarray(pixels_HW3).save(path)
    return paths

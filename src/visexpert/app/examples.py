"""Images and prompts that a visitor can click, where the run's data has some to show."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from visexpert.captioning import Captioner


def example_prompts(captioner: Captioner) -> tuple[str, ...]:
    """Prompts that the run's data offers to show; none where it offers none."""
    return tuple(getattr(captioner.run.data, "example_prompts", ()))


def write_examples(captioner: Captioner, folder: Path, *, count: int = 4) -> list[Path]:
    """Write images that the run's data offers to show into PNG files; none where it offers none."""
    make = getattr(captioner.run.data, "example_images", None)
    images = [] if make is None else make(count)
    paths = [folder / f"example{index + 1}.png" for index in range(len(images))]
    for path, pixels_HW3 in zip(paths, images, strict=True):
        Image.fromarray(pixels_HW3.numpy()).save(path)
    return paths

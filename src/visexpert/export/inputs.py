"""The fixed inputs that every export is run on: scenes, noise and a flat image, and photos to preprocess."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.export.reload import BATCHES

SEED = 0


@dataclass(frozen=True)
class CheckInputs:
    """Inputs of one check.

    Args:
        images_BCHW: float in [0, 1] at the encoder's own size: scenes, noise, one flat image.
        photos: Scenes at sizes of their own, uint8 (H, W, 3), by name; what image processors are tried on.
        noise: The same with saturated noise, the worst that an image can be.
    """

    images_BCHW: Tensor
    photos: dict[str, Tensor]
    noise: dict[str, Tensor]


def check_inputs(side: int) -> CheckInputs:
    """Inputs for an encoder that reads ``side`` x ``side`` pixels; always the same ones."""
    generator = torch.Generator().manual_seed(SEED)
    count = sum(BATCHES)
    num_noise = count // 2
    scenes = [_scene((side, side), generator) for _ in range(count - num_noise - 1)]
    noise = [torch.rand(3, side, side, generator=generator) for _ in range(num_noise)]
    images_BCHW = torch.stack([*scenes, *noise, torch.full((3, side, side), 0.5)])
    sizes = {"photo_larger": (2 * side + 5, 3 * side), "photo_smaller": (side - side // 4, side + 7)}
    photos = {name: _to_bytes(_scene(size, generator)) for name, size in sizes.items()}
    static = torch.rand(3, 2 * side + 5, 3 * side, generator=generator)
    return CheckInputs(images_BCHW, photos, {"photo_noise": _to_bytes(static)})


def _scene(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A smooth background with two discs, (3, H, W) in [0.1, 0.9]."""
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    scene = F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)[0]
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in size), indexing="ij")
    for _ in range(2):
        u, v, radius = (torch.rand(3, generator=generator) * torch.tensor([1.4, 1.4, 0.4])).tolist()
        inside = (rows - v + 0.7) ** 2 + (columns - u + 0.7) ** 2 < (radius + 0.1) ** 2
        scene = torch.where(inside, torch.rand(3, 1, 1, generator=generator), scene)
    return scene.clamp(0.1, 0.9)


def _to_bytes(image_CHW: Tensor) -> Tensor:
    return (image_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()

"""An expert that would show it, were it not frozen, and images held in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visexpert.experts import VisionExpert


class NoisyExpert(VisionExpert):
    """Patch means through BatchNorm and dropout: in train mode its output changes from call to call."""

    def __init__(self, *, grid: int = 4, width: int = 5) -> None:
        super().__init__(image_size=8 * grid, token_dim=width, grid_hw=(grid, grid), license="Apache-2.0")
        self.patches = nn.Conv2d(3, width, kernel_size=8, stride=8)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.5)
        self.loads = 0
        self.calls = 0

    def load_weights(self) -> None:
        self.loads += 1

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        self.calls += 1
        map_BEHW: Tensor = self.dropout(self.norm(self.patches(pixels_BCHW)))
        return map_BEHW.flatten(2).transpose(1, 2)


class MemoryImages:
    """An :class:`~visexpert.types.ImageSource` of random images."""

    def __init__(self, rows: int, *, seed: int = 0, size: int = 20) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images_BCHW = torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)
        self.fingerprint = f"memory-{rows}-{seed}-{size}"

    def __len__(self) -> int:
        return len(self.images_BCHW)

    def read(self, rows: Sequence[int]) -> Tensor:
        return self.images_BCHW[list(rows)]

"""What student and teachers see of a batch: images of several sizes, and crops that are shifted against each other."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.experts import resize_images
from visexpert.methods.settings import AgglomerationSettings
from visexpert.types import Batch
from visexpert.vision import VisionEncoder

Corner = tuple[int, int]
"""First row and column of a crop, in patches of the frame that crops are cut from."""


@dataclass(frozen=True)
class Look:
    """What student and teachers see of one batch.

    Args:
        side: Side of the student's input in pixels.
        room: Patches that the frame has more than a crop, down and across; 0 for whole images.
        student: Corner of the student's crop, from 0 to ``room``.
        teachers: Corner of the teachers' crop.
    """

    side: int
    room: int = 0
    student: Corner = (0, 0)
    teachers: Corner = (0, 0)


class Looks:
    """Draws what student and teachers see of each training batch.

    Args:
        clip: The student.
        settings: Sizes and shift, of which at least one is set.

    Raises:
        ConfigError: A size that the student cannot read, or a shift after which nothing overlaps.
    """

    def __init__(self, clip: VisionEncoder, settings: AgglomerationSettings) -> None:
        self.sizes = tuple(settings.image_sizes) or (clip.image_size,)
        self.grid, self.patch, self.room = clip.grid_hw[0], clip.patch_size, settings.shift
        for side in self.sizes:
            try:
                clip.require_size(side)
            except ConfigError as error:
                raise ConfigError(f"MoVEKD: agglomeration.image_sizes={list(self.sizes)}: {error}") from error
        if self.room >= self.grid:
            raise ConfigError(
                f"MoVEKD: agglomeration.shift={self.room} may leave no overlap of crops of {self.grid} x {self.grid} "
                f"patches; use at most {self.grid - 1}."
            )

    @classmethod
    def of(cls, clip: VisionEncoder, settings: AgglomerationSettings) -> Looks | None:
        """Return what draws the looks; None if every batch is seen whole, at the student's own size."""
        return cls(clip, settings) if settings.varies else None

    def largest(self) -> Look:
        """Return the look that costs most, for plans."""
        return Look(max(self.sizes), self.room)

    def draw(self, seed: int, batch: int) -> Look:
        """Return what is seen of a batch: the same on all processes, and after a restart.

        Args:
            seed: Seed of the run.
            batch: Number of training batches before it.
        """
        number, place = divmod(batch, len(self.sizes))
        order = random.Random(f"{seed} size {number}").sample(self.sizes, len(self.sizes))
        corners = random.Random(f"{seed} shift {batch}")
        student, teachers = ((corners.randint(0, self.room), corners.randint(0, self.room)) for _ in range(2))
        return Look(order[place], self.room, student, teachers)

    def framed(self, batch: Batch) -> Batch:
        """Return a batch of the frames that crops are cut from; without room, the batch itself.

        The frame is at least as large as the images, and a patch of the student's own size is a whole number of its
        pixels. So nothing is interpolated between crops: the same patch has the same pixels in both.

        Args:
            batch: Images of any size.
        """
        if not self.room:
            return batch
        images_BCHW = batch.images_01()
        cells = self.grid + self.room
        side = cells * self.patch * math.ceil(max(images_BCHW.shape[-2:]) / (cells * self.patch))
        fits = images_BCHW.shape[-2:] == (side, side)
        return batch if fits else replace(batch, images_BCHW=resize_images(images_BCHW, side))

    def cropped(self, framed: Batch, corner: Corner) -> Batch:
        """Return a batch of crops, which no store has; without room, the batch itself.

        Args:
            framed: Batch of :meth:`framed`.
            corner: Corner of the crop.
        """
        if not self.room:
            return framed
        images_BCHW = framed.images_01()
        cell = images_BCHW.shape[-1] // (self.grid + self.room)
        top, left = (place * cell for place in corner)
        side = self.grid * cell
        return replace(framed, images_BCHW=images_BCHW[..., top : top + side, left : left + side], split="")


def overlapping(values_BTX: Tensor, grid_hw: tuple[int, int], own: Corner, other: Corner) -> Tensor:
    """Return those tokens of a crop that another crop shows, too, in the same order for both.

    Args:
        values_BTX: (B, T, X) of the crop, row-major.
        grid_hw: Grid of the crop, T = height x width.
        own: Corner of the crop.
        other: Corner of the other crop.
    """
    if own == other:
        return values_BTX
    ranges = [
        slice(max(0, theirs - ours), count + min(0, theirs - ours))
        for ours, theirs, count in zip(own, other, grid_hw, strict=True)
    ]
    grid_BHWX: Tensor = values_BTX.unflatten(1, grid_hw)
    return grid_BHWX[:, ranges[0], ranges[1]].flatten(1, 2)

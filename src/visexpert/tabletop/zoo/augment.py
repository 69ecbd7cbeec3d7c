"""Geometric augmentation of images together with their dense truth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class SpatialAugment:
    """Random scale, shift and horizontal flip, the same for an image and its class maps.

    Only for truths that do not depend on the camera: scaled or shifted scenes have no valid depth.

    Args:
        scale: Smallest and largest magnification.
        shift: Largest shift, as a share of the image side.
        flip: Chance of a horizontal flip.
    """

    def __init__(self, *, scale: tuple[float, float] = (0.55, 1.3), shift: float = 0.25, flip: float = 0.5) -> None:
        self.scale = (float(scale[0]), float(scale[1]))
        self.shift = shift
        self.flip = flip

    def __call__(self, images_BCHW: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform images (B, 3, H, W) in [0, 1] and class maps (B, H, W); what comes from outside repeats the border.

        Class maps outside the frame become -1 only where the border is background, as the image there is the border's.
        """
        low, high = self.scale
        B = len(images_BCHW)
        zoom_B = torch.exp(torch.empty(B).uniform_(torch.tensor(low).log().item(), torch.tensor(high).log().item()))
        mirror_B = 1 - 2 * (torch.rand(B) < self.flip).float()
        theta_B23 = torch.zeros(B, 2, 3)
        theta_B23[:, 0, 0] = mirror_B / zoom_B
        theta_B23[:, 1, 1] = 1 / zoom_B
        theta_B23[:, :, 2] = (torch.rand(B, 2) * 2 - 1) * 2 * self.shift
        grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
        moved = {
            name: F.grid_sample(
                value_BHW[:, None].float(), grid_BHW2, mode="nearest", padding_mode="border", align_corners=False
            )[:, 0].to(value_BHW.dtype)
            for name, value_BHW in targets.items()
        }
        # Reflection would duplicate objects; the border is table or sky in nearly every scene.
        images_BCHW = F.grid_sample(images_BCHW, grid_BHW2, padding_mode="border", align_corners=False)
        return images_BCHW, moved

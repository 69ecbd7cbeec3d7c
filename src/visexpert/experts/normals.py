"""Surface normals from the depth that another expert predicts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.experts.base import VisionExpert
from visexpert.experts.depth import DepthExpert, unit_range
from visexpert.experts.edges import kornia

OWNER = "NormalsFromDepth"


class NormalsFromDepth(VisionExpert):
    """Unit normals of the surface that a depth map describes, three channels (``tokens: prediction``).

    x to the right, y down, z away from the camera: a surface that faces the camera has (0, 0, 1), as kornia has it.
    Unconfirmed by the paper, which names normals without a model. Relative depth has neither scale nor shift, so its
    normals are right up to the assumptions below. The depth network runs once more than for a depth expert beside it.

    Args:
        depth: The expert to take depth from, with ``tokens: prediction`` and ``scale: raw``.
        field_of_view: Of the camera, across the image, degrees; photos do not say, 60 is a phone's main camera.
        inverse: Whether depth grows towards the camera, as that of relative models does; null for what the model's
            config says.
        nearest: Of inverse depth: distance of the nearest surface as a share of the farthest, which inverse depth
            leaves open.
    """

    def __init__(
        self,
        *,
        depth: DepthExpert,
        field_of_view: float = 60.0,
        inverse: bool | None = None,
        nearest: float = 0.1,
    ) -> None:
        if depth.tokens != "prediction" or depth.facts.get("scale") != "raw":
            raise ConfigError(
                f"{OWNER}: depth needs tokens: prediction and scale: raw, to give distances and no features."
            )
        if not 0 < field_of_view < 180 or not 0 < nearest < 1:
            raise ConfigError(
                f"{OWNER}: field_of_view={field_of_view} and nearest={nearest} cannot be; use 0 to 180 degrees and a "
                "share between 0 and 1."
            )
        inverse = depth.inverse if inverse is None else inverse
        if inverse is None:
            raise ConfigError(f"{OWNER}: the depth model does not say whether its depth is inverse; give inverse.")
        super().__init__(
            image_size=depth.image_size,
            token_dim=3,
            grid_hw=depth.grid_hw,
            license=depth.license,
            mean=depth.recipe.mean,
            std=depth.recipe.std,
            tokens="prediction",
        )
        kornia()
        self.depth = depth
        self.field_of_view, self.inverse, self.nearest = field_of_view, inverse, nearest

    def load_weights(self) -> None:
        """Fill the depth model."""
        self.depth.load_weights()

    def fingerprint(self) -> str:
        """That of the depth model and how normals are made of it."""
        return f"{self.depth.fingerprint()}-normals-{self.field_of_view}-{self.inverse}-{self.nearest}"

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Prepare images as the depth model wants them."""
        return self.depth.preprocess(images_BCHW)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Map normalized pixels to unit normals (B, S, 3), row-major."""
        depth_B1HW = self.depth.network(pixels_BCHW).float()
        normals_B3HW = self.normals(self.distance(depth_B1HW) if self.inverse else depth_B1HW)
        return normals_B3HW.flatten(2).transpose(1, 2).to(pixels_BCHW.dtype)

    def distance(self, inverse_B1HW: Tensor) -> Tensor:
        """Distance, 1 for the farthest surface and ``nearest`` for the nearest, from inverse depth of any scale."""
        return 1.0 / (1.0 + unit_range(inverse_B1HW) * (1.0 / self.nearest - 1.0))

    def normals(self, distance_B1HW: Tensor) -> Tensor:
        """Unit normals (B, 3, H, W) of a surface at these distances along the optical axis."""
        height, width = distance_B1HW.shape[-2:]
        focal = width / 2 / math.tan(math.radians(self.field_of_view) / 2)
        camera = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        camera_B33 = camera.to(distance_B1HW).expand(len(distance_B1HW), 3, 3)
        normals: Tensor = kornia().geometry.depth_to_normals(distance_B1HW, camera_B33)
        return normals

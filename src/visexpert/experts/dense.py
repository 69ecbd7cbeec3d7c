"""Depth and segmentation models from transformers, and surface normals computed from depth."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts.base import TokenKind, VisionExpert
from visexpert.experts.edges import kornia
from visexpert.experts.maps import resize_map
from visexpert.experts.transformers import AutoModelExpert, EncoderMap
from visexpert.typed import typed

DepthScale = Literal["image", "raw"]


@typed
class DepthExpert(AutoModelExpert):
    """Tokens of a depth model's encoder, or the depth that it predicts.

    Args:
        tokens: ``features`` - tokens of the encoder, without running the decoder; ``prediction`` - the depth map, one
            channel.
        layer: For features: see :class:`~visexpert.experts.transformers.TransformersExpert`.
        map_size: Side of the predicted map, in cells; null for the model's own.
        scale: ``image`` - scale each map to [0, 1], for models whose scale and shift are arbitrary (our choice;
            unconfirmed by the papers); ``raw`` - leave it as predicted.
        kwargs: See :class:`~visexpert.experts.transformers.AutoModelExpert`.
    """

    def __init__(
        self,
        *,
        tokens: TokenKind = "features",
        layer: int | None = None,
        map_size: int | None = None,
        scale: DepthScale = "image",
        **kwargs: Any,
    ) -> None:
        if scale not in ("image", "raw"):
            raise ConfigError(f"DepthExpert: scale={scale!r} is unknown; use 'image' or 'raw'.")
        predicts = tokens == "prediction"
        super().__init__(
            auto="AutoModelForDepthEstimation",
            wrap=lambda model: (
                DepthMap(agreeing(model), map_size=map_size, scale=scale)
                if predicts
                else EncoderMap(agreeing(model), layer=layer, headed=True)
            ),
            facts={"layer": layer, "map_size": map_size, "scale": scale} if predicts else {"layer": layer},
            tokens=tokens,
            **kwargs,
        )

    @property
    def inverse(self) -> bool | None:
        """Whether depth grows towards the camera, as in relative models; None if the config does not say."""
        kind = getattr(self.described.config, "depth_estimation_type", None)
        return None if kind is None else kind == "relative"


def agreeing(model: Any) -> nn.Module:
    """Return a depth model once its decoder and its encoder agree on the size of a patch.

    Depth Anything, with or without prompts, has a ``patch_size`` for each; other models have one.

    Raises:
        ConfigError: The two differ.
    """
    kind, encoder = str(model.config.model_type), getattr(model.config, "backbone_config", None)
    decoders, own = getattr(model.config, "patch_size", None), getattr(encoder, "patch_size", None)
    if kind.endswith("depth_anything") and own is not None and decoders != own:
        raise ConfigError(
            f"DepthExpert: patch_size of '{kind}' is {decoders}, but {own} in its backbone_config; set both to {own}."
        )
    network: nn.Module = model
    return network


class DepthMap(nn.Module):
    """Map pixels (B, 3, H, W) to depth (B, 1, h, w).

    Args:
        model: Depth model, whose output has ``predicted_depth``.
        map_size: See :class:`DepthExpert`.
        scale: See :class:`DepthExpert`.
    """

    def __init__(self, model: nn.Module, *, map_size: int | None, scale: DepthScale) -> None:
        super().__init__()
        self.model = model
        self.map_size = map_size
        self.scale = scale

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the predicted map."""
        depth_B1HW = resize_map(self.model(pixels_BCHW).predicted_depth[:, None], self.map_size)
        return unit_range(depth_B1HW) if self.scale == "image" else depth_B1HW


def unit_range(map_B1HW: Tensor) -> Tensor:
    """Scale each map so that its minimum is 0 and its maximum 1; a constant map becomes 0."""
    least = map_B1HW.amin(dim=(-2, -1), keepdim=True)
    span = map_B1HW.amax(dim=(-2, -1), keepdim=True) - least
    return (map_B1HW - least) / span.clamp_min(1e-6)


@typed
class SegmentationExpert(AutoModelExpert):
    """Tokens of a segmentation model's encoder, or the classes that it predicts.

    Args:
        tokens: ``features`` - tokens of the encoder, without running the decoder; ``prediction`` - class probabilities
            per cell, one channel per class.
        layer: For features: see :class:`~visexpert.experts.transformers.TransformersExpert`.
        map_size: Side of the predicted map, in cells; null for the model's own.
        masks: Whether the model predicts masks with a class each (Mask2Former, MaskFormer, OneFormer) instead of a
            class per cell.
        kwargs: See :class:`~visexpert.experts.transformers.AutoModelExpert`.
    """

    def __init__(
        self,
        *,
        tokens: TokenKind = "features",
        layer: int | None = None,
        map_size: int | None = None,
        masks: bool = False,
        **kwargs: Any,
    ) -> None:
        predicts = tokens == "prediction"
        super().__init__(
            auto="AutoModelForUniversalSegmentation" if masks else "AutoModelForSemanticSegmentation",
            wrap=lambda model: (
                ClassMap(model, map_size=map_size) if predicts else EncoderMap(model, layer=layer, headed=True)
            ),
            facts={"layer": layer, "map_size": map_size} if predicts else {"layer": layer},
            tokens=tokens,
            **kwargs,
        )


class ClassMap(nn.Module):
    """Map pixels (B, 3, H, W) to class probabilities (B, classes, h, w).

    Args:
        model: Segmentation model, whose output has ``logits``, or ``class_queries_logits`` and
            ``masks_queries_logits``.
        map_size: See :class:`SegmentationExpert`.
    """

    def __init__(self, model: nn.Module, *, map_size: int | None) -> None:
        super().__init__()
        self.model = model
        self.map_size = map_size

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return class probabilities; with masks, the sum over masks of class times coverage, as in transformers."""
        output = self.model(pixels_BCHW)
        if "masks_queries_logits" in output:
            classes_BQC = output.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last class is "no object"
            scores = torch.einsum("bqc,bqhw->bchw", classes_BQC, output.masks_queries_logits.sigmoid())
        else:
            scores = output.logits.softmax(dim=1)
        return resize_map(scores, self.map_size)


@typed
class NormalsFromDepth(VisionExpert):
    """Unit normals of the surface that a depth map describes, three channels (``tokens: prediction``).

    x points right, y down, z away from the camera: a surface that faces the camera has (0, 0, 1), as in kornia. The
    paper names normals without a model, so this one is unconfirmed. Relative depth has no scale and no shift; its
    normals depend on the assumptions below. The depth network runs again even if the hub has a depth expert as well.

    Args:
        depth: Expert that predicts the depth, with ``tokens: prediction`` and ``scale: raw``.
        field_of_view: Horizontal field of view of the camera, in degrees; photos do not state it, and 60 is that of a
            phone's main camera.
        inverse: Whether depth grows towards the camera, as in relative models; null for what the model's config says.
        nearest: For inverse depth: distance of the nearest surface as a share of the farthest, in (0, 1); inverse depth
            alone does not determine it.
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
                "NormalsFromDepth: depth needs tokens: prediction and scale: raw, so that it gives distances, not "
                "features."
            )
        if not 0 < field_of_view < 180 or not 0 < nearest < 1:
            raise ConfigError(
                f"NormalsFromDepth: field_of_view must be in (0, 180) degrees and nearest in (0, 1), got "
                f"{field_of_view} and {nearest}."
            )
        inverse = depth.inverse if inverse is None else inverse
        if inverse is None:
            raise ConfigError(
                "NormalsFromDepth: the depth model does not say whether its depth is inverse; set inverse to true or "
                "false."
            )
        super().__init__(
            image_size=depth.image_size,
            token_dim=3,
            grid_hw=depth.grid_hw,
            license=depth.license,
            mean=depth.preprocessing.mean,
            std=depth.preprocessing.std,
            tokens="prediction",
        )
        kornia()
        self.depth = depth
        self.field_of_view, self.inverse, self.nearest = field_of_view, inverse, nearest

    def load_weights(self) -> None:
        """Load the weights of the depth model."""
        self.depth.load_weights()

    def fingerprint(self) -> str:
        """Return the fingerprint of the depth model, with the settings that turn depth into normals."""
        return f"{self.depth.fingerprint()}-normals-{self.field_of_view}-{self.inverse}-{self.nearest}"

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Preprocess images as for the depth model."""
        return self.depth.preprocess(images_BCHW)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Map normalized pixels to unit normals (B, S, 3), row-major."""
        depth_B1HW = self.depth.network(pixels_BCHW).float()
        normals_B3HW = self.normals(self.distance(depth_B1HW) if self.inverse else depth_B1HW)
        return normals_B3HW.flatten(2).transpose(1, 2).to(pixels_BCHW.dtype)

    def distance(self, inverse_B1HW: Tensor) -> Tensor:
        """Turn inverse depth of any scale into distance: 1 for the farthest surface, ``nearest`` for the nearest."""
        return 1.0 / (1.0 + unit_range(inverse_B1HW) * (1.0 / self.nearest - 1.0))

    def normals(self, distance_B1HW: Tensor) -> Tensor:
        """Return the unit normals (B, 3, H, W) of a surface at these distances along the optical axis."""
        height, width = distance_B1HW.shape[-2:]
        focal = width / 2 / math.tan(math.radians(self.field_of_view) / 2)
        camera = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        camera_B33 = camera.to(distance_B1HW).expand(len(distance_B1HW), 3, 3)
        normals: Tensor = kornia().geometry.depth_to_normals(distance_B1HW, camera_B33)
        return normals

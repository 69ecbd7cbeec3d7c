"""Depth models of transformers: Depth Anything, DPT, ZoeDepth and others."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts.base import TokenKind
from visexpert.experts.maps import resize_map
from visexpert.experts.transformers import EncoderMap, HubExpert

DepthScale = Literal["image", "raw"]


class DepthExpert(HubExpert):
    """Tokens of a depth model's encoder, or the depth that it predicts.

    Args:
        tokens: ``features`` - of the encoder (the decoder is not run); ``prediction`` - the depth map, one channel.
        layer: Of features; see :class:`~visexpert.experts.transformers.TransformersExpert`.
        map_size: Side of the predicted map that is handed on, cells; null for the model's own.
        scale: ``image`` - each image's map from 0 to 1, for models whose scale and shift mean nothing (ours;
            unconfirmed by the papers); ``raw`` - as predicted.
        kwargs: See :class:`~visexpert.experts.transformers.HubExpert`.
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
        """Whether the prediction grows towards the camera, as that of relative models; None if the config is silent."""
        kind = getattr(self.described.config, "depth_estimation_type", None)
        return None if kind is None else kind == "relative"


def agreeing(model: Any) -> nn.Module:
    """A depth model whose decoder counts the patches that its encoder makes.

    Depth Anything, with or without prompts, has a ``patch_size`` for each; others take the encoder's.

    Raises:
        ConfigError: The two differ.
    """
    kind, encoder = str(model.config.model_type), getattr(model.config, "backbone_config", None)
    decoders, own = getattr(model.config, "patch_size", None), getattr(encoder, "patch_size", None)
    if kind.endswith("depth_anything") and own is not None and decoders != own:
        raise ConfigError(
            f"DepthExpert: patch_size of '{kind}' is {decoders}, but {own} in its backbone_config; write {own} for "
            "both."
        )
    network: nn.Module = model
    return network


class DepthMap(nn.Module):
    """A depth model as (B, 3, H, W) -> (B, 1, h, w).

    Args:
        model: Gives ``predicted_depth``.
        map_size: See :class:`DepthExpert`.
        scale: Likewise.
    """

    def __init__(self, model: nn.Module, *, map_size: int | None, scale: DepthScale) -> None:
        super().__init__()
        self.model = model
        self.map_size = map_size
        self.scale = scale

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """The predicted map."""
        depth_B1HW = resize_map(self.model(pixels_BCHW).predicted_depth[:, None], self.map_size)
        return unit_range(depth_B1HW) if self.scale == "image" else depth_B1HW


def unit_range(map_B1HW: Tensor) -> Tensor:
    """Each map from 0 (its least value) to 1 (its greatest); a constant one is 0."""
    least = map_B1HW.amin(dim=(-2, -1), keepdim=True)
    span = map_B1HW.amax(dim=(-2, -1), keepdim=True) - least
    return (map_B1HW - least) / span.clamp_min(1e-6)

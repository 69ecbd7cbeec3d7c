"""The zoo's own experts: a small CNN or ViT whose architecture is stored in the header of its weights file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError, WeightsError, first_line
from visexpert.experts.base import TokenKind, VisionExpert
from visexpert.io.reading import parse_json
from visexpert.io.source import local_path, zoo_names
from visexpert.io.weights import fill_module, load_safetensors, weights_digest
from visexpert.typed import typed

HEADER_KEY = "visexpert"
"""Key of the safetensors metadata that holds the architecture as JSON."""


@typed
class TinyExpert(VisionExpert):
    """A small expert (CNN or ViT), trained on Tabletop and shipped with the package.

    Args:
        source: ``zoo:NAME`` of a shipped expert, or a ``.safetensors`` file that ``visexpert fit`` on a
            ``configs/zoo`` file wrote. The architecture is read from its header. Exclusive with ``arch``.
        arch: The architecture itself, for training: ``kind`` (``conv`` or ``vit``), ``image_size``, optionally
            ``mean``, ``std`` and ``license``, and ``network``, the arguments of
            :class:`~visexpert.tabletop.tiny.ConvNetwork` or ``ViTNetwork``. Weights stay random.
        tokens: ``features`` - the encoder's tokens; ``prediction`` - its head's map after the activation, one token
            per map cell.
    """

    def __init__(
        self,
        *,
        source: str | None = None,
        arch: dict[str, Any] | None = None,
        tokens: TokenKind = "features",
    ) -> None:
        if (source is None) == (arch is None):
            raise ConfigError("TinyExpert takes either source (zoo:NAME or a file) or arch (for training), not both.")
        path = None if source is None else local_path(source)
        header = read_header(path) if path is not None else dict(arch or {})
        network = build_network(header)
        if tokens == "prediction" and not network.outputs:
            raise ConfigError(f"TinyExpert: {source or 'this architecture'} has no head; use tokens='features'.")
        predicts = tokens == "prediction"
        super().__init__(
            image_size=int(header["image_size"]),
            token_dim=sum(network.outputs.values()) if predicts else network.token_dim,
            grid_hw=network.map_hw if predicts else network.grid_hw,
            license=str(header.get("license", "Apache-2.0")),
            mean=header.get("mean", (0.5, 0.5, 0.5)),
            std=header.get("std", (0.25, 0.25, 0.25)),
            tokens=tokens,
        )
        self.path = path
        self.header = header
        self.network = network

    @property
    def weights_from(self) -> str | None:
        """See :attr:`VisionExpert.weights_from`."""
        return None if self.path is None else str(self.path)

    def load_weights(self) -> None:
        """Fill the network from the weights file; an expert built from ``arch`` keeps its random weights.

        Raises:
            WeightsError: The file is missing or does not fit its own header.
        """
        if self.path is not None:
            fill_module(
                self.network, load_safetensors(self.path, owner="TinyExpert"), owner="TinyExpert", path=self.path
            )

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Map normalized pixels (B, 3, image_size, image_size) to tokens (B, S, E), row-major."""
        map_BEHW = self.network.features(pixels_BCHW)
        if self.tokens == "prediction":
            map_BEHW = self.network.activate(self.network.predict(map_BEHW))
        return map_BEHW.flatten(2).transpose(1, 2)

    def predict(self, images_BCHW: Tensor) -> Tensor:
        """Return the head's raw map (B, C, h, w), before the activation, from images (B, 3, H, W) in [0, 1]."""
        return self.network.predict(self.network.features(self.preprocess(images_BCHW)))

    def fingerprint(self) -> str:
        """Hash of weights, input size, normalization and kind of token."""
        facts = [self.image_size, self.tokens, self.mean.flatten().tolist(), self.std.flatten().tolist()]
        return weights_digest(self.network, facts=json.dumps(facts))


def read_header(path: Path) -> dict[str, Any]:
    """Read the architecture from a weights file without reading the weights.

    Raises:
        WeightsError: The file is missing, is not safetensors, or has no architecture in its header.
    """
    if not path.is_file():
        raise WeightsError(
            f"TinyExpert: no weights at {path}; shipped entries are {zoo_names()} (written 'zoo:NAME'), "
            "others are trained with `visexpert fit --config configs/zoo/NAME.yaml`."
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"TinyExpert: {path} is not a readable safetensors file ({error}); fetch it again."
        ) from error
    try:
        header = parse_json(text or "")
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise WeightsError(
            f"TinyExpert: {path} has no architecture in its header ('{HEADER_KEY}'); only files written by the zoo's "
            "training have one. For other models use the timm, open_clip or transformers experts."
        )
    return header


def build_network(header: Mapping[str, Any]) -> TinyNetwork:
    """Build the network that a header describes, with random weights.

    Raises:
        ConfigError: A key is missing, or an argument is unknown or invalid.
    """
    absent = [key for key in ("kind", "image_size", "network") if key not in header]
    if absent:
        raise ConfigError(f"TinyExpert: the architecture lacks {absent}; it needs kind, image_size and network.")
    kind = header["kind"]
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise ConfigError(f"TinyExpert: kind={kind!r} is unknown; use one of {sorted(NETWORKS)}.")
    build: Callable[..., TinyNetwork] = NETWORKS[kind]
    try:
        network = build(image_size=int(header["image_size"]), **header["network"])
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # RuntimeError: torch's, for sizes
        raise ConfigError(f"TinyExpert: {first_line(error)}; see visexpert.tabletop.tiny for its arguments.") from error
    return network


def header_metadata(header: Mapping[str, Any]) -> dict[str, str]:
    """Return the safetensors metadata that makes a weights file readable by :class:`TinyExpert`."""
    return {"format": "pt", HEADER_KEY: json.dumps(header, sort_keys=True)}


def half_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's weights as fp16 on the CPU, contiguous: the form in which the zoo ships them."""
    return {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in module.state_dict().items()}


Activation = Literal["none", "sigmoid", "unit", "softmax"]
ACTIVATIONS = ("none", "sigmoid", "unit", "softmax")


class TinyNetwork(nn.Module, ABC):
    """A feature map of ``token_dim`` channels on ``grid_hw``, and a linear head that reads a map off it.

    The head is linear on purpose: what it predicts is then linearly decodable from the tokens.

    Args:
        token_dim: Channels E of the feature map.
        grid_hw: Its grid.
        outputs: Channels of the head by name, e.g. ``{"colour": 9, "shape": 4}``; empty means no head.
        upsample: The head's map is this many times finer than the grid (pixel shuffle).
        activation: How raw outputs become a prediction: ``none``, ``sigmoid``, ``unit`` (vector of length one) or
            ``softmax`` within each named output.
    """

    def __init__(
        self,
        *,
        token_dim: int,
        grid_hw: tuple[int, int],
        outputs: Mapping[str, int] | None = None,
        upsample: int = 1,
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"TinyExpert: activation={activation!r} is unknown; use one of {list(ACTIVATIONS)}.")
        self.token_dim = token_dim
        self.grid_hw = grid_hw
        self.map_hw = (grid_hw[0] * upsample, grid_hw[1] * upsample)
        self.outputs = dict(outputs or {})
        self.upsample = upsample
        self.activation: Activation = activation
        channels = sum(self.outputs.values())
        self.head = nn.Conv2d(token_dim, channels * upsample**2, 1) if channels else nn.Identity()

    @abstractmethod
    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the feature map (B, E, h, w) of normalized pixels (B, 3, H, W)."""

    def predict(self, features_BEHW: Tensor) -> Tensor:
        """Return the raw map (B, C, h * upsample, w * upsample), C = all outputs side by side."""
        return F.pixel_shuffle(self.head(features_BEHW), self.upsample)

    def split(self, map_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the map's channels by output name."""
        return dict(zip(self.outputs, map_BCHW.split(list(self.outputs.values()), dim=1), strict=True))

    def activate(self, map_BCHW: Tensor) -> Tensor:
        """Turn a raw map into the prediction: probabilities, unit vectors, or the values themselves."""
        match self.activation:
            case "sigmoid":
                return map_BCHW.sigmoid()
            case "unit":
                return F.normalize(map_BCHW, dim=1)
            case "softmax":
                return torch.cat([part.softmax(dim=1) for part in self.split(map_BCHW).values()], dim=1)
            case _:
                return map_BCHW


class ConvNetwork(TinyNetwork):
    """Strided convolutions down to the grid, then residual blocks and a final norm. No position embedding.

    Args:
        image_size: Side of the input in pixels; the grid is ``image_size / 2**len(widths)``.
        widths: Channels after each stride-2 convolution; the last one is the width of the residual blocks.
        token_dim: Channels of the tokens.
        dilations: One residual block per entry, with this dilation in its first convolution; larger ones see further.
        outputs: Head channels by name.
        upsample: See :class:`TinyNetwork`.
        activation: See :class:`TinyNetwork`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        widths: Sequence[int],
        token_dim: int,
        dilations: Sequence[int] = (1, 1),
        outputs: Mapping[str, int] | None = None,
        upsample: int = 1,
        activation: Activation = "none",
    ) -> None:
        stride = 2 ** len(widths)
        if image_size % stride:
            raise ConfigError(
                f"TinyExpert: image_size={image_size} is not a multiple of {stride} (2 per entry of widths)."
            )
        side = image_size // stride
        super().__init__(
            token_dim=token_dim, grid_hw=(side, side), outputs=outputs, upsample=upsample, activation=activation
        )
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip((3, *widths[:-1]), widths, strict=True)):
            kernel = 5 if index == 0 else 3
            layers += [
                nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False),
                group_norm(after),
                nn.ReLU(inplace=True),
            ]
        layers += [ResidualBlock(widths[-1], dilation) for dilation in dilations]
        layers += [nn.Conv2d(widths[-1], token_dim, 1, bias=False), group_norm(token_dim)]
        self.trunk = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        map_BEHW: Tensor = self.trunk(pixels_BCHW.contiguous(memory_format=torch.channels_last))
        return map_BEHW


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection; the second norm starts at zero, so the block is the identity."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm1 = group_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = group_norm(width)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x_BEHW: Tensor) -> Tensor:
        y_BEHW = F.relu(self.norm1(self.conv1(x_BEHW)), inplace=True)
        return F.relu(x_BEHW + self.norm2(self.conv2(y_BEHW)))


class ViTNetwork(TinyNetwork):
    """timm's pre-LN ``VisionTransformer`` without [CLS]; with a mask token for masked image modeling.

    Args:
        image_size: Side of the input in pixels.
        patch_size: Side of a patch; must divide ``image_size``.
        token_dim: Width.
        depth: Number of blocks.
        num_heads: Attention heads; must divide ``token_dim``.
        mlp_ratio: Width of the MLP over ``token_dim``.
        outputs: Head channels by name.
        upsample: See :class:`TinyNetwork`.
        activation: See :class:`TinyNetwork`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        token_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        outputs: Mapping[str, int] | None = None,
        upsample: int = 1,
        activation: Activation = "none",
    ) -> None:
        if image_size % patch_size or token_dim % num_heads:
            raise ConfigError(
                f"TinyExpert: patch_size={patch_size} must divide image_size={image_size}, "
                f"and num_heads={num_heads} must divide token_dim={token_dim}."
            )
        side = image_size // patch_size
        super().__init__(
            token_dim=token_dim, grid_hw=(side, side), outputs=outputs, upsample=upsample, activation=activation
        )
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=token_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_token=False,
            global_pool="",
            num_classes=0,
        )

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        tokens_BSE: Tensor = self.vit.forward_features(pixels_BCHW)
        map_BEHW: Tensor = tokens_BSE.transpose(1, 2).unflatten(2, self.grid_hw)
        return map_BEHW


def group_norm(width: int) -> nn.GroupNorm:
    """Build a GroupNorm with groups of eight channels (fewer if eight does not divide): no batch statistics to fold."""
    groups = max(1, width // 8)
    return nn.GroupNorm(groups if width % groups == 0 else 1, width)


NETWORKS: dict[str, type[TinyNetwork]] = {"conv": ConvNetwork, "vit": ViTNetwork}
"""Kinds of network by their name in a header."""

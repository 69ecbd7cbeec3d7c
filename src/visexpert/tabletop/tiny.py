"""The zoo's own experts: small networks whose architecture is stored in the header of their weights file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts.base import TokenKind, VisionExpert
from visexpert.io.reading import parse_json
from visexpert.io.source import local_path, zoo_names
from visexpert.io.weights import fill_module, load_safetensors, weights_digest
from visexpert.tabletop.tiny_networks import NETWORKS, TinyNetwork

HEADER_KEY = "visexpert"
"""Key of the safetensors metadata that holds the architecture as JSON."""


class TinyExpert(VisionExpert):
    """A small expert (CNN or ViT), trained on Tabletop and shipped with the package.

    Args:
        source: ``zoo:NAME`` of a shipped expert, or a ``.safetensors`` file that ``visexpert fit`` on a
            ``configs/zoo`` file wrote. The architecture is read from its header; excludes ``arch``.
        arch: The architecture itself, for training: ``kind`` (``conv`` or ``vit``), ``image_size``, optionally
            ``mean``, ``std`` and ``license``, and ``network``, the arguments of
            :class:`~visexpert.tabletop.tiny_networks.ConvNetwork` or ``ViTNetwork``. Weights stay random.
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
            raise ConfigError("TinyExpert takes either source (zoo:NAME or a file) or arch (for training).")
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
        WeightsError: The file is missing, is not safetensors, or carries no architecture.
    """
    if not path.is_file():
        raise WeightsError(
            f"TinyExpert: no weights at {path}; shipped entries are {zoo_names()} (written 'zoo:NAME'), "
            "others are trained with 'visexpert fit --config configs/zoo/NAME.yaml'."
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
    except json.JSONDecodeError:
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
        ConfigError: A key is missing, or an argument is unknown or impossible.
    """
    absent = [key for key in ("kind", "image_size", "network") if key not in header]
    if absent:
        raise ConfigError(f"TinyExpert: the architecture lacks {absent}; it needs kind, image_size and network.")
    kind = header["kind"]
    if kind not in NETWORKS:
        raise ConfigError(f"TinyExpert: kind={kind!r} is unknown; use one of {sorted(NETWORKS)}.")
    build: Callable[..., TinyNetwork] = NETWORKS[kind]
    try:
        network = build(image_size=int(header["image_size"]), **header["network"])
    except TypeError as error:
        raise ConfigError(f"TinyExpert: {error}; see visexpert.tabletop.tiny_networks for its arguments.") from error
    return network


def header_metadata(header: Mapping[str, Any]) -> dict[str, str]:
    """Return the safetensors metadata that makes a weights file readable by :class:`TinyExpert`."""
    return {"format": "pt", HEADER_KEY: json.dumps(header, sort_keys=True)}


def half_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's weights as fp16 on the CPU, contiguous: the form in which the zoo ships them."""
    return {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in module.state_dict().items()}

"""Edge detection with kornia: Sobel, Canny, or the learned detector DexiNed."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.experts.maps import MapExpert, resize_map
from visexpert.io.source import ModelSource
from visexpert.io.weights import fill_module, read_source
from visexpert.networks import RANDOM
from visexpert.networks.preprocessing import Preprocessing
from visexpert.typed import typed

OWNER = "KorniaEdges"
DEXINED_FILE = "DexiNed_BIPED_10.pth"

EdgeMethod = Literal["sobel", "canny", "dexined"]


@typed
class KorniaEdges(MapExpert):
    """Strength of edges as a map in [0, 1], one channel (``tokens: prediction``).

    Prismer, whose low-level experts ToVE follows, uses DexiNed (arXiv 2303.02506); ToVE only says "edges".

    Args:
        method: ``sobel`` or ``canny``, which have no weights, or ``dexined``.
        image_size: Side of the input in pixels.
        map_size: Side of the map, in cells; null for ``image_size``.
        low: Canny: least gradient of a weak edge.
        high: Canny: least gradient of a strong edge.
        weights: DexiNed: a file, or a Hugging Face id whose repository has ``DexiNed_BIPED_10.pth``; ``random`` for
            random weights.
        license: License of DexiNed's weights; null for "not stated". Sobel and Canny need none.
    """

    def __init__(
        self,
        *,
        method: EdgeMethod = "canny",
        image_size: int = 336,
        map_size: int | None = None,
        low: float = 0.1,
        high: float = 0.2,
        weights: str = "kornia/dexined",
        license: str | None = None,
    ) -> None:
        if method not in get_args(EdgeMethod):
            raise ConfigError(f"{OWNER}: method={method!r} is unknown; use one of {list(get_args(EdgeMethod))}.")
        if method == "canny" and not 0 <= low <= high:
            raise ConfigError(f"{OWNER}: thresholds must satisfy 0 <= low <= high, got low={low} and high={high}.")
        learned = method == "dexined"
        network = DexinedMap(map_size) if learned else OperatorMap(method, low=low, high=high, map_size=map_size)
        super().__init__(
            network=network,
            preprocessing=Preprocessing(image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            license=license or (None if learned else "none needed"),
            facts={"method": method, "low": low, "high": high, "map_size": map_size},
            tokens="prediction",
        )
        self.weights = weights if learned else RANDOM

    @property
    def weights_from(self) -> str | None:
        """See :attr:`VisionExpert.weights_from`."""
        return None if self.weights == RANDOM else self.weights

    def load_weights(self) -> None:
        """Read DexiNed's weights; Sobel and Canny have none.

        Raises:
            WeightsError: They are missing, or do not fit; the message says how to fetch them.
        """
        if self.weights != RANDOM:
            found = read_source(ModelSource.parse(self.weights), owner=OWNER, names=(DEXINED_FILE,))
            model = self.network.get_submodule("model")
            fill_module(model, dict(found.tensors), owner=OWNER, path=found.path)


class OperatorMap(nn.Module):
    """Map pixels (B, 3, H, W) in [0, 1] to edges (B, 1, h, w) with Sobel or Canny.

    Args:
        method: ``sobel`` - magnitude of the gradient of brightness, at most 1; ``canny`` - thin edges, 0 or 1.
        low: Canny's lower threshold.
        high: Canny's upper threshold.
        map_size: Side of the map, in cells; None for that of the image.
    """

    def __init__(self, method: EdgeMethod, *, low: float, high: float, map_size: int | None) -> None:
        super().__init__()
        self.method = method
        self.low, self.high = low, high
        self.map_size = map_size
        kornia()

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the edges of the grayscale image."""
        filters, gray_B1HW = kornia().filters, kornia().color.rgb_to_grayscale(pixels_BCHW)
        if self.method == "sobel":
            edges_B1HW = filters.sobel(gray_B1HW).clamp(0.0, 1.0)
        elif pixels_BCHW.is_meta:  # hysteresis loops until nothing changes, which needs values
            edges_B1HW = gray_B1HW
        else:
            _, edges_B1HW = filters.canny(gray_B1HW, self.low, self.high)
        return resize_map(edges_B1HW, self.map_size)


class DexinedMap(nn.Module):
    """Map pixels (B, 3, H, W) in [0, 1] to edge probabilities (B, 1, h, w) with DexiNed (arXiv 2112.02250).

    Args:
        map_size: Side of the map, in cells; None for that of the image.
    """

    mean_bgr: Tensor

    def __init__(self, map_size: int | None) -> None:
        super().__init__()
        self.model = dexined()
        self.map_size = map_size
        # Its weights were trained on BGR images in [0, 255] minus this mean, as kornia documents.
        self.register_buffer("mean_bgr", torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the fused map of all scales."""
        logits_B1HW = self.model(pixels_BCHW.flip(1) * 255.0 - self.mean_bgr)
        return resize_map(logits_B1HW.sigmoid(), self.map_size)


def dexined() -> nn.Module:
    """DexiNed without its weights, from where the installed kornia has it.

    Raises:
        ConfigError: kornia is not installed.
    """
    kornia()
    try:
        module = import_module("kornia.models.dexined")
    except ImportError:  # before 0.9, which needs Python 3.11
        module = import_module("kornia.filters.dexined")
    made: nn.Module = module.DexiNed(pretrained=False)
    return made


def kornia() -> Any:
    """Import kornia when it is first needed.

    Raises:
        ConfigError: kornia is not installed.
    """
    try:
        import kornia
    except ImportError as error:
        raise ConfigError("Edges and normals need kornia; install it with: pip install 'kornia>=0.8'.") from error
    return kornia

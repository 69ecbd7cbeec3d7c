"""What experts of every model library have in common: a network to maps, its own way of preparing images, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor, nn

from visexpert.experts.base import TokenKind, VisionExpert
from visexpert.experts.probe import probe_map
from visexpert.experts.recipe import InputRecipe
from visexpert.io.weights import weights_digest

RANDOM = "random"
"""What is written in place of weights for a network that keeps its random ones."""


class MapExpert(VisionExpert):
    """An expert around a network that maps pixels to a feature map, which becomes tokens in row-major order.

    Width and grid are read from the network itself at the size asked for, also on the ``meta`` device.

    Args:
        network: Maps normalized pixels (B, 3, H, W) to (B, E, h, w).
        recipe: How images get there.
        license: Of the weights; None says "not stated".
        facts: What the tokens depend on beside weights and recipe, such as the layer.
        tokens: See :class:`~visexpert.experts.base.VisionExpert`.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        recipe: InputRecipe,
        license: str | None,
        facts: Mapping[str, object],
        tokens: TokenKind = "features",
    ) -> None:
        shape = probe_map(network, recipe.image_size, owner=type(self).__name__)
        super().__init__(
            image_size=recipe.image_size,
            token_dim=shape[1],
            grid_hw=(shape[2], shape[3]),
            license=license or "not stated",
            mean=recipe.mean,
            std=recipe.std,
            tokens=tokens,
        )
        self.recipe = recipe
        self.network = network
        self.facts = dict(facts)

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Frame and normalize images (B, 3, H, W) in [0, 1] as the recipe says, on their device."""
        return self.recipe.prepare(images_BCHW, self.mean, self.std)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Map normalized pixels (B, 3, image_size, image_size) to tokens (B, S, E), row-major."""
        map_BEHW: Tensor = self.network(pixels_BCHW)
        return map_BEHW.flatten(2).transpose(1, 2)

    def fingerprint(self) -> str:
        """Hash of weights, preparation of images, layer and kind of token."""
        recipe = asdict(self.recipe) | {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        facts = [type(self).__qualname__, self.tokens, sorted(recipe.items()), sorted(self.facts.items())]
        return weights_digest(self.network, facts=repr(facts))

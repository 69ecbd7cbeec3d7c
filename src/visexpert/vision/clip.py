"""CLIP's vision encoder, which receives the experts' knowledge."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from visexpert.errors import ConfigError, require_channels, require_numbers
from visexpert.io.source import ZOO_PREFIX
from visexpert.io.weights import fill_module, weights_digest
from visexpert.precision import like_weights
from visexpert.types import VisionTokens
from visexpert.vision.mole_settings import MoLESettings
from visexpert.vision.positions import resize_positions
from visexpert.vision.published import OWNER, describe_clip, vision_config

MOLE_KEY = re.compile(r"\.mlp\.(router|fc1_experts|fc2_experts)\.")
"""Keys of a state dict that :func:`visexpert.vision.add_mole` adds to those of CLIP."""

POSITIONS = "embeddings.position_embedding.weight"


class ClipEncoder(nn.Module):
    """Hugging Face's ``CLIPVisionModel`` with named tokens; resizes and normalizes on the device.

    The network is built with random weights, without a download; :meth:`load_weights` fills it from safetensors or from
    torch files, without running code from them. open_clip weights are converted exactly when loaded
    (:mod:`visexpert.vision.convert`). Layers after the one in use are not run.

    Args:
        source: ``zoo:NAME`` for a shipped encoder; a folder (also ``local-dir:PATH``) or hub id (``ORG/NAME``,
            ``hf:ORG/NAME@REVISION``, also ``hf-hub:``) of transformers or open_clip, or of a LLaVA, whose vision tower
            is used; ``open_clip:NAME/TAG`` from open_clip's list, such as ``open_clip:ViT-L-14-336/openai``; or a file
            of weights of either library (or a training checkpoint), together with ``architecture`` or ``config``. Null
            for a random encoder.
        layer: Which hidden state to pass on: -1 the last, -2 the one before (LLaVA's and MoVE-KD's choice), ...
            No final LayerNorm is applied, as in LLaVA.
        config: Fields of ``CLIPVisionConfig``, for a random encoder or a source whose own configuration is not on this
            machine yet; if it is, both must agree.
        architecture: Name of an open_clip model instead of ``config``, such as ``ViT-L-14-336-quickgelu``.
        image_size: Side of the input in pixels; null for the source's own. For any other size, position embeddings are
            interpolated as in the source's own library (transformers: bicubic; open_clip: with antialias as well).
        license: License of the weights, for export reports; null means the package's own for ``zoo:`` sources.
        mole: Add a mixture of low-rank experts to its MLPs (MoVE-KD's student); null for a plain CLIP.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        source: str | None = None,
        layer: int = -2,
        config: dict[str, Any] | None = None,
        architecture: str | None = None,
        image_size: int | None = None,
        license: str | None = None,
        mole: MoLESettings | None = None,
    ) -> None:
        super().__init__()
        require_numbers("ClipEncoder", least=1, image_size=image_size)
        self._given = {"source": source, "layer": layer, "config": config, "license": license}
        self._given |= {"architecture": architecture, "image_size": image_size}
        self.source = source
        self.published = describe_clip(source, config=config, architecture=architecture)
        require_channels("ClipEncoder", mean=self.published.mean, std=self.published.std)
        shipped = source is not None and source.startswith(ZOO_PREFIX)
        self.license = license or ("Apache-2.0" if shipped else self.published.license()) or "not stated"
        clip_config = vision_config({**self.published.fields, **({"image_size": image_size} if image_size else {})})
        for side in (clip_config.image_size, clip_config.patch_size):
            _side(side)
        clip_config._attn_implementation = "sdpa"
        self.model = CLIPVisionModel(clip_config)
        depth = clip_config.num_hidden_layers
        if not -depth - 1 <= layer <= -1:
            raise ConfigError(f"ClipEncoder: layer={layer} is outside -{depth + 1}..-1 of a CLIP with {depth} layers.")
        self.layer = layer
        self.projection_dim: int | None = None
        """Width of the space shared with the text tower; None before :meth:`load_weights`, or if the source has no
        projection into it."""
        self.routing_watched = False
        """Whether routing decisions are being collected, including those behind the tokens (collect_routing)."""
        if mole is not None:
            from visexpert.vision.mole import add_mole  # mole imports clip

            add_mole(self, **vars(mole))
        self.resized = image_size is not None
        self.register_buffer("mean", torch.tensor(self.published.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.published.std).view(1, 3, 1, 1), persistent=False)

    @property
    def config(self) -> CLIPVisionConfig:
        """The Hugging Face configuration."""
        return self.model.config

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return _side(self.config.image_size)

    @property
    def width(self) -> int:
        """Token width D."""
        return int(self.config.hidden_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Grid of the patch tokens, height x width = T."""
        side = self.image_size // _side(self.config.patch_size)
        return side, side

    @property
    def weights_from(self) -> str | None:
        """Folder, file or hub id that :meth:`load_weights` reads; None for a random encoder."""
        return self.source

    def load_weights(self) -> None:
        """Read the weights of the source; a random encoder (no source) keeps its own.

        Raises:
            WeightsError: They do not exist, or do not fit; the message says how to fetch them.
        """
        if self.source is None:
            return
        self.published = self.published.completed()
        require_channels("ClipEncoder", mean=self.published.mean, std=self.published.std)
        self.mean.copy_(torch.tensor(self.published.mean).view(1, 3, 1, 1))
        self.std.copy_(torch.tensor(self.published.std).view(1, 3, 1, 1))
        found = self.published.load()
        self.projection_dim = found.projection_dim
        if found.projection_dim is not None:
            self.config.projection_dim = found.projection_dim
        state = dict(found.tensors)
        if self.resized and POSITIONS in state:
            state[POSITIONS] = resize_positions(
                state[POSITIONS], to_hw=self.grid_hw, prefix=1, antialias=found.antialias
            )
        # MoLE's parameters keep their initial values: CLIP's own files do not have them.
        state = {key: value for key, value in self.model.state_dict().items() if MOLE_KEY.search(key)} | state
        fill_module(self.model, state, owner=OWNER, path=found.path)

    def read_modules(self) -> tuple[nn.Module, ...]:
        """Return the parts that the tokens depend on; those behind the layer in use get no gradient from them."""
        layers = self.model.encoder.layers
        return self.model.embeddings, self.model.pre_layrnorm, *layers[: len(layers) + 1 + self.layer]

    def routed_blocks_behind(self) -> tuple[nn.Module, ...]:
        """Return the blocks behind the tokens up to the last MoLE: only the routers' balance loss reaches them."""
        blocks = list(self.model.encoder.layers)
        first = len(self.read_modules()) - 2
        last = max((index for index, block in enumerate(blocks) if _has_mole(block)), default=-1)
        return tuple(blocks[first : last + 1])

    def mole_layers(self) -> tuple[nn.Module, ...]:
        """Return the MLPs with MoLE in block order."""
        return tuple(block.get_submodule("mlp") for block in self.model.encoder.layers if _has_mole(block))

    def plain_modules(self, *, balanced: bool = False) -> tuple[nn.Module, ...]:
        """Return the parts of CLIP itself that get a gradient, without those that MoLE adds.

        Args:
            balanced: Whether there is a balance loss, which also reaches the inputs of the routers behind the tokens.
        """
        embeddings, norm, *blocks = self.read_modules()
        behind = self.routed_blocks_behind() if balanced else ()
        inner = [child for block in (*blocks, *behind) for name, child in block.named_children() if name != "mlp"]
        for block in (*blocks, *behind[:-1]):
            inner += [block.mlp.fc1, block.mlp.fc2]  # type: ignore[union-attr, list-item]
        return embeddings, norm, *inner

    def plain_copy(self) -> ClipEncoder:
        """Return the same CLIP without MoLE, with the same weights."""
        copy = ClipEncoder(**self._given)  # type: ignore[arg-type]
        own = self.model.state_dict()
        copy.model.load_state_dict({key: value for key, value in own.items() if not MOLE_KEY.search(key)}, strict=True)
        return copy

    def fingerprint(self) -> str:
        """Hash of weights, layer, heads, activation and input: what the tokens depend on besides the image."""
        config = self.config
        facts = [self.layer, self.image_size, config.num_attention_heads, config.hidden_act, config.layer_norm_eps]
        facts += [self.mean.flatten().tolist(), self.std.flatten().tolist()]
        return weights_digest(self.model, facts=json.dumps(facts))

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Resize (bicubic, antialiased, as CLIP's processor) and normalize images (B, 3, H, W) in [0, 1].

        Returns:
            (B, 3, H, W) of the input's side, in the precision of the weights.
        """
        size = (self.image_size, self.image_size)
        if images_BCHW.shape[-2:] != size:
            images_BCHW = F.interpolate(images_BCHW, size=size, mode="bicubic", antialias=True, align_corners=False)
            images_BCHW = images_BCHW.clamp(0.0, 1.0)
        return like_weights((images_BCHW - self.mean) / self.std, self.model)

    def forward(self, images_BCHW: Tensor) -> VisionTokens:
        """Encode images (B, 3, H, W), float in [0, 1], any size, into patch tokens (B, T, D) and [CLS] (B, D)."""
        hidden_BND = self.model.pre_layrnorm(self.model.embeddings(self.preprocess(images_BCHW)))
        for layer in self.read_modules()[2:]:
            hidden_BND = layer(hidden_BND, None)
        tokens = VisionTokens(hidden_BND[:, 1:], self.grid_hw, cls_BD=hidden_BND[:, 0])
        for layer in self.routed_blocks_behind() if self.routing_watched else ():
            hidden_BND = layer(hidden_BND, None)
        return tokens


def _has_mole(block: nn.Module) -> bool:
    return hasattr(block.get_submodule("mlp"), "added_modules")


def _side(size: object) -> int:
    """Return a side length, which Hugging Face stores as a number though its type allows pairs."""
    if not isinstance(size, int):
        raise ConfigError(f"ClipEncoder: a side of {size} must be one number: images and patches must be square.")
    return size

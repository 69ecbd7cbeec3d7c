"""CLIP's vision encoder, which receives the experts' knowledge."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from visexpert.errors import ConfigError, require_channels, require_numbers
from visexpert.io.first_use import ReadsWeights, described
from visexpert.io.source import ZOO_PREFIX
from visexpert.io.weights import fill_module, weights_digest
from visexpert.types import Batch, TensorRecord, VisionTokens, check_images
from visexpert.vision.mole import MOLE_KEY, MoLEFeedForward, MoLESettings, add_mole
from visexpert.vision.positions import resize_positions
from visexpert.vision.published import OWNER, describe_clip, vision_config

NEWLINE = -1
"""Index that ends a row of tiles, see :class:`Views`."""

POSITIONS = "embeddings.position_embedding.weight"


class ClipEncoder(ReadsWeights):
    """Hugging Face's ``CLIPVisionModel`` with named tokens; resizes and normalizes on the device.

    The network is built with random weights, without a download; :meth:`load_weights` fills it from safetensors or from
    torch files, without running code from them. open_clip weights are converted exactly when loaded
    (:mod:`visexpert.vision.convert`). Layers after the one in use are not run.

    Args:
        source: ``zoo:NAME`` for a shipped encoder; a folder (also ``local-dir:PATH``) or Hugging Face id (``ORG/NAME``,
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
        """Folder, file or Hugging Face id that :meth:`load_weights` reads; None for a random encoder."""
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
        last = max((index for index, block in enumerate(blocks) if isinstance(block.mlp, MoLEFeedForward)), default=-1)
        return tuple(blocks[first : last + 1])

    def mole_layers(self) -> tuple[MoLEFeedForward, ...]:
        """Return the MLPs with MoLE in block order."""
        mlps = (block.mlp for block in self.model.encoder.layers)
        return tuple(mlp for mlp in mlps if isinstance(mlp, MoLEFeedForward))

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
        copy.mark_weights_in_place()
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
        return ((images_BCHW - self.mean) / self.std).to(self.model.dtype)

    def views_of(self, batch: Batch) -> Views:
        """Return what the encoder sees of a batch: here the images as they are. Samples without one get no tokens."""
        there_B = batch.has_image_B
        if there_B is None:
            return Views(batch, None, None)
        return Views(batch, None, tuple(math.prod(self.grid_hw) * there for there in there_B.tolist()))

    def __call__(self, images_BCHW: Tensor) -> VisionTokens:
        check_images(images_BCHW, owner=type(self).__name__)
        tokens: VisionTokens = super().__call__(images_BCHW)
        return tokens

    def __repr__(self) -> str:
        height, width = self.grid_hw
        mole = f", MoLE in {len(self.mole_layers())} blocks" if self.mole_layers() else ""
        facts = [f"layer {self.layer}", f"{height}x{width} tokens of width {self.width}", f"{self.image_size} px{mole}"]
        return described(self, self.source, facts)

    def forward(self, images_BCHW: Tensor) -> VisionTokens:
        """Encode images (B, 3, H, W), float in [0, 1], any size, into patch tokens (B, T, D) and [CLS] (B, D).

        Calling the encoder reads its weights, where nothing has put them in, and checks the images.

        Raises:
            DataError: When called, images that are something else.
            WeightsError: When called first, weights that are nowhere, or do not fit.
        """
        hidden_BND = self.model.pre_layrnorm(self.model.embeddings(self.preprocess(images_BCHW)))
        for layer in self.read_modules()[2:]:
            hidden_BND = layer(hidden_BND, None)
        tokens = VisionTokens(hidden_BND[:, 1:], self.grid_hw, cls_BD=hidden_BND[:, 0])
        for layer in self.routed_blocks_behind() if self.routing_watched else ():
            hidden_BND = layer(hidden_BND, None)
        return tokens


def _side(size: object) -> int:
    """Return a side length, which Hugging Face stores as a number though its type allows pairs."""
    if not isinstance(size, int):
        raise ConfigError(f"ClipEncoder: a side of {size} must be one number: images and patches must be square.")
    return size


@dataclass(frozen=True)
class Views:
    """What the encoders see of a batch, and how to reassemble their tokens.

    Args:
        batch: One image per view: all whole images, then the tiles of the first, the second, ...; without tiles, the
            batch itself.
        index_BM: int64 index of each token among those of all views (V T); :data:`NEWLINE` ends a row of tiles. None
            without tiles.
        lengths: Number of tokens of each image; None if all have the same.
    """

    batch: Batch
    index_BM: Tensor | None
    lengths: tuple[int, ...] | None

    def whole(self, seen: VisionTokens) -> VisionTokens:
        """Select the tokens of the whole images from those of all views, as without tiles."""
        if self.index_BM is None:
            return seen
        count = len(self.index_BM)
        gates, cls = seen.gates_BTK, seen.cls_BD
        return replace(
            seen,
            tokens_BTD=seen.tokens_BTD[:count],
            cls_BD=None if cls is None else cls[:count],
            gates_BTK=None if gates is None else gates[:count],
        )

    def join(self, seen: VisionTokens) -> VisionTokens:
        """Join the tokens of all views into one row per image: the whole, then its tiles in reading order, unpadded.

        Everything else (gates, [CLS]) is that of the whole images.
        """
        whole = replace(self.whole(seen), lengths=self.lengths)
        if self.index_BM is None:
            return whole
        tokens_XD = seen.tokens_BTD.flatten(0, 1)
        joined_BMD = tokens_XD[self.index_BM.clamp(min=0)]
        return replace(whole, tokens_BTD=joined_BMD, newline_BT=self.index_BM == NEWLINE)


@dataclass(frozen=True)
class ClsAttention(TensorRecord):
    """CLIP's tokens, and the attention scores of its [CLS] token.

    Args:
        tokens: The encoder's output.
        cls_logits_BHN: Scores q_cls . k / sqrt(head width) before the softmax, per head, over [CLS] and then the
            patches: N = 1 + T. Taken from the block that computes the hidden state in use (``attentions[layer]`` of
            transformers), which for MoVE-KD is the 23rd of 24.
    """

    tokens: VisionTokens
    cls_logits_BHN: Tensor

    @classmethod
    def of(cls, clip: ClipEncoder, images_BCHW: Tensor) -> ClsAttention:
        """Encode images (B, 3, H, W), float in [0, 1], in one forward pass.

        Queries and keys are those the block computes anyway; only one row of their product is recomputed.

        Raises:
            ConfigError: The hidden state in use does not come from a block.
        """
        block = clip.read_modules()[-1]
        attention = getattr(block, "self_attn", None)
        if attention is None:
            raise ConfigError(
                f"[CLS] attention needs a block, but layer={clip.layer} reads the embeddings; use a layer from "
                f"-{clip.config.num_hidden_layers} to -1."
            )
        seen: dict[str, Tensor] = {}
        handles = [_watch(attention.q_proj, "queries", seen), _watch(attention.k_proj, "keys", seen)]
        try:
            tokens = clip(images_BCHW)
        finally:
            for handle in handles:
                handle.remove()
        heads = (attention.num_heads, -1)
        queries_BHd = seen["queries"][:, 0].unflatten(-1, heads)
        keys_BNHd = seen["keys"].unflatten(-1, heads)
        return cls(tokens, torch.einsum("bhd,bnhd->bhn", queries_BHd, keys_BNHd) * attention.scale)

    def packed(self) -> Tensor:
        """Return everything as rows of one tensor (B, N, D + H), [CLS] first, as the feature store keeps it."""
        assert self.tokens.cls_BD is not None
        hidden_BND = torch.cat([self.tokens.cls_BD[:, None], self.tokens.tokens_BTD], dim=1)
        return torch.cat([hidden_BND, self.cls_logits_BHN.mT], dim=-1)

    @classmethod
    def unpacked(cls, packed_BNF: Tensor, *, width: int, grid_hw: tuple[int, int]) -> ClsAttention:
        """Undo :meth:`packed`.

        Args:
            packed_BNF: (B, N, D + H).
            width: D of the encoder.
            grid_hw: Its grid.
        """
        hidden_BND, logits_BNH = packed_BNF[..., :width], packed_BNF[..., width:]
        tokens = VisionTokens(hidden_BND[:, 1:], grid_hw, cls_BD=hidden_BND[:, 0])
        return cls(tokens, logits_BNH.mT)


def _watch(linear: nn.Module, name: str, seen: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen[name] = output

    return linear.register_forward_hook(keep)

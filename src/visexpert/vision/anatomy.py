"""How the networks of transformers and timm are read block by block, and how much each of their tokens matters.

A new family is one class here, and a line in :data:`OF_TRANSFORMERS` or :data:`OF_TIMM`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from visexpert.networks.huggingface import cut, patches_of
from visexpert.types import TensorRecord, VisionTokens

SaliencyKind = Literal["cls", "pool", "mean"]
"""Where saliency comes from: ``cls`` - the [CLS] token's attention in the block that computes the tokens; ``pool`` -
the attention of the pooling head (SigLIP's), which reads the last block; ``mean`` - the agreement of each token with
the mean token (ours, for encoders that have neither)."""

SALIENCY_KINDS: tuple[SaliencyKind, ...] = get_args(SaliencyKind)

ABSENT = -1e4
"""Score in the place of a [CLS] token that does not exist: its probability is 0, and float16 can store it."""

SHARPNESS = 10.0
"""Factor from a cosine to a score, for ``mean``: the scores of two tokens differ by 20 at most."""


@dataclass(frozen=True)
class Saliency(TensorRecord):
    """An encoder's tokens, a summary of the image, and a score of each token by head.

    Args:
        tokens: The encoder's output. ``cls_BD`` is the summary in the tokens' space: the [CLS] token, or for encoders
            without one the mean of the tokens, weighted by the scores for ``pool``.
        logits_BHN: Scores before the softmax, per head, of the summary and then the patches: N = 1 + T. For ``cls``
            they are q_cls . k / sqrt(head width) in the block that computes the hidden state in use
            (``attentions[layer]`` of transformers), which for MoVE-KD is the 23rd of 24. Without a [CLS] token the
            first is :data:`ABSENT`; without heads, H is 1.
    """

    tokens: VisionTokens
    logits_BHN: Tensor

    def packed(self) -> Tensor:
        """Return everything as rows of one tensor (B, N, D + H), the summary first, as the feature store keeps it."""
        assert self.tokens.cls_BD is not None
        hidden_BND = torch.cat([self.tokens.cls_BD[:, None], self.tokens.tokens_BTD], dim=1)
        return torch.cat([hidden_BND, self.logits_BHN.mT], dim=-1)

    @classmethod
    def unpacked(cls, packed_BNF: Tensor, *, width: int, grid_hw: tuple[int, int]) -> Saliency:
        """Undo :meth:`packed`.

        Args:
            packed_BNF: (B, N, D + H).
            width: D of the encoder.
            grid_hw: Its grid.
        """
        hidden_BND, logits_BNH = packed_BNF[..., :width], packed_BNF[..., width:]
        tokens = VisionTokens(hidden_BND[:, 1:], grid_hw, cls_BD=hidden_BND[:, 0])
        return cls(tokens, logits_BNH.mT)


def without_cls(logits_BHT: Tensor) -> Tensor:
    """Put :data:`ABSENT` in the place of the [CLS] token: (B, H, T) to (B, H, 1 + T)."""
    return F.pad(logits_BHT, (1, 0), value=ABSENT)


def agreement(tokens_BTD: Tensor) -> Tensor:
    """Return the scores (B, 1, T) of ``mean``: :data:`SHARPNESS` times each token's cosine with the mean token."""
    mean_B1D = tokens_BTD.mean(1, keepdim=True)
    return SHARPNESS * F.cosine_similarity(tokens_BTD, mean_B1D, dim=-1)[:, None]


class AttentionRow(TorchFunctionMode):
    """Watches fused attention and keeps the scores of its first query: ``with AttentionRow() as row: block(tokens)``.

    Queries and keys are those that the library computes anyway, after rotary embeddings and norms; only one row of
    their product is recomputed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits_BHN: Tensor | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            named = (
                dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | given
            )
            self.logits_BHN = _first_row(named["query"], named["key"], named.get("attn_mask"), named.get("scale"))
        return func(*args, **given)


def _first_row(query_BHNd: Tensor, key_BHNd: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    factor = query_BHNd.shape[-1] ** -0.5 if scale is None else scale
    logits_BHN = torch.einsum("bhd,bhnd->bhn", query_BHNd[:, :, 0], key_BHNd) * factor
    return logits_BHN if mask is None else logits_BHN + mask[..., 0, :]


BlockInputs = Sequence[Mapping[str, Any]]
"""Further arguments of each block, such as rotary embeddings."""


class Anatomy(ABC):
    """How one family's network is read.

    Attributes:
        blocks_at: Dotted name of the list of its blocks, each with an MLP called ``mlp``.
        stem_at: Names of what runs before the first block.
        pooling_at: Names of what makes the pooled output from the last hidden state; those that a network lacks are
            left out.
    """

    blocks_at: str = "blocks"
    stem_at: tuple[str, ...] = ()
    pooling_at: tuple[str, ...] = ()
    other_sizes: str = "use that size, or an encoder whose position embeddings can be interpolated"
    """What to do where :meth:`takes_any_size` is false, for messages."""

    def takes_any_size(self, model: Any) -> bool:
        """Return whether the network reads images of any multiple of its patches, not only of its own size."""
        return True

    def blocks(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return the blocks in order."""
        return tuple(model.get_submodule(self.blocks_at).children())

    def stem(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return what runs before the first block; parameters of the network itself come in a ``ParameterList``."""
        own = [parameter for parameter in model.parameters(recurse=False)]
        held = (nn.ParameterList(own),) if own else ()
        return *held, *_present(model, self.stem_at)

    def pooling(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return what makes the pooled output from the last hidden state."""
        return _present(model, self.pooling_at)

    @abstractmethod
    def prefix(self, model: Any) -> int:
        """Return the number of tokens before the patches: [CLS] and registers."""

    def has_cls(self, model: Any) -> bool:
        """Return whether the first token is a [CLS] token."""
        return self.prefix(model) > 0

    @abstractmethod
    def heads(self, model: Any) -> int:
        """Return the number of heads of the blocks' attention."""

    @abstractmethod
    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        """Return the hidden state (B, N, D) before the first block, and the further arguments of each block."""

    @abstractmethod
    def pool(self, model: Any, last_BND: Tensor) -> Tensor | None:
        """Return the pooled output (B, P) of the last hidden state; None for a network without one."""

    def fixed(self, model: nn.Module, image_size: int) -> nn.Module:
        """Return the network for a graph at one image size: itself, unless it reads the values of other inputs."""
        return model

    def attends_in_pooling(self, model: Any) -> bool:
        """Return whether a head attends to the tokens to pool them."""
        return False

    def pool_scores(self, model: Any, last_BND: Tensor) -> Tensor | None:
        """Return the scores (B, H, T) of the pooling head's attention; None for a network without one."""
        return None

    def _alike(self, model: nn.Module, **inputs: Any) -> BlockInputs:
        return [inputs] * len(self.blocks(model))


def _present(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    found = (getattr(model, name, None) for name in names)
    return tuple(module for module in found if isinstance(module, nn.Module))


def _interpolated(model: Any, pixels_BCHW: Tensor) -> dict[str, bool]:
    """Return the argument that makes a network interpolate its position embeddings, if the image needs it."""
    return {} if pixels_BCHW.shape[-1] == model.config.image_size else {"interpolate_pos_encoding": True}


class ClipAnatomy(Anatomy):
    """``CLIPVisionModel``."""

    blocks_at = "encoder.layers"
    stem_at: tuple[str, ...] = ("embeddings", "pre_layrnorm")
    pooling_at: tuple[str, ...] = ("post_layernorm",)

    def prefix(self, model: Any) -> int:
        return 1

    def heads(self, model: Any) -> int:
        return int(model.config.num_attention_heads)

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        embedded_BND = model.embeddings(pixels_BCHW, **_interpolated(model, pixels_BCHW))
        return model.pre_layrnorm(embedded_BND), self._alike(model, attention_mask=None)

    def pool(self, model: Any, last_BND: Tensor) -> Tensor | None:
        pooled_BD: Tensor = model.post_layernorm(last_BND[:, 0])
        return pooled_BD


class SiglipAnatomy(Anatomy):
    """``SiglipVisionModel``: no [CLS] token; a head attends to all tokens."""

    blocks_at = "encoder.layers"
    stem_at: tuple[str, ...] = ("embeddings",)
    pooling_at: tuple[str, ...] = ("post_layernorm", "head")

    def prefix(self, model: Any) -> int:
        return 0

    def heads(self, model: Any) -> int:
        return int(model.config.num_attention_heads)

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        embedded_BND = model.embeddings(pixels_BCHW, **_interpolated(model, pixels_BCHW))
        return embedded_BND, self._alike(model, attention_mask=None)

    def pool(self, model: Any, last_BND: Tensor) -> Tensor | None:
        return model.head(model.post_layernorm(last_BND)) if model.use_head else None

    def attends_in_pooling(self, model: Any) -> bool:
        return bool(model.use_head)

    def pool_scores(self, model: Any, last_BND: Tensor) -> Tensor | None:
        if not model.use_head:
            return None
        states_BND = model.post_layernorm(last_BND)
        probe_B1D = model.head.probe.repeat(len(states_BND), 1, 1)
        _, shares_BH1T = model.head.attention(
            probe_B1D, states_BND, states_BND, need_weights=True, average_attn_weights=False
        )
        scores_BHT: Tensor = shares_BH1T[:, :, 0].clamp_min(torch.finfo(shares_BH1T.dtype).tiny).log()
        return scores_BHT


class FixedPositions(nn.Module):
    """``Siglip2VisionEmbeddings`` for one grid: its positions are read once, by its own code.

    Args:
        embeddings: The library's module.
        grid: Height and width of the grid in patches (1, 2).
    """

    def __init__(self, embeddings: Any, grid: Any) -> None:
        super().__init__()
        self.patch_embedding = embeddings.patch_embedding
        weight = embeddings.patch_embedding.weight
        nothing = weight.new_zeros(1, int(grid.prod()), weight.shape[1])
        with torch.no_grad():  # the embedding of nothing is the bias and the positions
            positions_1TD = embeddings(nothing, grid) - embeddings.patch_embedding.bias
        self.positions_1TD = nn.Parameter(positions_1TD, requires_grad=False)

    def forward(self, patches_BTF: Tensor) -> Tensor:
        """Map flat patches (B, T, patch x patch x 3) to tokens (B, T, D)."""
        tokens_BTD: Tensor = self.patch_embedding(patches_BTF) + self.positions_1TD
        return tokens_BTD


class Siglip2Anatomy(SiglipAnatomy):
    """``Siglip2VisionModel`` on square images: cut into patches here, without padding."""

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        if isinstance(model.embeddings, FixedPositions):
            hidden_BND = model.embeddings(cut(pixels_BCHW, int(model.config.patch_size)))
        else:
            patches = patches_of(pixels_BCHW, model)
            hidden_BND = model.embeddings(patches["pixel_values"], patches["spatial_shapes"])
        return hidden_BND, self._alike(model, attention_mask=None)

    def fixed(self, model: Any, image_size: int) -> nn.Module:
        given = next(model.parameters())
        grid = patches_of(given.new_zeros(1, 3, image_size, image_size), model)["spatial_shapes"]
        found: nn.Module = copy.deepcopy(model)
        found.embeddings = FixedPositions(model.embeddings, grid)
        return found


class Dinov2Anatomy(Anatomy):
    """``Dinov2Model`` and ``Dinov2WithRegistersModel``."""

    blocks_at = "encoder.layer"
    stem_at: tuple[str, ...] = ("embeddings",)
    pooling_at: tuple[str, ...] = ("layernorm",)

    def prefix(self, model: Any) -> int:
        return 1 + int(getattr(model.config, "num_register_tokens", 0) or 0)

    def heads(self, model: Any) -> int:
        return int(model.config.num_attention_heads)

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        return model.embeddings(pixels_BCHW), self._alike(model)

    def pool(self, model: Any, last_BND: Tensor) -> Tensor | None:
        pooled_BD: Tensor = model.layernorm(last_BND)[:, 0]
        return pooled_BD


class Dinov3Anatomy(Dinov2Anatomy):
    """``DINOv3ViTModel``: rotary embeddings, which its own code shifts and scales at random in training."""

    blocks_at = "model.layer"
    stem_at: tuple[str, ...] = ("embeddings", "rope_embeddings")
    pooling_at: tuple[str, ...] = ("norm",)

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        return model.embeddings(pixels_BCHW), self._alike(model, position_embeddings=model.rope_embeddings(pixels_BCHW))

    def pool(self, model: Any, last_BND: Tensor) -> Tensor | None:
        pooled_BD: Tensor = model.norm(last_BND)[:, 0]
        return pooled_BD


class TimmAnatomy(Anatomy):
    """timm's ``VisionTransformer``: ViT, DeiT, SigLIP, CLIP, DINOv2 and others."""

    stem_at: tuple[str, ...] = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
    pooling_at: tuple[str, ...] = ("norm", "attn_pool", "fc_norm")
    other_sizes = "build it with arguments: {dynamic_img_size: true}, or use that size"

    def takes_any_size(self, model: Any) -> bool:
        return bool(getattr(model, "dynamic_img_size", False))

    def prefix(self, model: Any) -> int:
        return int(model.num_prefix_tokens)

    def has_cls(self, model: Any) -> bool:
        return getattr(model, "cls_token", None) is not None

    def heads(self, model: Any) -> int:
        return int(self.blocks(model)[0].attn.num_heads)  # type: ignore[union-attr, arg-type]

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        hidden_BND = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels_BCHW))))
        return hidden_BND, self._alike(model)

    def pool(self, model: Any, last_BND: Tensor) -> Tensor | None:
        pooled_BD: Tensor = model.forward_head(model.norm(last_BND), pre_logits=True)
        return pooled_BD if pooled_BD.ndim == 2 else None

    def attends_in_pooling(self, model: Any) -> bool:
        return getattr(model, "attn_pool", None) is not None

    def pool_scores(self, model: Any, last_BND: Tensor) -> Tensor | None:
        if not self.attends_in_pooling(model):
            return None
        with AttentionRow() as row:
            model.pool(model.norm(last_BND))
        scores_BHN = row.logits_BHN
        assert scores_BHN is not None
        patches = last_BND.shape[1] - self.prefix(model)
        scores_BHT: Tensor = scores_BHN[..., -patches:]
        return scores_BHT


class EvaAnatomy(TimmAnatomy):
    """timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder; rotary embeddings, for some of them one per block."""

    stem_at: tuple[str, ...] = ("patch_embed", "pos_drop", "patch_drop", "rope", "norm_pre")

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        hidden_BND, rope = model._pos_embed(model.patch_embed(pixels_BCHW))
        count = len(self.blocks(model))
        by_block = rope if rope is not None and getattr(model, "rope_mixed", False) else [rope] * count
        return model.norm_pre(hidden_BND), [{"rope": by_block[index]} for index in range(count)]


class BeitAnatomy(TimmAnatomy):
    """timm's ``Beit``: biases of relative positions, in each block or shared."""

    stem_at: tuple[str, ...] = ("patch_embed", "pos_drop", "rel_pos_bias")
    pooling_at: tuple[str, ...] = ("norm", "fc_norm")
    other_sizes = Anatomy.other_sizes

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        patches_BTD = model.patch_embed(pixels_BCHW)
        hidden_BND = torch.cat((model.cls_token.expand(patches_BTD.shape[0], -1, -1), patches_BTD), dim=1)
        if model.pos_embed is not None:
            hidden_BND = hidden_BND + model.pos_embed
        bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        return model.pos_drop(hidden_BND), self._alike(model, shared_rel_pos_bias=bias)


OF_TRANSFORMERS: Mapping[str, Anatomy] = {
    "CLIPVisionModel": ClipAnatomy(),
    "SiglipVisionModel": SiglipAnatomy(),
    "Siglip2VisionModel": Siglip2Anatomy(),
    "Dinov2Model": Dinov2Anatomy(),
    "Dinov2WithRegistersModel": Dinov2Anatomy(),
    "DINOv3ViTModel": Dinov3Anatomy(),
}
"""By class of the network."""

OF_TIMM: Mapping[str, Anatomy] = {
    "VisionTransformer": TimmAnatomy(),
    "VisionTransformerDistilled": TimmAnatomy(),
    "Eva": EvaAnatomy(),
    "Beit": BeitAnatomy(),
}
"""By class of the network."""

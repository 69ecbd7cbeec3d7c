"""Attention of the [CLS] token in one layer, with fused attention in all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.types import VisionTokens
from visexpert.vision.clip import ClipEncoder


@dataclass(frozen=True)
class ClsAttention:
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

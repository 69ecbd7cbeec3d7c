"""Attention of SAM's global blocks without the S x S bias of its relative positions in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

QUERIES = 256
"""Queries at a time: with 16 heads and 4096 keys their bias takes 67 MB per image in float32, all at once 1.07 GB."""


class ChunkedSamAttention(SamVisionSdpaAttention):
    """The same numbers as transformers' class, some rows of queries at a time.

    SAM adds to each logit a bias q . (R_h[row distance] + R_w[column distance]). It depends on the query, so fused
    attention takes it as a mask, which the library makes for all S x S pairs: 4096 x 4096 per head at 1024 px. Here
    it is made for a few rows of queries at a time (MViTv2, arXiv 2112.01526). For inference: nothing is kept
    between rows without a gradient.
    """

    def forward(  # type: ignore[override]  # the library annotates less than it returns
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, None]:
        """Attend within maps (B, h, w, D); the attention itself is never returned."""
        batch, height, width, _ = hidden_states.shape
        heads = self.num_attention_heads
        qkv = self.qkv(hidden_states).reshape(batch, height * width, 3, heads, -1)
        query_BHSd, key_BHSd, value_BHSd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        tables = self._tables(height, width, query_BHSd.dtype)
        rows = max(1, QUERIES // width)
        chunks = [
            F.scaled_dot_product_attention(chunk, key_BHSd, value_BHSd, attn_mask=_bias(chunk, first, width, tables))
            for first, chunk in zip(range(0, height, rows), query_BHSd.split(rows * width, dim=2), strict=True)
        ]
        attended = torch.cat(chunks, dim=2).transpose(1, 2).reshape(batch, height, width, -1)
        return self.proj(attended), None

    def _tables(self, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """R_h (h, h, d) and R_w (w, w, d) by query and key."""
        if not self.use_rel_pos:
            return None
        by_row = self.get_rel_pos(height, height, self.rel_pos_h)
        by_column = self.get_rel_pos(width, width, self.rel_pos_w)
        return by_row.to(dtype), by_column.to(dtype)


def _bias(query_BHQd: Tensor, first: int, width: int, tables: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Bias (B, heads, Q, S) of whole rows of queries, beginning with row ``first``."""
    if tables is None:
        return None
    by_row, by_column = tables
    query = query_BHQd.unflatten(2, (-1, width))
    rel_h = torch.einsum("bnrwd,rkd->bnrwk", query, by_row[first : first + query.shape[2]])
    rel_w = torch.einsum("bnrwd,wkd->bnrwk", query, by_column)
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(4).flatten(2, 3)


def chunk_attention(model: nn.Module) -> None:
    """Chunk the attention of every global block of a ``SamVisionModel`` within; weights and names stay.

    Windowed blocks have few tokens each (14 x 14) and stay as they are.
    """
    for layer in model.modules():
        attention = getattr(layer, "attn", None)
        if type(attention) is SamVisionSdpaAttention and getattr(layer, "window_size", 0) == 0:
            attention.__class__ = ChunkedSamAttention

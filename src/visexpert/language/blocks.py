"""The layers of the cross-attention decoder, and the cache for token-by-token generation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeysValues = tuple[Tensor, Tensor]


class KeyValueCache:
    """Keys and values (R, H, S, D / H) of the tokens seen by one layer, row by row."""

    def __init__(self) -> None:
        self._held: KeysValues | None = None

    def extend(self, new: KeysValues) -> KeysValues:
        """Append those of new tokens; return all so far."""
        if self._held is not None:
            new = torch.cat([self._held[0], new[0]], dim=2), torch.cat([self._held[1], new[1]], dim=2)
        self._held = new
        return new

    def reorder(self, rows_R: Tensor) -> None:
        """Make row i what row ``rows_R[i]`` was."""
        if self._held is not None:
            self._held = self._held[0][rows_R], self._held[1][rows_R]


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each pre-norm with a residual."""

    def __init__(self, width: int, *, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads=heads)
        self.cross = Attention(width, heads=heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_BND: Tensor,
        memory: KeysValues,
        mask: Tensor,
        cache: KeyValueCache | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D).

        Args:
            hidden_BND: The tokens.
            memory: Keys and values of the image.
            mask: bool (B, 1, N, S), true = visible; S includes the tokens in the cache.
            cache: Earlier tokens of the text; these are appended to them.
            memory_mask: bool (B, 1, 1, T), true = part of the image; None without padding.
        """
        normed = self.self_norm(hidden_BND)
        own = self.attention.keys_values(normed)
        own = own if cache is None else cache.extend(own)
        hidden_BND = hidden_BND + self.dropout(self.attention(normed, own, mask))
        hidden_BND = hidden_BND + self.dropout(self.cross(self.cross_norm(hidden_BND), memory, memory_mask))
        out: Tensor = hidden_BND + self.dropout(self.mlp(self.mlp_norm(hidden_BND)))
        return out


class Attention(nn.Module):
    """Multi-head attention whose keys and values may come from another source and be reused."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, source_BSD: Tensor) -> KeysValues:
        """Return keys and values (B, H, S, D / H) of a source."""
        keys, values = self.key_value(source_BSD).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, hidden_BND: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """Attend; ``mask`` bool (B, 1, N, S), true = visible; a token that sees nothing gets zero."""
        query = self._split(self.query(hidden_BND))
        if mask is None:
            attended = F.scaled_dot_product_attention(query, *keys_values)
        else:
            sees = mask.any(-1, keepdim=True)  # an empty softmax would be NaN
            attended = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask | ~sees) * sees
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out

    def _split(self, tensor_BSD: Tensor) -> Tensor:
        batch, num_tokens, width = tensor_BSD.shape
        return tensor_BSD.view(batch, num_tokens, self.heads, width // self.heads).transpose(1, 2)

"""A text decoder that reads vision tokens by cross-attention (Prismer's kind of language side, small)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError, DataError
from visexpert.language.base import LanguageSide, item_mask, supervised
from visexpert.language.position import sincos_2d
from visexpert.resources import fill_module, load_safetensors, resolve_source
from visexpert.types import IGNORE_INDEX, TextBatch, VisionTokens

KeysValues = tuple[Tensor, Tensor]


class CrossAttentionDecoder(LanguageSide):
    """Pre-norm transformer decoder; all text items of an image share the image's keys and values.

    Args:
        vocab_size: V.
        width: Width of decoder and vision tokens.
        depth: Blocks of self-attention, cross-attention and MLP.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over ``width``.
        max_tokens: Longest text item in tokens.
        position_scale: Scale of the 2-D sine-cosine code added to the vision tokens; 0 for none. The decoder sees the
            tokens as a set, so it needs one unless the encoder's own is strong.
        dropout: On the output of each sublayer.
        source: Start weights: a safetensors file or ``zoo:NAME.safetensors``; None for random ones.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int = 96,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        max_tokens: int = 48,
        position_scale: float = 0.7,
        dropout: float = 0.0,
        source: str | None = None,
    ) -> None:
        super().__init__(width=width)
        if width % heads:
            raise ConfigError(f"CrossAttentionDecoder: width {width} is no multiple of heads {heads}.")
        self.source = source
        self.max_tokens = max_tokens
        self.position_scale = position_scale
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.embed_positions = nn.Embedding(max_tokens, width)
        self.memory_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            DecoderBlock(width, heads=heads, mlp_width=int(mlp_ratio * width), dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.embed_positions.weight, std=0.02)
        self.head.weight = self.embed_tokens.weight

    def load_weights(self) -> None:
        """Read ``source``, if any."""
        if self.source is not None:
            path = resolve_source(self.source)
            state = load_safetensors(path, owner="CrossAttentionDecoder")
            state.setdefault("head.weight", state.get("embed_tokens.weight", torch.empty(0)))
            fill_module(self, state, owner="CrossAttentionDecoder", path=path)

    def forward(self, vision: VisionTokens, text: TextBatch) -> Tensor:
        """See :meth:`LanguageSide.forward`."""
        _, predicting_BN = supervised(text)
        hidden_BND = self._decode(self._memory(vision), text)
        logits_MV: Tensor = self.head(self.norm(hidden_BND[predicting_BN]))
        return logits_MV

    @torch.no_grad()
    def generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, max_new_tokens: int = 32
    ) -> list[list[int]]:
        """See :meth:`LanguageSide.generate`. Keys and values of the image are computed once."""
        memory = self._memory(vision)
        rows = [list(prompt) for prompt in prompts]
        self._check_length(max(map(len, rows)))
        done = [len(row) >= self.max_tokens for row in rows]
        for _ in range(max_new_tokens):
            if all(done):
                break
            text = _right_padded(rows, device=vision.tokens_BTD.device)
            last = torch.tensor([len(row) - 1 for row in rows], device=vision.tokens_BTD.device)
            hidden_BND = self._decode(memory, text)
            hidden_BD = hidden_BND[torch.arange(len(rows), device=last.device), last]
            for index, token in enumerate(self.head(self.norm(hidden_BD)).argmax(-1).tolist()):
                done[index] = done[index] or token == eos_id
                if not done[index]:
                    rows[index].append(token)
                    done[index] = len(rows[index]) >= self.max_tokens
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]

    def _memory(self, vision: VisionTokens) -> list[KeysValues]:
        memory_BTD = self.memory_norm(vision.tokens_BTD)
        if self.position_scale:
            code_TD = sincos_2d(vision.grid_hw, self.width).to(memory_BTD)
            memory_BTD = memory_BTD + self.position_scale * code_TD
        return [block.cross.keys_values(memory_BTD) for block in self._layers()]

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.max_tokens:
            raise DataError(
                f"CrossAttentionDecoder: a text item of {num_tokens} tokens is longer than "
                f"max_tokens={self.max_tokens}; shorten it or raise max_tokens."
            )

    def _layers(self) -> list[DecoderBlock]:
        return [block for block in self.blocks if isinstance(block, DecoderBlock)]

    def _decode(self, memory: list[KeysValues], text: TextBatch) -> Tensor:
        if text.ids_BN.numel():
            self._check_length(int(text.positions_BN.max()) + 1)
        hidden_BND: Tensor = self.embed_tokens(text.ids_BN) + self.embed_positions(text.positions_BN)
        mask = item_mask(text)
        for block, keys_values in zip(self._layers(), memory, strict=True):
            hidden_BND = block(hidden_BND, keys_values, mask)
        return hidden_BND


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention, MLP, each pre-normed with a residual."""

    def __init__(self, width: int, *, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads=heads)
        self.cross = Attention(width, heads=heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BND: Tensor, memory: KeysValues, mask: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        normed = self.self_norm(hidden_BND)
        hidden_BND = hidden_BND + self.dropout(self.attention(normed, self.attention.keys_values(normed), mask))
        hidden_BND = hidden_BND + self.dropout(self.cross(self.cross_norm(hidden_BND), memory, None))
        out: Tensor = hidden_BND + self.dropout(self.mlp(self.mlp_norm(hidden_BND)))
        return out


class Attention(nn.Module):
    """Multi-head attention whose keys and values may come from elsewhere and be reused."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, source_BSD: Tensor) -> KeysValues:
        """Keys and values (B, H, S, D / H) of a source."""
        keys, values = self.key_value(source_BSD).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, hidden_BND: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """Attend; ``mask`` bool (B, 1, N, S), true = visible."""
        query = self._split(self.query(hidden_BND))
        attended = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out

    def _split(self, tensor_BSD: Tensor) -> Tensor:
        batch, num_tokens, width = tensor_BSD.shape
        return tensor_BSD.view(batch, num_tokens, self.heads, width // self.heads).transpose(1, 2)


def _right_padded(rows: Sequence[Sequence[int]], *, device: torch.device) -> TextBatch:
    """One unsupervised item per row."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        segments[index, : len(row)] = 1
    positions = torch.arange(length).expand_as(ids) * segments
    return TextBatch(ids, torch.full_like(ids, IGNORE_INDEX), segments, positions).to(device)

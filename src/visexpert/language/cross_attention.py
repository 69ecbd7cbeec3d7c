"""A text decoder that reads vision tokens by cross-attention (a small one of Prismer's kind)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError, DataError, require_numbers
from visexpert.io.source import ModelSource
from visexpert.io.weights import fill_module, read_source
from visexpert.language.base import (
    LanguageModel,
    Predictions,
    at_places,
    image_mask,
    item_mask,
    refuse_markers,
    supervised,
    with_positions,
)
from visexpert.language.generation import Decoding, write
from visexpert.language.writing import CachedWriting
from visexpert.typed import typed
from visexpert.types import TextBatch, VisionTokens

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


@typed
class CrossAttentionDecoder(LanguageModel):
    """Pre-norm transformer decoder; all text items of an image share the image's keys and values.

    Args:
        vocab_size: V.
        width: Width of the decoder and the vision tokens.
        depth: Number of blocks of self-attention, cross-attention and MLP.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over ``width``.
        max_tokens: Longest text item in tokens.
        position_scale: Scale of the 2-D sine-cosine code added to the vision tokens; 0 for none. The decoder sees the
            tokens as a set, so it needs the code unless the encoder's own positions are strong.
        dropout: Dropout on the output of each sublayer.
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
        owner = type(self).__name__
        require_numbers(owner, least=1, vocab_size=vocab_size, width=width, heads=heads, max_tokens=max_tokens)
        require_numbers(owner, least=0, depth=depth, position_scale=position_scale)
        require_numbers(owner, above=0, mlp_ratio=mlp_ratio)
        require_numbers(owner, least=0, below=1, dropout=dropout)
        if width % heads:
            raise ConfigError(f"CrossAttentionDecoder: width {width} must be a multiple of heads {heads}.")
        self.source = source
        self._max_tokens = max_tokens
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

    @property
    def weights_from(self) -> str | None:
        """See :attr:`LanguageModel.weights_from`."""
        return self.source

    @property
    def vocab_size(self) -> int:
        """See :attr:`LanguageModel.vocab_size`."""
        return self.embed_tokens.num_embeddings

    @property
    def max_tokens(self) -> int:
        """Longest text item, in tokens."""
        return self._max_tokens

    def load_weights(self) -> None:
        """Load ``source``, if any."""
        if self.source is not None:
            found = read_source(ModelSource.parse(self.source), owner="CrossAttentionDecoder")
            state = dict(found.tensors)
            state.setdefault("head.weight", state.get("embed_tokens.weight", torch.empty(0)))
            fill_module(self, state, owner="CrossAttentionDecoder", path=found.path)

    def forward(self, vision: VisionTokens, text: TextBatch) -> Predictions:
        """See :meth:`LanguageModel.forward`."""
        self._check_length(text.facts.longest)
        refuse_markers(text, self)
        targets_M, predicting_M = supervised(text)
        mask, memory_mask = item_mask(text), image_mask(vision)
        image_BTD = with_positions(self.memory_norm(vision.tokens_BTD), vision.grid_hw, scale=self.position_scale)
        hidden_BND = self._run(self._memory(image_BTD, memory_mask), text.ids_BN, text.positions_BN, mask, None)
        logits_MV: Tensor = self.head(self.norm(at_places(hidden_BND, predicting_M)))
        return Predictions(logits_MV, targets_M)

    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        self._check_length(max(map(len, prompts)))
        room = [self.max_tokens - len(prompt) for prompt in prompts]
        return write(_DecoderWriting(self, vision, prompts), decoding, eos_id=eos_id, room=room)

    def _memory(self, image_BTD: Tensor, mask: Tensor | None) -> Memory:
        return Memory([block.cross.keys_values(image_BTD) for block in self._layers()], mask)

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.max_tokens:
            raise DataError(
                f"CrossAttentionDecoder: a text item of {num_tokens} tokens is longer than "
                f"max_tokens={self.max_tokens}; shorten it or raise max_tokens."
            )

    def _layers(self) -> list[DecoderBlock]:
        return [block for block in self.blocks if isinstance(block, DecoderBlock)]

    def _run(
        self,
        memory: Memory,
        ids_BN: Tensor,
        positions_BN: Tensor,
        mask: Tensor,
        caches: Sequence[KeyValueCache] | None,
    ) -> Tensor:
        hidden_BND: Tensor = self.embed_tokens(ids_BN) + self.embed_positions(positions_BN)
        for index, (block, keys_values) in enumerate(zip(self._layers(), memory.keys_values, strict=True)):
            cache = None if caches is None else caches[index]
            hidden_BND = block(hidden_BND, keys_values, mask, cache, memory.mask)
        return hidden_BND


@dataclass(frozen=True)
class Memory:
    """An image as the blocks read it.

    Args:
        keys_values: Keys and values of each block.
        mask: bool (B, 1, 1, T), true = part of the image; None without padding.
    """

    keys_values: list[KeysValues]
    mask: Tensor | None

    def rows(self, rows_R: Tensor) -> Memory:
        """Select rows ``rows_R``."""
        chosen = [(keys[rows_R], values[rows_R]) for keys, values in self.keys_values]
        return Memory(chosen, None if self.mask is None else self.mask[rows_R])


class _DecoderWriting(CachedWriting):
    """The decoder with its caches."""

    def __init__(self, decoder: CrossAttentionDecoder, vision: VisionTokens, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(prompts, max_tokens=decoder.max_tokens, device=vision.tokens_BTD.device)
        refuse_markers(self._text, decoder)
        self._decoder = decoder
        normed_BTD = decoder.memory_norm(vision.tokens_BTD)
        image_BTD = with_positions(normed_BTD, vision.grid_hw, scale=decoder.position_scale)
        self._memory = decoder._memory(image_BTD, image_mask(vision))
        self._caches = [KeyValueCache() for _ in self._memory.keys_values]

    def read(self, ids_RN: Tensor, positions_RN: Tensor, mask: Tensor) -> Tensor:
        """See :class:`CachedWriting`."""
        return self._decoder._run(self._memory, ids_RN, positions_RN, mask, self._caches)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """See :class:`CachedWriting`."""
        logits_RV: Tensor = self._decoder.head(self._decoder.norm(hidden_RD))
        return logits_RV

    def keep(self, rows_R: Tensor) -> None:
        """See :class:`CachedWriting`."""
        if len(rows_R) != len(self._length_R):  # otherwise rows only move within their image
            self._memory = self._memory.rows(rows_R)
        for cache in self._caches:
            cache.reorder(rows_R)

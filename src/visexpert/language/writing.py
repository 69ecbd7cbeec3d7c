"""Cached decoding: keys and values of image and text are computed only once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from visexpert.language.base import item_mask, right_padded


class CachedWriting(ABC):
    """A :class:`~visexpert.language.generation.Writing` on top of a cache.

    Prompts are right-padded: a new token occupies the same place in the cache for all rows, but its position is counted
    in its own row, and a row never sees its padding.

    Args:
        prompts: R prompts.
        max_tokens: Number of positions of the decoder.
        device: Device of the decoder.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], *, max_tokens: int, device: torch.device) -> None:
        self._text = right_padded(prompts, device=device)
        self._max_tokens = max_tokens
        self._seen_RS = self._text.segments_BN > 0
        self._length_R = self._seen_RS.sum(1)

    @abstractmethod
    def read(self, ids_RN: Tensor, positions_RN: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states (R, N, D) of new tokens, which are added to the cache; ``mask`` bool (R, 1, N, S)."""

    @abstractmethod
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return logits (R, V) of the next token."""

    @abstractmethod
    def keep(self, rows_R: Tensor) -> None:
        """Make row i of all cached tensors what row ``rows_R[i]`` was; the number of rows may change."""

    def start(self) -> Tensor:
        """See :class:`~visexpert.language.generation.Writing`."""
        hidden_RND = self.read(self._text.ids_BN, self._text.positions_BN, item_mask(self._text))
        rows_R = torch.arange(len(hidden_RND), device=hidden_RND.device)
        return self.logits(hidden_RND[rows_R, self._length_R - 1])

    def append(self, tokens_R: Tensor) -> Tensor:
        """See :class:`~visexpert.language.generation.Writing`."""
        self._seen_RS = torch.cat([self._seen_RS, torch.ones_like(self._seen_RS[:, :1])], dim=1)
        # Full rows wait for the others; their logits are ignored.
        positions_R = self._length_R.clamp(max=self._max_tokens - 1)
        hidden_R1D = self.read(tokens_R[:, None], positions_R[:, None], self._seen_RS[:, None, None])
        self._length_R = self._length_R + 1
        return self.logits(hidden_R1D[:, 0])

    def reorder(self, rows_R: Tensor) -> None:
        """See :class:`~visexpert.language.generation.Writing`."""
        self.keep(rows_R)
        self._seen_RS, self._length_R = self._seen_RS[rows_R], self._length_R[rows_R]

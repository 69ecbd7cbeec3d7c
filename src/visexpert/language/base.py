"""What a language side offers: logits of supervised tokens, and generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from visexpert.errors import DataError
from visexpert.language.generation import Decoding
from visexpert.types import IGNORE_INDEX, TextBatch, VisionTokens


class LanguageSide(nn.Module, ABC):
    """Reads vision tokens and text, predicts text. Implemented by the prefix LM and the cross-attention decoder.

    Args:
        width: Width of the vision tokens that it reads (the language width d_lang of ToVE's eq. 1).
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.width = width

    @abstractmethod
    def load_weights(self) -> None:
        """Fill pretrained weights, where a source was given."""

    @abstractmethod
    def forward(self, vision: VisionTokens, text: TextBatch) -> Tensor:
        """Logits (M, V) of the M supervised tokens, in the order of ``text.labels_BN != IGNORE_INDEX``.

        Row m holds the prediction *for* that token, made from the tokens before it in its own item and the image.
        """

    @property
    def weights_from(self) -> str | None:
        """Folder, file or hub id that :meth:`load_weights` reads; None where it reads none."""
        return None

    @property
    def has_source(self) -> bool:
        """Whether it has weights of its own to start from, so that an earlier stage need not bring them."""
        return False

    def trained_modules(self) -> tuple[nn.Module, ...]:
        """Parts that an optimiser is to get; what is frozen for good (a model beside its LoRA) is not among them."""
        return (self,)

    @torch.no_grad()
    def generate(
        self,
        vision: VisionTokens,
        prompts: Sequence[Sequence[int]],
        *,
        eos_id: int,
        max_new_tokens: int | None = None,
        decoding: Decoding | None = None,
    ) -> list[list[int]]:
        """Continue one prompt per image; token ids up to, without, ``eos_id``.

        Args:
            vision: Tokens of B images.
            prompts: B prompts of any lengths, each with at least its first token (<bos>).
            eos_id: Token that ends an answer.
            max_new_tokens: Longest answer; None for ``decoding``'s.
            decoding: How to choose tokens; None is greedy.

        Raises:
            DataError: A prompt is longer than the model can read.
        """
        decoding = Decoding() if decoding is None else decoding
        if max_new_tokens is not None:
            decoding = replace(decoding, max_new_tokens=max_new_tokens)
        return self._generate(vision, prompts, eos_id=eos_id, decoding=decoding) if prompts else []

    @abstractmethod
    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        """What :meth:`generate` promises, without gradients."""


def supervised(text: TextBatch) -> tuple[Tensor, Tensor]:
    """Targets (M,) of supervised tokens and the mask (B, N) of the positions that predict them.

    Raises:
        DataError: A supervised token stands first in its row, where nothing can predict it.
    """
    wanted_BN = text.labels_BN != IGNORE_INDEX
    if bool(wanted_BN[:, 0].any()):
        raise DataError(
            "TextBatch: a label stands on the first token of a row; items begin with <bos>, which has none."
        )
    predicting_BN = torch.zeros_like(wanted_BN)
    predicting_BN[:, :-1] = wanted_BN[:, 1:]
    return text.labels_BN[wanted_BN], predicting_BN


def item_mask(text: TextBatch) -> Tensor:
    """Which text token may see which: its own item's, up to itself. bool (B, 1, N, N), true = visible.

    Padding sees itself only, so that no row of the softmax is empty.
    """
    segments_BN = text.segments_BN
    same_BNN = segments_BN.unsqueeze(2) == segments_BN.unsqueeze(1)
    num_tokens = segments_BN.shape[1]
    causal_NN = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segments_BN.device).tril()
    real_BNN = (segments_BN > 0).unsqueeze(1)
    itself_NN = torch.eye(num_tokens, dtype=torch.bool, device=segments_BN.device)
    return ((same_BNN & causal_NN & real_BNN) | itself_NN).unsqueeze(1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, true = visible, as what attention of every kind adds to its logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def image_mask(vision: VisionTokens) -> Tensor | None:
    """Which tokens of an image are its own. bool (B, 1, 1, T); None where all are."""
    if vision.lengths_B is None:
        return None
    places_T = torch.arange(vision.tokens_BTD.shape[1], device=vision.lengths_B.device)
    return (places_T < vision.lengths_B[:, None])[:, None, None]


def refuse_markers(text: TextBatch, side: LanguageSide) -> None:
    """For sides that read images beside their text, not in it.

    Raises:
        DataError: The text says where its image goes.
    """
    if text.ids_BN.numel() and int(text.ids_BN.min()) < 0:
        raise DataError(
            f"{type(side).__name__} reads images beside the text, but the text has image tokens (<image>); use no chat "
            "template, or a PrefixLM."
        )


def right_padded(rows: Sequence[Sequence[int]], *, device: torch.device) -> TextBatch:
    """One unsupervised item per row."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        segments[index, : len(row)] = 1
    positions = torch.arange(length).expand_as(ids) * segments
    return TextBatch(ids, torch.full_like(ids, IGNORE_INDEX), segments, positions).to(device)

"""The interface of language models: logits of supervised tokens, and generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError, DataError
from visexpert.io.first_use import ReadsWeights, described
from visexpert.language.generation import Decoding
from visexpert.precision import like_weights
from visexpert.typed import typed
from visexpert.types import IGNORE_INDEX, IMAGE_TOKEN, TextBatch, VisionTokens


class Predictions(NamedTuple):
    """Predictions for the supervised tokens of a text.

    Args:
        logits_MV: Row m is the prediction *for* token m, given the image and the preceding tokens of its item.
        targets_M: int64, the supervised tokens.
    """

    logits_MV: Tensor
    targets_M: Tensor


@typed
class LanguageModel(ReadsWeights, ABC):
    """Reads vision tokens and text and predicts text.

    Args:
        width: Width of the vision tokens it reads (the language width d_lang of ToVE's eq. 1).
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_forward_pre_hook(_check_given, with_kwargs=True, prepend=True)  # before weights are read

    def __repr__(self) -> str:
        return described(self, self.weights_from, [f"width {self.width}"])

    @property
    def max_tokens(self) -> int | None:
        """Longest text item, in tokens; None where nothing limits it."""
        return None

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids, which count from 0; None does not say, so that ids are not checked."""
        return None

    @abstractmethod
    def load_weights(self) -> None:
        """Load pretrained weights, if there is a source."""

    @abstractmethod
    def forward(self, vision: VisionTokens, text: TextBatch) -> Predictions:
        """Predict the M supervised tokens, in the order of ``text.labels_BN != IGNORE_INDEX``.

        A call checks both first, by what the host knows, without waiting for the device.

        Raises:
            DataError: A supervised token is the first of its row, so nothing can predict it; an id is outside the
                vocabulary; images and texts are not as many, or the tokens not as wide as the model reads them.
            ConfigError: Something else than vision tokens and a text.
        """

    @property
    def weights_from(self) -> str | None:
        """Folder, file or Hugging Face id that :meth:`load_weights` reads; None if it reads none."""
        return None

    @property
    def has_source(self) -> bool:
        """Whether it has its own start weights, so that an earlier stage need not provide them."""
        return False

    def packed_weights(self) -> dict[int, float]:
        """Return the bytes per number, by ``id`` of the weight, of weights that loading packs into fewer bits."""
        return {}

    def trained_modules(self) -> tuple[nn.Module, ...]:
        """Return the modules to optimize, without permanently frozen ones (such as a model beside its LoRA)."""
        return (self,)

    @typed
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
        """Continue one prompt per image; return token ids up to, but not including, ``eos_id``.

        Args:
            vision: Tokens of B images.
            prompts: B prompts of any length, each with at least one token (<bos>).
            eos_id: Token that ends an answer.
            max_new_tokens: Longest answer; None for ``decoding``'s.
            decoding: How to choose tokens; None is greedy.

        Raises:
            DataError: A prompt exceeds the model's positions, is empty, or has an id outside the vocabulary; there is
                not one for each image.
        """
        images = len(vision.tokens_BTD)
        if prompts and (len(prompts) != images or not all(prompts)):
            raise DataError(
                f"{type(self).__name__}.generate: {len(prompts)} prompts of {[len(prompt) for prompt in prompts]} "
                f"tokens for {images} images, but each image needs one of at least one token; begin each with <bos>."
            )
        words = [word for prompt in prompts for word in prompt if word != IMAGE_TOKEN]
        _check_ids(self, lowest=min(words, default=0), highest=max(words, default=0))
        _check_tokens(self, vision)
        self.read_on_first_use(vision.tokens_BTD.device)
        decoding = Decoding() if decoding is None else decoding
        if max_new_tokens is not None:
            decoding = replace(decoding, max_new_tokens=max_new_tokens)
        return self._generate(vision, prompts, eos_id=eos_id, decoding=decoding) if prompts else []

    @abstractmethod
    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        """Implement :meth:`generate`; gradients are off."""


def _check_given(side: LanguageModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check what a language model is called with, as :meth:`LanguageModel.forward` says."""
    names = ("vision", "text")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if set(given) != {*names}:
        return  # Python says what is missing or too many
    owner, vision, text = type(side).__name__, given["vision"], given["text"]
    for name, kind in (("vision", VisionTokens), ("text", TextBatch)):
        if not isinstance(given[name], kind):
            raise ConfigError(
                f"{owner}: {name} is {f'a {type(given[name]).__name__}' if given[name] is not None else None}, but "
                f"must be {kind.__name__}; a method's encode(batch) gives the one, batch.text is the other."
            )
    _check_tokens(side, vision)
    facts = text.facts
    if len(vision.tokens_BTD) != len(text.ids_BN):
        raise DataError(
            f"{owner}: there are {len(text.ids_BN)} rows of text for {len(vision.tokens_BTD)} images, but each image "
            "needs one row, which holds all its texts."
        )
    _check_ids(side, lowest=facts.lowest, highest=facts.highest)


def _check_tokens(side: LanguageModel, vision: VisionTokens) -> None:
    shape = tuple(vision.tokens_BTD.shape)
    if side.width and (len(shape) != 3 or shape[-1] != side.width):
        raise DataError(
            f"{type(side).__name__}: tokens_BTD is {shape}, but must be (B, T, {side.width}), as wide as the language "
            "model reads them; map the encoder's tokens with the method's to_language, or a Projector."
        )


def _check_ids(side: LanguageModel, *, lowest: int, highest: int) -> None:
    vocabulary = side.vocab_size
    if vocabulary is not None and (lowest < 0 or highest >= vocabulary):
        raise DataError(
            f"{type(side).__name__}: the text has the token id {lowest if lowest < 0 else highest}, but must have ids "
            f"from 0 to {vocabulary - 1}; use the tokenizer of this language model."
        )


def supervised(text: TextBatch) -> tuple[Tensor, Tensor]:
    """Return targets (M,) of supervised tokens, and int64 (M,) indices row * N + column that predict them.

    Raises:
        DataError: A supervised token is the first of its row, so nothing can predict it.
    """
    if text.facts.opens_supervised:
        raise DataError("TextBatch: the first token of a row has a label; begin each item with <bos>, without a label.")
    places_M = text.facts.places_M
    return at_places(text.labels_BN, places_M), places_M - 1


def at_places(values_BN: Tensor, places_M: Tensor) -> Tensor:
    """Return the values (M, ...) of a tensor (B, N, ...) at indices row * N + column."""
    return values_BN.flatten(0, 1).index_select(0, places_M)


def item_mask(text: TextBatch) -> Tensor:
    """Return the attention mask of a text; see :func:`segment_mask`."""
    return segment_mask(text.segments_BN)


def segment_mask(segments_BN: Tensor) -> Tensor:
    """Return the attention mask of packed items, bool (B, 1, N, N), true = visible: causal within each item.

    Padding (0) sees only itself, so that no softmax row is empty.
    """
    same_BNN = segments_BN.unsqueeze(2) == segments_BN.unsqueeze(1)
    num_tokens = segments_BN.shape[1]
    causal_NN = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segments_BN.device).tril()
    real_BNN = (segments_BN > 0).unsqueeze(1)
    itself_NN = torch.eye(num_tokens, dtype=torch.bool, device=segments_BN.device)
    return ((same_BNN & causal_NN & real_BNN) | itself_NN).unsqueeze(1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask, true = visible, to the values that any attention adds to its logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def image_mask(vision: VisionTokens) -> Tensor | None:
    """Return the mask of an image's tokens, bool (B, 1, 1, T), false = padding; None without padding."""
    if vision.lengths is None:
        return None
    lengths_B = token_counts(vision)
    places_T = torch.arange(vision.tokens_BTD.shape[1], device=lengths_B.device)
    return (places_T < lengths_B[:, None])[:, None, None]


def token_counts(vision: VisionTokens) -> Tensor:
    """Return the number of tokens of each image, int64 (B,), on the device of the tokens."""
    return torch.tensor(token_lengths(vision)).to(vision.tokens_BTD.device, non_blocking=True)


def token_lengths(vision: VisionTokens) -> tuple[int, ...]:
    """Return the number of tokens of each image, known on the host."""
    tokens_BTD = vision.tokens_BTD
    return (tokens_BTD.shape[1],) * len(tokens_BTD) if vision.lengths is None else vision.lengths


def sincos_2d(grid_hw: tuple[int, int], width: int) -> Tensor:
    """Return the sine-cosine code of each cell: half of the channels for the row, half for the column.

    Args:
        grid_hw: Grid, height x width.
        width: Channels, a multiple of 4.

    Returns:
        float32 (T, width), values in [-1, 1], row-major.
    """
    if width % 4:
        raise ConfigError(f"sincos_2d: width {width} must be a multiple of 4.")
    frequencies = torch.pi * 2.0 ** torch.linspace(-1, 3, width // 4)
    rows, columns = (torch.arange(side).add(0.5).div(side) for side in grid_hw)
    codes = [
        torch.cat([torch.sin(axis[:, None] * frequencies), torch.cos(axis[:, None] * frequencies)], -1)
        for axis in (rows, columns)
    ]
    row_code = codes[0][:, None].expand(-1, grid_hw[1], -1)
    column_code = codes[1][None].expand(grid_hw[0], -1, -1)
    return torch.cat([row_code, column_code], -1).flatten(0, 1)


def with_positions(tokens_BTD: Tensor, grid_hw: tuple[int, int], *, scale: float) -> Tensor:
    """Add :func:`sincos_2d`, times ``scale``, to the tokens (B, T, D) of a grid; 0 adds nothing."""
    return tokens_BTD + scale * sincos_2d(grid_hw, tokens_BTD.shape[-1]).to(tokens_BTD) if scale else tokens_BTD


def refuse_markers(text: TextBatch, side: LanguageModel) -> None:
    """Check that a text has no image tokens, for models that read images beside the text.

    Raises:
        DataError: The text has image tokens.
    """
    if text.facts.has_markers:
        raise DataError(
            f"{type(side).__name__} reads images beside the text, but the text has image tokens (<image>); use no chat "
            "template, or a PrefixLM."
        )


def right_padded(rows: Sequence[Sequence[int]], *, device: torch.device) -> TextBatch:
    """Return one unsupervised item per row."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        segments[index, : len(row)] = 1
    positions = torch.arange(length).expand_as(ids) * segments
    return TextBatch(ids, torch.full_like(ids, IGNORE_INDEX), segments, positions).to(device)


ProjectorKind = Literal["linear", "mlp2x_gelu", "identity"]


@typed
@dataclass(frozen=True, kw_only=True)
class ProjectorSettings:
    """Settings of the projector from CLIP tokens to the language width.

    Args:
        kind: ``linear``, ``mlp2x_gelu`` (LLaVA-1.5, MoVE-KD's paper) or ``identity`` for tokens that already fit.
        norm: LayerNorm before it (LLaVA has none; frozen encoders with different scales benefit).
    """

    kind: ProjectorKind = "linear"
    norm: bool = True


@typed
class Projector(nn.Module):
    """Maps vision tokens to the language width.

    Args:
        in_dim: Width of the vision tokens.
        out_dim: Language width.
        kind: ``linear``; ``mlp2x_gelu`` - LLaVA-1.5's; ``identity`` for tokens that already fit.
        norm: LayerNorm on the input (LLaVA has none; frozen encoders with different scales benefit).
    """

    def __init__(self, *, in_dim: int, out_dim: int, kind: ProjectorKind = "mlp2x_gelu", norm: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(in_dim) if norm else nn.Identity()
        if kind == "linear":
            self.layers: nn.Module = nn.Linear(in_dim, out_dim)
        elif kind == "mlp2x_gelu":
            self.layers = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
        elif kind == "identity" and in_dim == out_dim:
            self.layers = nn.Identity()
        else:
            raise ConfigError(
                f"Projector: kind={kind!r} cannot map width {in_dim} to {out_dim}; use 'linear' or 'mlp2x_gelu' "
                "('identity' needs equal widths)."
            )

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Map tokens (B, T, in_dim) to (B, T, out_dim)."""
        projected: Tensor = self.layers(self.norm(like_weights(tokens_BTD, self)))
        return projected


class NoLanguage(LanguageModel):
    """Placeholder for a language model; builds nothing and cannot read or generate text."""

    def __init__(self) -> None:
        super().__init__(width=0)

    def load_weights(self) -> None:
        """Nothing."""

    def forward(self, vision: VisionTokens, text: TextBatch) -> Predictions:
        """Refused."""
        raise ConfigError("This run has no language model (NoLanguage): set lm_weight to 0, or set language.")

    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        """Refused."""
        raise ConfigError("This run has no language model (NoLanguage), so it cannot caption; use another run.")

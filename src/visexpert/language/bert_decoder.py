"""A text decoder from BERT's or RoBERTa's weights that reads vision tokens by cross-attention (ToVE's, Prismer's)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import BertModel, DynamicCache, EncoderDecoderCache

from visexpert.errors import ConfigError, DataError
from visexpert.language.base import (
    Predictions,
    additive,
    at_places,
    image_mask,
    item_mask,
    refuse_markers,
    supervised,
    with_positions,
)
from visexpert.language.causal_lm import Dtype
from visexpert.language.generation import Decoding, write
from visexpert.language.lora import LoRASettings
from visexpert.language.pretrained import PretrainedSide
from visexpert.language.writing import CachedWriting
from visexpert.typed import typed
from visexpert.types import TextBatch, VisionTokens

FAMILIES = ("bert", "roberta", "camembert", "xlm-roberta")
"""Values of ``model_type`` whose transformers classes have cross-attention."""


@typed
class BertDecoder(PretrainedSide):
    """BERT or RoBERTa as a decoder: causal, with a fresh cross-attention in each block.

    All text items of an image share the image's keys and values. The tokenizer must have ``<bos>`` and ``<eos>``
    (for BERT's, set them to ``[CLS]`` and ``[SEP]``).

    Args:
        config: Fields of a Hugging Face config with ``model_type``, for a random model (``vocab_size`` included).
        source: Folder or Hugging Face id of an encoder (``bert-base-uncased``, ``roberta-base``) or of a saved decoder;
            cross-attention, and the output layer if the source has none, start random.
        weights: Start weights for a model built from ``config``: a safetensors file.
        position_scale: Scale of a 2-D sine-cosine code added to the vision tokens; 0 for none. The decoder sees the
            tokens as a set, so it needs the code unless the encoder's own positions are strong.
        dtype: Type of the weights: ``float32``, ``bfloat16`` or ``float16``; LoRA parameters stay float32.
        frozen: Keep the weights of ``source``, outside checkpoints; for a saved decoder.
        lora: Train low-rank updates instead of the model itself; for a saved decoder.
        gradient_checkpointing: Keep no activations inside the blocks: less memory, about a third more time.

    Raises:
        ConfigError: The model is of another kind.
    """

    fresh = (".crossattention.", "cls.predictions.", "lm_head.")

    def __init__(
        self,
        *,
        config: dict[str, Any] | None = None,
        source: str | None = None,
        weights: str | None = None,
        position_scale: float = 0.0,
        dtype: Dtype = "float32",
        frozen: bool = False,
        lora: LoRASettings | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            config=config,
            source=source,
            weights=weights,
            dtype=dtype,
            frozen=frozen,
            lora=lora,
            quantization=None,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.position_scale = position_scale

    def adapt(self, settings: Any) -> Any:
        """Make the configuration a decoder with cross-attention."""
        if settings.model_type not in FAMILIES:
            raise ConfigError(
                f"BertDecoder: model_type={settings.model_type!r} has no cross-attention; use one of "
                f"{', '.join(FAMILIES)}, or a PrefixLM."
            )
        settings.is_decoder = settings.add_cross_attention = True
        return settings

    @property
    def max_tokens(self) -> int:
        """Longest text item in tokens."""
        return int(self.settings.max_position_embeddings) - self._first_position

    def forward(self, vision: VisionTokens, text: TextBatch) -> Predictions:
        """See :meth:`LanguageModel.forward`."""
        refuse_markers(text, self)
        self._check_length(text.facts.longest)
        targets_M, predicting_M = supervised(text)
        hidden_BND = self._run(self._memory(vision), text.ids_BN, text.positions_BN, item_mask(text), None)
        return Predictions(self._logits(at_places(hidden_BND, predicting_M)), targets_M)

    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        self._check_length(max(map(len, prompts)))
        room = [self.max_tokens - len(prompt) for prompt in prompts]
        return write(_BertWriting(self, vision, prompts), decoding, eos_id=eos_id, room=room)

    @property
    def _first_position(self) -> int:
        """RoBERTa counts positions from its padding id + 1."""
        padding = getattr(self.model.base_model.embeddings, "padding_idx", None)
        return 0 if padding is None else int(padding) + 1

    def _memory(self, vision: VisionTokens) -> dict[str, Tensor]:
        """Return the image in transformers' form; a sample without one gets zeros, since an empty softmax is NaN."""
        tokens_BTD = with_positions(vision.tokens_BTD, vision.grid_hw, scale=self.position_scale).to(self._dtype)
        mask = image_mask(vision)
        if mask is None:
            return {"encoder_hidden_states": tokens_BTD}
        there = mask.any(-1, keepdim=True)
        return {
            "encoder_hidden_states": tokens_BTD * there[:, 0],
            "encoder_attention_mask": additive(mask | ~there, self._dtype),
        }

    def _run(
        self,
        memory: dict[str, Tensor],
        ids_BN: Tensor,
        positions_BN: Tensor,
        mask: Tensor,
        known: EncoderDecoderCache | None,
    ) -> Tensor:
        output = self.model.base_model(
            input_ids=ids_BN,
            position_ids=positions_BN + self._first_position,
            attention_mask=additive(mask, self._dtype),
            use_cache=known is not None,
            **memory,
            **({} if known is None else {_cache_argument(): known}),
        )
        hidden_BND: Tensor = output.last_hidden_state
        return hidden_BND

    def _logits(self, hidden_MD: Tensor) -> Tensor:
        head = self.model.cls if hasattr(self.model, "cls") else self.model.lm_head
        logits_MV: Tensor = head(hidden_MD)
        return logits_MV.float()

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.max_tokens:
            raise DataError(
                f"BertDecoder: a text item of {num_tokens} tokens is longer than the {self.max_tokens} positions of "
                "the model; shorten it."
            )


@cache
def _cache_argument() -> str:
    """Return the name of the argument for keys and values, which transformers has renamed."""
    return "cache" if "cache" in signature(BertModel.forward).parameters else "past_key_values"


class _BertWriting(CachedWriting):
    """The decoder with transformers' cache."""

    def __init__(self, decoder: BertDecoder, vision: VisionTokens, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(prompts, max_tokens=decoder.max_tokens, device=vision.tokens_BTD.device)
        refuse_markers(self._text, decoder)
        self._decoder = decoder
        self._memory = decoder._memory(vision)
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def read(self, ids_RN: Tensor, positions_RN: Tensor, mask: Tensor) -> Tensor:
        """See :class:`CachedWriting`."""
        return self._decoder._run(self._memory, ids_RN, positions_RN, mask, self._cache)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """See :class:`CachedWriting`."""
        return self._decoder._logits(hidden_RD)

    def keep(self, rows_R: Tensor) -> None:
        """See :class:`CachedWriting`."""
        self._cache.batch_select_indices(rows_R)
        self._memory = {name: tensor[rows_R] for name, tensor in self._memory.items()}

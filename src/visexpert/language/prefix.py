"""A causal language model that reads vision tokens among its text, as LLaVA does."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError, DataError
from visexpert.language.attention import check_packing, layer_masks
from visexpert.language.base import Predictions, at_places, sincos_2d, token_lengths
from visexpert.language.causal_lm import Dtype
from visexpert.language.generation import Decoding
from visexpert.language.lora import LoRASettings, Quantization
from visexpert.language.pretrained import PretrainedSide
from visexpert.language.reading_check import check_reading
from visexpert.language.splice import lay_out
from visexpert.typed import typed
from visexpert.types import IMAGE_TOKEN, TextBatch, VisionTokens


@typed
class PrefixLM(PretrainedSide):
    """Any ``AutoModelForCausalLM``, with image tokens inside its text or in front of it.

    A marker in the text (:data:`~visexpert.types.IMAGE_TOKEN`, as in LLaVA's templates) is replaced by the image;
    without markers the image comes first, and all its items are packed behind one copy. An item sees the image and
    itself, and its positions continue those of the image, so packing gives the same logits as one row per item. Models
    that cannot do this are refused, by their configuration or after a trial on a few tokens
    (:mod:`visexpert.language.reading_check`).

    Args:
        config: Fields of a Hugging Face config with ``model_type``, for a random model (``vocab_size`` included).
        source: Folder in ``save_pretrained`` form (safetensors or .bin, sharded or not), or a Hugging Face id
            (``ORG/NAME``, ``hf:ORG/NAME@REVISION``). The model is built from its ``config.json`` and the weights are
            loaded later; a large one takes no memory until then.
        position_scale: Scale of a 2-D sine-cosine code added to the image; 0 (LLaVA) for none.
        weights: Start weights for a model built from ``config``: a safetensors file or ``zoo:NAME.safetensors``.
        dtype: Type of the weights: ``float32``, ``bfloat16`` or ``float16``; LoRA parameters stay float32.
        frozen: Keep the weights of ``source``: no gradient, not in checkpoints. LoRA implies it.
        lora: Train low-rank updates instead of the model itself; null for none.
        quantization: Hold the frozen model in 4 bits (``nf4``, QLoRA) or 8 (``int8``), with bitsandbytes; null for
            neither.
        gradient_checkpointing: Keep no activations inside the blocks: less memory, about a third more time.
        image_newline: Train a vector that ends each row of tiles (LLaVA-NeXT); for tiled images.
    """

    def __init__(
        self,
        *,
        config: dict[str, Any] | None = None,
        source: str | None = None,
        position_scale: float = 0.0,
        weights: str | None = None,
        dtype: Dtype = "float32",
        frozen: bool = False,
        lora: LoRASettings | None = None,
        quantization: Quantization | None = None,
        gradient_checkpointing: bool = False,
        image_newline: bool = False,
    ) -> None:
        super().__init__(
            config=config,
            source=source,
            weights=weights,
            dtype=dtype,
            frozen=frozen,
            lora=lora,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.position_scale = position_scale
        self.width = int(self.model.get_input_embeddings().embedding_dim)  # OPT-350m projects narrower ones
        self.image_newline = nn.Embedding(1, self.width, dtype=self._dtype) if image_newline else None
        if self.image_newline is not None:
            nn.init.normal_(self.image_newline.weight, std=self.width**-0.5)

    def added_modules(self) -> tuple[nn.Module, ...]:
        """Return the vector that ends each row of tiles."""
        return () if self.image_newline is None else (self.image_newline,)

    def forward(self, vision: VisionTokens, text: TextBatch) -> Predictions:
        """See :meth:`LanguageModel.forward`.

        Raises:
            DataError: The text is too long, or its markers do not match the images of the samples.
        """
        reading = lay_out(vision, text)
        self._check_length(reading.longest)
        words_BND = self._embed(text.ids_BN.clamp(min=0))
        both_BXD = torch.cat([words_BND, self._image(vision).to(words_BND.dtype)], dim=1)
        embeds_BLD = both_BXD.gather(1, reading.source_BL[..., None].expand(-1, -1, self.width))
        masks = layer_masks(self.settings, reading.mask_BLL, reading.positions_BL, embeds_BLD.dtype)
        with self._head_reads(reading.predicting_M):
            output = self.model(
                inputs_embeds=embeds_BLD, attention_mask=masks, position_ids=reading.positions_BL, use_cache=False
            )
        logits_MV: Tensor = output.logits
        return Predictions(logits_MV.float(), reading.targets_M)

    @contextmanager
    def _head_reads(self, places_M: Tensor) -> Iterator[None]:
        """Apply the output layer only to the tokens needed; the model's changes to its logits (caps, scales) remain."""

        def select(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (at_places(given[0], places_M), *given[1:])

        hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            yield
        finally:
            hook.remove()

    def _take(self, model: nn.Module) -> None:
        check_reading(model, self.settings, owner=self.owner)
        super()._take(model)

    def _check(self) -> None:
        check_packing(self.settings, owner=self.owner)
        super()._check()

    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        """By transformers' ``generate``, with a KV cache; rows are padded on the left.

        Sampled rows share one random stream, so a draw depends on the other rows.
        """
        lengths = token_lengths(vision)
        image_BTD = self._image(vision)
        for prompt, length in zip(prompts, lengths, strict=True):
            _check_markers(prompt, has_image=length > 0)
        rows = [self._row(ids, image_BTD[i, : lengths[i]]) for i, ids in enumerate(prompts)]
        longest = max(map(len, rows))
        room = self._check_room(longest)
        # Left padding keeps image and prompt adjacent, as in training.
        embeds = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        pad = torch.tensor([longest - len(row) for row in rows], device=embeds.device)
        mask = (torch.arange(longest, device=pad.device) >= pad[:, None]).long()
        with seeded(decoding):
            out = self.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                eos_token_id=eos_id,
                pad_token_id=eos_id,
                max_new_tokens=min(decoding.max_new_tokens, room),
                **strategy(decoding),
            )
        return [until(row, eos_id) for row in out.tolist()]

    def _row(self, ids: Sequence[int], image_TD: Tensor) -> Tensor:
        """Return embeddings (L, D) of a prompt with its image in it."""
        place = ids.index(IMAGE_TOKEN) if IMAGE_TOKEN in ids else 0
        rest = place + 1 if IMAGE_TOKEN in ids else 0
        words_LD = self._embed(torch.tensor([*ids[:place], *ids[rest:]], device=image_TD.device))
        return torch.cat([words_LD[:place], image_TD.to(words_LD.dtype), words_LD[place:]])

    def _check_room(self, length: int) -> int:
        """Return the number of tokens that still fit after an image and its prompt."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise DataError(
                f"PrefixLM: an image with its prompt takes {length} tokens and leaves no room for an answer in the "
                f"{limit} positions of the language model; shorten the prompt or use a model with more."
            )
        return sys.maxsize if limit is None else int(limit) - length

    def _check_length(self, longest: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise DataError(
                f"PrefixLM: a text item with its image takes {longest} tokens, more than the {limit} positions of the "
                "language model; shorten the text or use a model with more."
            )

    def _image(self, vision: VisionTokens) -> Tensor:
        tokens_BTD = vision.tokens_BTD
        if vision.newline_BT is not None:
            if self.image_newline is None:
                raise ConfigError("PrefixLM: the images come in tiles; set image_newline to true.")
            newline_D = self.image_newline.weight[0].to(tokens_BTD.dtype)
            tokens_BTD = torch.where(vision.newline_BT[..., None], newline_D, tokens_BTD)
        if not self.position_scale:
            return tokens_BTD
        code_TD = sincos_2d(vision.grid_hw, self.width).to(tokens_BTD)
        if len(code_TD) != tokens_BTD.shape[1]:
            raise ConfigError(
                "PrefixLM: position_scale encodes a single grid, but the images come in tiles; set it to 0."
            )
        return tokens_BTD + self.position_scale * code_TD

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded


def _check_markers(prompt: Sequence[int], *, has_image: bool) -> None:
    count = sum(token == IMAGE_TOKEN for token in prompt)
    if count > int(has_image):
        raise DataError(
            f"A prompt has {count} image tokens (<image>), but its sample has {int(has_image)} image; write it "
            "once where there is an image, and nowhere else."
        )


def strategy(decoding: Decoding) -> dict[str, Any]:
    """Return the arguments of transformers' ``generate``; everything they do not name is off."""
    if decoding.strategy == "beam":
        # "never" stops once nothing better is possible, as our own search does; the default is a heuristic.
        return {
            "do_sample": False,
            "num_beams": decoding.num_beams,
            "length_penalty": decoding.length_penalty,
            "early_stopping": "never",
        }
    if decoding.strategy == "sample":
        top_k = 0 if decoding.top_k is None else decoding.top_k  # 0 is transformers' "all"
        return {
            "do_sample": True,
            "num_beams": 1,
            "temperature": decoding.temperature,
            "top_k": top_k,
            "top_p": decoding.top_p,
        }
    return {"do_sample": False, "num_beams": 1}


@contextmanager
def seeded(decoding: Decoding) -> Iterator[None]:
    """Seed torch for a sampling strategy, and restore the random state afterwards."""
    if decoding.strategy != "sample":
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(decoding.seed)
        yield


def until(row: list[int], eos_id: int) -> list[int]:
    """Return the tokens before the first ``eos_id``."""
    return row[: row.index(eos_id)] if eos_id in row else row

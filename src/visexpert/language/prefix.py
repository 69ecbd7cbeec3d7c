"""A causal language model that reads vision tokens as a prefix (LLaVA's kind of language side)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from visexpert.errors import ConfigError, DataError, WeightsError
from visexpert.language.base import LanguageSide, item_mask, supervised
from visexpert.language.generation import Decoding
from visexpert.language.position import sincos_2d
from visexpert.resources import fill_module, load_safetensors, resolve_source
from visexpert.types import TextBatch, VisionTokens


class PrefixLM(LanguageSide):
    """Any ``AutoModelForCausalLM`` with the image's tokens in front of the text.

    All text items of an image are packed behind one prefix: an item sees the prefix and itself, and its positions
    count on from the prefix, so that packing gives the same logits as one row per item.

    Args:
        config: Fields of a Hugging Face config with ``model_type``, for a random model (``vocab_size`` included).
        source: Folder in ``save_pretrained`` form: its ``config.json`` builds, its ``model.safetensors`` fills.
        position_scale: Scale of a 2-D sine-cosine code added to the prefix; 0 (LLaVA) for none.
        weights: Start weights for a model built from ``config``: a safetensors file or ``zoo:NAME.safetensors``.
    """

    def __init__(
        self,
        *,
        config: dict[str, Any] | None = None,
        source: str | None = None,
        position_scale: float = 0.0,
        weights: str | None = None,
    ) -> None:
        if (config is None) == (source is None):
            raise ConfigError("PrefixLM takes either config (a random model) or source (a folder).")
        settings = _build_config(config, source)
        super().__init__(width=int(settings.hidden_size))
        settings._attn_implementation = "sdpa"
        self.model = AutoModelForCausalLM.from_config(settings)
        self.position_scale = position_scale
        self._weights = weights if source is None else str(resolve_source(source) / "model.safetensors")

    def load_weights(self) -> None:
        """Fill the model from ``source`` or ``weights``, if any."""
        if self._weights is None:
            return
        path = resolve_source(self._weights)
        state = load_safetensors(path, owner="PrefixLM")
        expected = self.model.state_dict()
        if "lm_head.weight" in expected:  # tied weights are stored once
            state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
        fill_module(self.model, state, owner="PrefixLM", path=path)

    def forward(self, vision: VisionTokens, text: TextBatch) -> Tensor:
        """See :meth:`LanguageSide.forward`."""
        prefix_BTD = self._prefix(vision)
        num_prefix = prefix_BTD.shape[1]
        self._check_length(text, num_prefix)
        embeds = torch.cat([prefix_BTD, self._embed(text.ids_BN)], dim=1)
        positions = torch.cat([_arange(prefix_BTD), text.positions_BN + num_prefix], dim=1)
        mask = _additive(_prefix_mask(item_mask(text), num_prefix), embeds.dtype)
        output = self.model.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )
        _, predicting_BN = supervised(text)
        logits_MV: Tensor = self.model.get_output_embeddings()(output.last_hidden_state[:, num_prefix:][predicting_BN])
        return logits_MV

    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        """By transformers' ``generate``, with a KV cache; prompts are padded on the left.

        Sampled rows share one stream of random numbers, so that a draw depends on the rows beside it.
        """
        prefix_BTD = self._prefix(vision)
        length = max(map(len, prompts))
        room = self._check_room(length, prefix_BTD.shape[1])
        ids = torch.full((len(prompts), length), eos_id, dtype=torch.long)
        for index, prompt in enumerate(prompts):
            ids[index, length - len(prompt) :] = torch.tensor(prompt)
        ids = ids.to(prefix_BTD.device)
        # Padding stands before the image: the image and its prompt stay neighbours, as in training.
        rows = [
            torch.cat([self._embed(ids[i, : length - n]), prefix_BTD[i], self._embed(ids[i, length - n :])])
            for i, n in enumerate(map(len, prompts))
        ]
        pad = torch.tensor([length - len(prompt) for prompt in prompts], device=ids.device)
        mask = (torch.arange(rows[0].shape[0], device=pad.device) >= pad[:, None]).long()
        with _seeded(decoding):
            out = self.model.generate(
                inputs_embeds=torch.stack(rows), attention_mask=mask, eos_token_id=eos_id, pad_token_id=eos_id,
                max_new_tokens=min(decoding.max_new_tokens, room), **_strategy(decoding),
            )  # fmt: skip
        return [_until(row, eos_id) for row in out.tolist()]

    def _check_room(self, length: int, num_prefix: int) -> int:
        """Tokens that still fit behind the image and a prompt."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and num_prefix + length >= limit:
            raise DataError(
                f"PrefixLM: a prompt of {length} tokens behind {num_prefix} image tokens leaves no room for an answer "
                f"in the {limit} positions of the language model; shorten it or take a model with more."
            )
        return sys.maxsize if limit is None else int(limit) - num_prefix - length

    def _check_length(self, text: TextBatch, num_prefix: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = int(text.positions_BN.max()) + 1 if text.positions_BN.numel() else 0
        if limit is not None and num_prefix + longest > limit:
            raise DataError(
                f"PrefixLM: a text item of {longest} tokens behind {num_prefix} image tokens is longer than the "
                f"{limit} positions of the language model; shorten it or take a model with more."
            )

    def _prefix(self, vision: VisionTokens) -> Tensor:
        tokens_BTD = vision.tokens_BTD
        if self.position_scale:
            tokens_BTD = tokens_BTD + self.position_scale * sincos_2d(vision.grid_hw, self.width).to(tokens_BTD)
        return tokens_BTD

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        return embedded


def _build_config(config: dict[str, Any] | None, source: str | None) -> PretrainedConfig:
    if config is not None:
        settings = dict(config)
        if "model_type" not in settings:
            raise ConfigError("PrefixLM: config needs a model_type, for example 'llama'.")
        kind = str(settings.pop("model_type"))
        if kind not in CONFIG_MAPPING:
            near = get_close_matches(kind, CONFIG_MAPPING, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "take one that transformers knows."
            raise ConfigError(f"PrefixLM: model_type={kind!r} is unknown; {hint}")
        built: PretrainedConfig = AutoConfig.for_model(kind, **settings)
        return built
    folder = Path(resolve_source(str(source)))
    if not (folder / "config.json").is_file():
        raise WeightsError(f"PrefixLM: no config.json in {folder}; give a folder written by save_pretrained.")
    loaded: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    return loaded


def _prefix_mask(text_mask: Tensor, num_prefix: int) -> Tensor:
    """Causal mask over prefix and packed text, bool (B, 1, T + N, T + N)."""
    batch, _, num_text, _ = text_mask.shape
    total = num_prefix + num_text
    mask = torch.zeros(batch, 1, total, total, dtype=torch.bool, device=text_mask.device)
    mask[:, :, :num_prefix, :num_prefix] = torch.ones(num_prefix, num_prefix, device=mask.device).tril().bool()
    mask[:, :, num_prefix:, :num_prefix] = True
    mask[:, :, num_prefix:, num_prefix:] = text_mask
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _arange(prefix_BTD: Tensor) -> Tensor:
    return torch.arange(prefix_BTD.shape[1], device=prefix_BTD.device).expand(prefix_BTD.shape[0], -1)


def _strategy(decoding: Decoding) -> dict[str, Any]:
    """The words of transformers' ``generate`` for it; what they do not name is off there."""
    if decoding.strategy == "beam":
        # "never" stops when nothing better can come, as our own search does; the default is a heuristic.
        return {
            "do_sample": False, "num_beams": decoding.num_beams, "length_penalty": decoding.length_penalty,
            "early_stopping": "never",
        }  # fmt: skip
    if decoding.strategy == "sample":
        top_k = 0 if decoding.top_k is None else decoding.top_k  # 0 is transformers' "all"
        return {
            "do_sample": True, "num_beams": 1, "temperature": decoding.temperature, "top_k": top_k,
            "top_p": decoding.top_p,
        }  # fmt: skip
    return {"do_sample": False, "num_beams": 1}


@contextmanager
def _seeded(decoding: Decoding) -> Iterator[None]:
    """Draw from the strategy's own seed, where it draws, and leave everyone else's numbers as they were."""
    if decoding.strategy != "sample":
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(decoding.seed)
        yield


def _until(row: list[int], eos_id: int) -> list[int]:
    return row[: row.index(eos_id)] if eos_id in row else row

"""Causal language models of transformers: built without weights first, filled second."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from visexpert.errors import ConfigError, WeightsError
from visexpert.io.reading import read_json
from visexpert.io.source import ModelSource
from visexpert.language.attention import attention_of
from visexpert.language.lora import Quantisation, quantised

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

META_FROM = 50_000_000
"""Parameters from which a model whose weights are yet to come is built on the meta device, without memory."""

IN_WHOLE = {
    r"^(?:model\.)?language_model\.model\.": "model.",
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.": "model.",
    r"^model\.text_model\.": "model.",
}
"""Where a model that also sees keeps its language model, and the names of that model alone."""


def build_config(config: Mapping[str, Any] | None, source: str | None, *, owner: str) -> PretrainedConfig:
    """Return the configuration from fields with ``model_type``, or of a source (a folder or hub id).

    Raises:
        ConfigError: No or an unknown ``model_type``.
        WeightsError: The source is not to be had, or its configuration cannot be read.
    """
    if config is not None:
        return text_part(_from_fields(dict(config), owner), owner=owner)
    folder = ModelSource.parse(str(source)).folder("config.json", owner=owner)
    try:
        loaded: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # huggingface_hub's errors of fields that contradict one another have no base of theirs
        raise WeightsError(
            f"{owner}: {folder / 'config.json'} is of no model that transformers knows without running its code "
            f"({_reason(error)}); give another."
        ) from error
    return text_part(loaded, owner=owner)


def text_part(settings: PretrainedConfig, *, owner: str) -> PretrainedConfig:
    """Return the configuration of the language model inside one that also sees or hears; of any other, itself.

    Its weights are in the same files (Gemma-3, Llama-4, Mistral-3, LLaVA), under :data:`IN_WHOLE`.

    Raises:
        ConfigError: The text part cannot stand alone (Qwen2-VL).
    """
    text = settings.get_text_config(decoder=True)
    known = AutoModelForCausalLM._model_mapping
    whole = "" if text is settings else f", the text part of '{settings.model_type}',"
    if type(text) not in known:
        raise ConfigError(
            f"{owner}: a model of type '{text.model_type}'{whole} is no causal language model that transformers runs "
            "by itself; take one, such as llama, qwen3, mistral or gemma3_text."
        )
    if not hasattr(text, "hidden_size"):
        raise ConfigError(f"{owner}: '{text.model_type}'{whole} has no hidden_size; take another.")
    if getattr(settings, "tie_word_embeddings", False):  # the whole model's word counts (Mistral-3)
        text.tie_word_embeddings = True
    return text


def torch_dtype(name: Dtype, *, owner: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        ConfigError: An unknown one.
    """
    if name not in get_args(Dtype):
        raise ConfigError(f"{owner}: dtype={name!r} is unknown; use one of {', '.join(get_args(Dtype))}.")
    found: torch.dtype = getattr(torch, name)
    return found


def build_model(settings: PretrainedConfig, *, dtype: torch.dtype, weights_follow: bool, owner: str) -> nn.Module:
    """Return a random model; a big one whose weights follow is on the meta device.

    Raises:
        ConfigError: transformers cannot build one of this configuration.
    """
    settings._attn_implementation = attention_of(settings)
    try:
        with torch.device("meta"):
            empty: nn.Module = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # fields that contradict one another fail anywhere in the model's own code
        raise ConfigError(
            f"{owner}: transformers cannot build a '{settings.model_type}' of these fields "
            f"({type(error).__name__}: {_reason(error)}); give it the fields of a released config.json."
        ) from error
    if weights_follow and sum(parameter.numel() for parameter in empty.parameters()) >= META_FROM:
        return empty
    built: nn.Module = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
    return built


def read_model(
    source: str,
    settings: PretrainedConfig,
    *,
    dtype: torch.dtype,
    quantisation: Quantisation | None,
    owner: str,
    fresh: tuple[str, ...] = (),
) -> nn.Module:
    """Read a model with its weights from safetensors or .bin files, sharded or not, without running code from them.

    Args:
        source: As :meth:`~visexpert.io.source.ModelSource.parse` reads it.
        settings: Its configuration, as :func:`build_config` gave it.
        dtype: Of the weights.
        quantisation: Bits to hold them in.
        owner: Who asks, for messages.
        fresh: Parts of names of weights that may be missing and then are random.

    Raises:
        WeightsError: The weights are missing, damaged, could run code, or do not fit the configuration.
        ConfigError: ``quantisation`` cannot be.
    """
    folder = ModelSource.parse(source).fetch_weights(owner=owner).parent
    options: dict[str, Any] = {} if quantisation is None else {"quantization_config": quantised(quantisation, dtype)}
    log.info("%s: reading %s", owner, folder)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=settings, dtype=dtype, attn_implementation=attention_of(settings), local_files_only=True,
                trust_remote_code=False, weights_only=True, output_loading_info=True,
                key_mapping=IN_WHOLE if _is_whole(folder, settings) else None, **options,
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError, SafetensorError) as error:
        raise WeightsError(
            f"{owner}: the weights in {folder} cannot be read ({_reason(error)}); fetch them again."
        ) from error
    model, report = loaded
    check_report(report, folder, owner=owner, fresh=fresh)
    filled: nn.Module = model
    return filled


def _is_whole(folder: Path, settings: PretrainedConfig) -> bool:
    """Return whether a folder's model has more than the language model that is wanted of it."""
    return bool(read_json(folder / "config.json").get("model_type") != settings.model_type)


def check_report(report: Mapping[str, Any], folder: Path, *, owner: str, fresh: tuple[str, ...] = ()) -> None:
    """Refuse what transformers would pass over with a warning.

    Args:
        report: What ``from_pretrained`` says of its loading.
        folder: Where from.
        owner: Who asks, for the message.
        fresh: Parts of names of what may be missing.

    Raises:
        WeightsError: A weight is missing or has another shape.
    """
    missing = sorted(key for key in report["missing_keys"] if not any(part in key for part in fresh))
    reshaped = sorted(str(entry[0]) for entry in report.get("mismatched_keys", ()))
    if missing or reshaped:
        raise WeightsError(
            f"{owner}: the weights in {folder} do not fit its config.json: missing {missing[:3]}, of another shape "
            f"{reshaped[:3]}; fetch them again."
        )
    if report["unexpected_keys"]:
        log.info("%s: left out of %s: %s", owner, folder, sorted(report["unexpected_keys"])[:3])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its table of missing weights, which :func:`check_report` reads."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _from_fields(settings: dict[str, Any], owner: str) -> PretrainedConfig:
    if "model_type" not in settings:
        raise ConfigError(f"{owner}: config needs a model_type, for example 'llama'.")
    kind = str(settings.pop("model_type"))
    if kind not in CONFIG_MAPPING:
        near = get_close_matches(kind, CONFIG_MAPPING, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "take one that transformers knows."
        raise ConfigError(f"{owner}: model_type={kind!r} is unknown; {hint}")
    try:
        built: PretrainedConfig = AutoConfig.for_model(kind, **settings)
    except Exception as error:  # see build_config
        raise ConfigError(
            f"{owner}: transformers takes no such fields for a '{kind}' ({_reason(error)}); correct config."
        ) from error
    return built


def _reason(error: Exception) -> str:
    """Return what transformers or PyTorch say, in one line; the cause of a refused field stands in its second."""
    return " ".join(str(error).split())[:200]

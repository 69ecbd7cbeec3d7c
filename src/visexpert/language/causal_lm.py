"""Causal language models of transformers: built first, weights loaded second."""

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
from visexpert.io.weights import reshaped, unreadable
from visexpert.language.attention import attention_of
from visexpert.language.lora import Quantization, quantized

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

META_FROM = 50_000_000
"""Number of parameters above which a model is built on the meta device, without memory, until weights are loaded."""

IN_WHOLE = {
    r"^(?:model\.)?language_model\.model\.": "model.",
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.": "model.",
    r"^model\.text_model\.": "model.",
}
"""Prefixes of a multimodal model's language model, and its names as a model of its own."""


def build_config(config: Mapping[str, Any] | None, source: str | None, *, owner: str) -> PretrainedConfig:
    """Build the configuration from fields with ``model_type``, or read it from a source (a folder or Hugging Face id).

    Raises:
        ConfigError: ``model_type`` is missing or unknown.
        WeightsError: The source is unavailable, or its configuration cannot be read.
    """
    if config is not None:
        return text_part(_from_fields(dict(config), owner), owner=owner)
    folder = ModelSource.parse(str(source)).folder("config.json", owner=owner)
    try:
        loaded: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # huggingface_hub's errors for contradictory fields have no common base
        raise WeightsError(
            f"{owner}: {folder / 'config.json'} is of no model that transformers supports without remote code "
            f"({_reason(error)}); give another."
        ) from error
    return text_part(loaded, owner=owner)


def text_part(settings: PretrainedConfig, *, owner: str) -> PretrainedConfig:
    """Return the configuration of a multimodal model's language model; any other configuration is returned as is.

    Its weights are in the same files (Gemma-3, Llama-4, Mistral-3, LLaVA), under :data:`IN_WHOLE`.

    Raises:
        ConfigError: The text part cannot stand alone (Qwen2-VL), or is none.
    """
    text = settings.get_text_config(decoder=True)
    if not isinstance(text, PretrainedConfig):
        raise ConfigError(
            f"{owner}: the text part of '{settings.model_type}' is {str(text)[:60]!r}, which its class takes for a "
            "plain value; correct config.json."
        )
    known = AutoModelForCausalLM._model_mapping
    whole = "" if text is settings else f", the text part of '{settings.model_type}',"
    if type(text) not in known:
        raise ConfigError(
            f"{owner}: a model of type '{text.model_type}'{whole} is no causal language model that transformers runs "
            "on its own; use another, such as llama, qwen3, mistral or gemma3_text."
        )
    if not hasattr(text, "hidden_size"):
        raise ConfigError(f"{owner}: '{text.model_type}'{whole} has no hidden_size; use another.")
    if getattr(settings, "tie_word_embeddings", False):  # the setting of the whole model counts (Mistral-3)
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
    """Build a random model; on the meta device if it is large and its weights are loaded later.

    Raises:
        ConfigError: transformers cannot build one of this configuration.
    """
    settings._attn_implementation = attention_of(settings)
    try:
        with torch.device("meta"):
            empty: nn.Module = AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # contradictory fields can fail anywhere in the model's own code
        raise ConfigError(
            f"{owner}: transformers cannot build a '{settings.model_type}' from these fields "
            f"({type(error).__name__}: {_reason(error)}); use the fields of a released config.json."
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
    quantization: Quantization | None,
    owner: str,
    fresh: tuple[str, ...] = (),
) -> nn.Module:
    """Read a model with its weights from safetensors or .bin files, sharded or not, without running code from them.

    Args:
        source: As :meth:`~visexpert.io.source.ModelSource.parse` reads it.
        settings: Its configuration, from :func:`build_config`.
        dtype: Type of the weights.
        quantization: Quantization of the weights.
        owner: Name of the caller, for messages.
        fresh: Fragments of weight names that may be missing and then stay random.

    Raises:
        WeightsError: The weights are missing or damaged, could run code, or do not fit the configuration.
        ConfigError: ``quantization`` is unknown or unavailable.
    """
    folder = ModelSource.parse(source).fetch_weights(owner=owner).parent
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantized(quantization, dtype)}
    log.info("%s: reading %s", owner, folder)
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=settings,
                dtype=dtype,
                attn_implementation=attention_of(settings),
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
                key_mapping=IN_WHOLE if _is_whole(folder, settings) else None,
                **options,
            )
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError, SafetensorError) as error:
        raise unreadable(f"the weights in {folder}", error, owner=owner) from error
    model, report = loaded
    check_report(report, folder, owner=owner, fresh=fresh)
    filled: nn.Module = model
    return filled


def _is_whole(folder: Path, settings: PretrainedConfig) -> bool:
    """Return whether a folder's model contains more than the language model."""
    return bool(read_json(folder / "config.json").get("model_type") != settings.model_type)


def check_report(report: Mapping[str, Any], folder: Path, *, owner: str, fresh: tuple[str, ...] = ()) -> None:
    """Refuse problems that transformers would only warn about.

    Args:
        report: Loading report of ``from_pretrained``.
        folder: Folder of the weights.
        owner: Name of the caller, for messages.
        fresh: Fragments of weight names that may be missing.

    Raises:
        WeightsError: A weight is missing or has another shape.
    """
    missing = sorted(key for key in report["missing_keys"] if not any(part in key for part in fresh))
    misfits = reshaped(report.get("mismatched_keys", ()))
    if missing or misfits:
        raise WeightsError(
            f"{owner}: the weights in {folder} do not fit its config.json: missing {missing[:3]}, of another shape "
            f"{misfits}; take both from the same model."
        )
    if report["unexpected_keys"]:
        log.info("%s: left out of %s: %s", owner, folder, sorted(report["unexpected_keys"])[:3])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its table of missing weights, which :func:`check_report` checks."""
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
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "use one that transformers knows."
        raise ConfigError(f"{owner}: model_type={kind!r} is unknown; {hint}")
    try:
        built: PretrainedConfig = AutoConfig.for_model(kind, **settings)
    except Exception as error:  # see build_config
        raise ConfigError(
            f"{owner}: transformers rejects these fields of a '{kind}' ({_reason(error)}); correct config."
        ) from error
    return built


def _reason(error: Exception) -> str:
    """Return an error of transformers or PyTorch in one line; the cause of a refused field is on its second."""
    return " ".join(str(error).split())[:200]

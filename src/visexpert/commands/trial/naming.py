"""Resolve the name of a model: a file, a folder, a Hugging Face id, or a model that timm or open_clip lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from safetensors import SafetensorError, safe_open

from visexpert.commands.trial.attempt import Request
from visexpert.errors import ConfigError
from visexpert.experts import (
    DepthExpert,
    OpenClipExpert,
    SegmentationExpert,
    TimmExpert,
    TransformersExpert,
    VisionExpert,
)
from visexpert.io.source import ZOO_PREFIX, ModelSource
from visexpert.networks import RANDOM
from visexpert.networks.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_PREFIX
from visexpert.networks.timm import is_timm
from visexpert.tabletop import TinyExpert
from visexpert.tabletop.tiny import HEADER_KEY
from visexpert.vision import VisionEncoder
from visexpert.vision.choosing import encoder_of

Candidate = tuple[type[VisionExpert], dict[str, Any]]


def open_clip_name(text: str) -> tuple[str, str | None] | None:
    """Return name and tag, if any, of ``open_clip:NAME/TAG``, ``NAME/TAG`` or ``NAME``; None if open_clip lacks it."""
    from open_clip import list_models, list_pretrained_tags_by_model

    name, _, tag = text.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    listed = name in list_models()
    if text.startswith(OPEN_CLIP_PREFIX) or (listed and (not tag or tag in list_pretrained_tags_by_model(name))):
        return name, tag or None
    return None


def expert_candidates(request: Request) -> list[Candidate]:
    """Return the classes of experts that may read a model, with their arguments.

    Raises:
        ConfigError: The name does not tell which network it is.
        WeightsError: The name means nothing, or its files cannot be read.
    """
    sized = {"image_size": request.image_size, "layer": request.layer}
    options = {key: value for key, value in sized.items() if value is not None}
    if is_timm(request.model):
        return [(TimmExpert, {"model": request.model, **_weights(request), **options})]
    named = open_clip_name(request.model)
    if named is not None:
        return [(OpenClipExpert, {"model": named[0], "weights": _tag(request, *named), **options})]
    source = ModelSource.parse(request.model)
    _refuse_misspelled(request.model, source)
    if is_tiny(request.model, source):
        return [(TinyExpert, {"source": request.model})]
    if source.file is not None:
        raise ConfigError(
            f"{source.file} holds only weights; give the name of their network in timm or open_clip, and the file as "
            "--weights (visexpert try vit_base_patch16_224 --weights FILE)."
        )
    return [(kind, {**arguments, **options}) for kind, arguments in _published(request.model, source)]


def _refuse_misspelled(text: str, source: ModelSource) -> None:
    """Refuse a word that is close to the name of a model of timm or open_clip, and names nothing on this machine.

    Raises:
        ConfigError: The word is such a name.
    """
    if source.repo != text or "/" in text or source.find("config.json") is not None:
        return
    from open_clip import list_models as of_open_clip
    from timm import list_models as of_timm

    near = get_close_matches(text.partition(".")[0], [*of_timm(), *of_open_clip()], n=3, cutoff=0.8)
    if near:
        raise ConfigError(f"'{text}' is neither a folder here nor a model of timm or open_clip; closest are {near}.")


def _weights(request: Request) -> dict[str, str]:
    return {} if request.weights is None else {"weights": request.weights}


def _tag(request: Request, name: str, tag: str | None) -> str:
    found = tag or request.weights
    if found is None:
        from open_clip import list_pretrained_tags_by_model

        tags = list_pretrained_tags_by_model(name)
        raise ConfigError(f"open_clip has several weights of {name}; choose one with --weights TAG: {tags}.")
    return found


def is_tiny(text: str, source: ModelSource) -> bool:
    """Return whether the source is an expert of the zoo, whose file has its architecture in the header."""
    if text.startswith(ZOO_PREFIX):
        return not (source.path is not None and source.path.is_dir())
    if source.file is None or source.file.suffix != ".safetensors":
        return False
    try:
        with safe_open(source.file, framework="pt") as opened:
            return HEADER_KEY in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _published(text: str, source: ModelSource) -> list[Candidate]:
    """By the configuration that lies with the files of a folder or repository."""
    own = source.find(OPEN_CLIP_CONFIG)
    place = text if "/" in text else f"./{text}"  # a plain word would be a tag
    if own is not None:
        return [(OpenClipExpert, {"model": _last(text), "weights": place})]
    config = source.read_json("config.json", owner="visexpert try") or {}
    if "model_type" not in config and "architecture" in config:
        return [(TimmExpert, {"weights": text})]
    if not config and source.repo is not None and source.repo.startswith("timm/") and is_timm(_last(text)):
        return [(TimmExpert, {"model": _last(text), "weights": text})]
    kind, options = _of_transformers(config)
    if kind is TransformersExpert:
        return [(kind, {"source": text})]
    return [(kind, {"source": text, **options, "tokens": tokens}) for tokens in ("features", "prediction")]


def _last(text: str) -> str:
    return text.rstrip("/").rpartition("/")[2].partition("@")[0]


def _of_transformers(config: Mapping[str, Any]) -> tuple[type[VisionExpert], dict[str, Any]]:
    """Return the expert class for the architecture that a ``config.json`` of transformers names, and its options."""
    written = " ".join(map(str, config.get("architectures") or ()))
    if "ForDepthEstimation" in written:
        return DepthExpert, {}
    if "ForSemanticSegmentation" in written:
        return SegmentationExpert, {}
    if "ForUniversalSegmentation" in written or "ForInstanceSegmentation" in written:
        return SegmentationExpert, {"masks": True}
    return TransformersExpert, {}


def encoder_arguments(request: Request) -> tuple[type[VisionEncoder], dict[str, Any]]:
    """Return the class of the encoder that reads a model, with its arguments.

    Raises:
        ConfigError: It cannot be taught, or its name is misspelled or lacks a tag.
        WeightsError: Nothing on this machine says what it is.
    """
    sized = {"image_size": request.image_size, "layer": request.layer}
    options = {key: value for key, value in sized.items() if value is not None}
    if is_timm(request.model) and request.weights is not None:
        source = None if request.weights == RANDOM else request.weights
        return encoder_of(source, {"model": request.model, **options})
    named = None if is_timm(request.model) else open_clip_name(request.model)
    if named is None:
        _refuse_misspelled(request.model, ModelSource.parse(request.model))
        return encoder_of(request.model, options)
    name, tag = named
    from_list = tag or (request.weights if request.weights and open_clip_name(f"{name}/{request.weights}") else None)
    if from_list is not None:
        return encoder_of(f"{OPEN_CLIP_PREFIX}{name}/{from_list}", options)
    return encoder_of(None if request.weights == RANDOM else _tag(request, name, tag), {"model": name, **options})


def language_source(request: Request) -> str:
    """Return the ``source`` of ``PrefixLM`` or ``BertDecoder``.

    Raises:
        ConfigError: The model is neither a folder nor a Hugging Face id.
    """
    if is_timm(request.model) or open_clip_name(request.model) is not None:
        raise ConfigError(f"'{request.model}' encodes images; as a language model give a folder or a Hugging Face id.")
    source = ModelSource.parse(request.model)
    if source.file is not None or is_tiny(request.model, source):
        raise ConfigError(
            f"'{request.model}' is a file of weights; as a language model give a folder that save_pretrained wrote, or "
            "a Hugging Face id."
        )
    return request.model


def model_type(source: str) -> str | None:
    """Return ``model_type`` of a source's ``config.json``; None where the file is absent or unreadable."""
    found = ModelSource.parse(source).find("config.json")
    try:
        written = {} if found is None else json.loads(found.read_text(encoding="utf-8"))
    except ValueError:  # the class reports what is wrong
        return None
    return written.get("model_type") if isinstance(written, dict) else None

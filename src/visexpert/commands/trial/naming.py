"""What a name of a model means: a file, a folder, a Hugging Face id, or a model of timm's or open_clip's list."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from safetensors import SafetensorError, safe_open

from visexpert.commands.trial.attempt import Asked
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
from visexpert.tabletop import TinyExpert
from visexpert.tabletop.tiny import HEADER_KEY
from visexpert.vision.published import OPEN_CLIP_CONFIG, OPEN_CLIP_PREFIX

Candidate = tuple[type[VisionExpert], dict[str, Any]]


def is_timm(name: str) -> bool:
    """Whether timm has a model of this name, tag or not."""
    from timm.models import is_model

    return "/" not in name and is_model(name.partition(".")[0])


def open_clip_name(text: str) -> tuple[str, str | None] | None:
    """Name and tag, if any, of ``open_clip:NAME/TAG``, ``NAME/TAG`` or ``NAME``; None where open_clip has no such."""
    from open_clip import list_models, list_pretrained_tags_by_model

    name, _, tag = text.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    listed = name in list_models()
    if text.startswith(OPEN_CLIP_PREFIX) or (listed and (not tag or tag in list_pretrained_tags_by_model(name))):
        return name, tag or None
    return None


def expert_candidates(asked: Asked) -> list[Candidate]:
    """Classes of experts that may read a model, with their arguments.

    Raises:
        ConfigError: The name does not say which network it is.
        WeightsError: It is no name at all, or its files cannot be read.
    """
    sized = {"image_size": asked.image_size, "layer": asked.layer}
    options = {key: value for key, value in sized.items() if value is not None}
    if is_timm(asked.model):
        return [(TimmExpert, {"model": asked.model, **_weights(asked), **options})]
    named = open_clip_name(asked.model)
    if named is not None:
        return [(OpenClipExpert, {"model": named[0], "weights": _tag(asked, *named), **options})]
    source = ModelSource.parse(asked.model)
    _refuse_misspelt(asked.model, source)
    if is_tiny(asked.model, source):
        return [(TinyExpert, {"source": asked.model})]
    if source.file is not None:
        raise ConfigError(
            f"{source.file} holds weights alone; name their network instead and give the file as --weights: a name of "
            "timm or open_clip (visexpert try vit_base_patch16_224 --weights FILE)."
        )
    return [(kind, {**arguments, **options}) for kind, arguments in _published(asked.model, source)]


def _refuse_misspelt(text: str, source: ModelSource) -> None:
    """Refuse a plain word that is almost the name of a model of timm or open_clip, and nothing on this machine.

    Raises:
        ConfigError: It is one.
    """
    if source.repo != text or "/" in text or source.find("config.json") is not None:
        return
    from open_clip import list_models as of_open_clip
    from timm import list_models as of_timm

    near = get_close_matches(text.partition(".")[0], [*of_timm(), *of_open_clip()], n=3, cutoff=0.8)
    if near:
        raise ConfigError(f"'{text}' is no folder here and no model of timm or open_clip; the nearest are {near}.")


def _weights(asked: Asked) -> dict[str, str]:
    return {} if asked.weights is None else {"weights": asked.weights}


def _tag(asked: Asked, name: str, tag: str | None) -> str:
    found = tag or asked.weights
    if found is None:
        from open_clip import list_pretrained_tags_by_model

        tags = list_pretrained_tags_by_model(name)
        raise ConfigError(f"open_clip has many weights of {name}; add one of its tags, --weights TAG: {tags}.")
    return found


def is_tiny(text: str, source: ModelSource) -> bool:
    """Whether it is an expert of the zoo, which brings its architecture in the header of its file."""
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
        return [(TimmExpert, {"model": _timm_model(config), "weights": text})]
    if not config and source.repo is not None and source.repo.startswith("timm/") and is_timm(_last(text)):
        return [(TimmExpert, {"model": _last(text), "weights": text})]
    kind, options = _of_transformers(config)
    if kind is TransformersExpert:
        return [(kind, {"source": text})]
    return [(kind, {"source": text, **options, "tokens": tokens}) for tokens in ("features", "prediction")]


def _last(text: str) -> str:
    return text.rstrip("/").rpartition("/")[2].partition("@")[0]


def _timm_model(config: Mapping[str, Any]) -> str:
    from timm import list_pretrained

    name, cfg = str(config["architecture"]), config.get("pretrained_cfg") or {}
    tagged = f"{name}.{cfg.get('tag')}"
    return tagged if list_pretrained(tagged) else name


def _of_transformers(config: Mapping[str, Any]) -> tuple[type[VisionExpert], dict[str, Any]]:
    """The class for what a ``config.json`` of transformers says that its weights are of."""
    written = " ".join(map(str, config.get("architectures") or ()))
    if "ForDepthEstimation" in written:
        return DepthExpert, {}
    if "ForSemanticSegmentation" in written:
        return SegmentationExpert, {}
    if "ForUniversalSegmentation" in written or "ForInstanceSegmentation" in written:
        return SegmentationExpert, {"masks": True}
    return TransformersExpert, {}


def clip_arguments(asked: Asked) -> dict[str, Any]:
    """Arguments of ``ClipEncoder``.

    Raises:
        ConfigError: The model is one of timm's.
    """
    sized = {"image_size": asked.image_size, "layer": asked.layer}
    options = {key: value for key, value in sized.items() if value is not None}
    if is_timm(asked.model):
        raise ConfigError(f"'{asked.model}' is timm's, but clip takes CLIPs alone; it can be a teacher (--as expert).")
    named = open_clip_name(asked.model)
    if named is None:
        _refuse_misspelt(asked.model, ModelSource.parse(asked.model))
        return {"source": asked.model, **options}
    name, tag = named
    from_list = tag or (asked.weights if asked.weights and open_clip_name(f"{name}/{asked.weights}") else None)
    if from_list is not None:
        return {"source": f"{OPEN_CLIP_PREFIX}{name}/{from_list}", **options}
    if asked.weights == "random":
        return {"architecture": name, **options}
    return {"source": _tag(asked, name, tag), "architecture": name, **options}


def language_source(asked: Asked) -> str:
    """What ``PrefixLM`` takes as ``source``.

    Raises:
        ConfigError: It is no folder and no Hugging Face id.
    """
    if is_timm(asked.model) or open_clip_name(asked.model) is not None:
        raise ConfigError(f"'{asked.model}' encodes images; a language model is a folder or a Hugging Face id.")
    source = ModelSource.parse(asked.model)
    if source.file is not None or is_tiny(asked.model, source):
        raise ConfigError(
            f"'{asked.model}' is a file of weights; a language model is a folder written by save_pretrained, or a "
            "Hugging Face id."
        )
    return asked.model


def model_type(source: str) -> str | None:
    """What the ``config.json`` of a folder or repository calls its family, where it is on this machine."""
    found = ModelSource.parse(source).find("config.json")
    try:
        written = {} if found is None else json.loads(found.read_text(encoding="utf-8"))
    except ValueError:  # the class itself says what is wrong
        return None
    return written.get("model_type") if isinstance(written, dict) else None

"""Published CLIPs: architecture, normalization and weights, for files of any supported library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig

from visexpert.errors import ConfigError, WeightsError
from visexpert.io.source import WEIGHT_FILES, ZOO_PREFIX, ModelSource
from visexpert.io.weights import read_source, state_keys
from visexpert.networks.open_clip import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_FILES,
    OPEN_CLIP_PREFIX,
    described_by,
    shared_preparation,
)
from visexpert.networks.towers import checked_fields
from visexpert.vision.convert import VisionTower, clip_config, from_hugging_face, from_open_clip, without_wrapper
from visexpert.vision.families import check_keys, check_reader
from visexpert.vision.saving_open_clip import read_whole

OWNER = "ClipEncoder"

_OF_TOWER = re.compile(r"vision_tower|vision_model|visual")

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LoadedClip:
    """Weights of a CLIP vision tower.

    Args:
        path: File they were read from, for messages; the index file if they are sharded.
        tensors: Weights under ``CLIPVisionModel``'s names.
        projection_DP: Projection of the pooled output into the space of the text tower; None if there is none.
        own_projection: Whether it is in the same files, not beside them as a shipped one.
        antialias: Whether their own library fits position embeddings to another image size with antialias, as open_clip
            does; transformers does not.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    projection_DP: Tensor | None
    own_projection: bool
    antialias: bool


@dataclass(frozen=True)
class PublishedClip:
    """What is known about a CLIP before its weights are read.

    Args:
        fields: Fields of ``CLIPVisionConfig``.
        source: Its files; None for a random encoder.
        own: Whether ``fields`` come from the files themselves; if not, they are compared once the files are available.
        mean: Channel means for normalization, in [0, 1] units.
        std: Channel standard deviations, likewise.
        elsewhere: Source of the vision tower that the files use if they lack their own (LLaVA's own format).
        settings: open_clip's ``model_cfg`` that ``fields`` come from; None for other libraries. A lone file with
            ``config`` shows by its names alone that it is of open_clip.
    """

    fields: Mapping[str, Any]
    source: ModelSource | None
    own: bool
    mean: Sequence[float] = OPENAI_MEAN
    std: Sequence[float] = OPENAI_STD
    elsewhere: str | None = None
    settings: Mapping[str, Any] | None = None

    def license(self) -> str | None:
        """As stated by the model card, where it is on this machine."""
        return None if self.source is None else self.source.license()

    def completed(self) -> PublishedClip:
        """Return a copy completed from the files' own configuration, which is fetched if it is not on this machine yet.

        Raises:
            ConfigError: It differs from the given fields.
        """
        if self.own or self.source is None or self.source.repo is None:
            return self
        for name in (OPEN_CLIP_CONFIG, "config.json", "preprocessor_config.json"):
            with suppress(WeightsError):  # a repository has one format, rarely both
                self.source.fetch(name, owner=OWNER)
        theirs = _own_config(self.source)
        if theirs is None:
            return self
        _must_agree(self.fields, theirs.fields, self.source)
        return theirs

    def whole(self) -> Mapping[str, Tensor]:
        """Return all weights of a model of open_clip; none for a random encoder.

        Raises:
            WeightsError: They are gone, or named as transformers does.
        """
        if self.source is None:
            return {}
        tensors = _unwrapped(read_whole(self.source, owner=OWNER))
        if not _named_by_open_clip(tensors):
            raise WeightsError(
                f"{OWNER}: '{self.source.text}' holds names of transformers, not of open_clip; use the format hf."
            )
        alone = not any(key.startswith("visual.") for key in tensors)
        return {f"visual.{key}": value for key, value in tensors.items()} if alone else tensors

    def load(self) -> LoadedClip:
        """Return the weights under ``CLIPVisionModel``'s names, and the width of a projection if there is one.

        Raises:
            WeightsError: They do not exist, or are not those of a plain ViT.
        """
        assert self.source is not None
        found = read_source(self.source, owner=OWNER, names=(*WEIGHT_FILES, *OPEN_CLIP_FILES), holding=_OF_TOWER)
        check_keys(found.tensors, found.path, elsewhere=self.elsewhere)
        tensors = _unwrapped(found.tensors)
        tower = _tower(tensors)
        projection_DP = tower.projection_DP
        if projection_DP is None:
            projection_DP = _shipped_projection(self.source)
        return LoadedClip(
            path=found.path,
            tensors=tower.state,
            projection_DP=projection_DP,
            own_projection=tower.projection_DP is not None,
            antialias=self.settings is not None or (self.source.file is not None and _named_by_open_clip(tensors)),
        )


def _shipped_projection(source: ModelSource) -> Tensor | None:
    """Return the projection of a shipped encoder, which is in the file of its text tower."""
    if not source.text.startswith(ZOO_PREFIX) or source.path is None:
        return None
    path = source.path.with_name(f"{source.path.name}_text.safetensors")
    return load_file(path)["projection.weight"].float().T.contiguous() if path.is_file() else None


def vision_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the vision tower of a CLIP state dict under ``CLIPVisionModel``'s names, without its projection."""
    return dict(_tower(_unwrapped(tensors)).state)


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    before = without_wrapper(tensors)
    if not before:
        return tensors
    return {key.removeprefix(before): value for key, value in tensors.items() if key.startswith(before)}


def _named_by_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.removeprefix("visual.") == "conv1.weight" for key in tensors)


def _tower(tensors: Mapping[str, Tensor]) -> VisionTower:
    return from_open_clip(tensors) if _named_by_open_clip(tensors) else from_hugging_face(tensors)


def describe_clip(
    source: str | None, *, config: Mapping[str, Any] | None = None, architecture: str | None = None
) -> PublishedClip:
    """Describe a CLIP without its weights and without a download.

    Args:
        source: As in :class:`~visexpert.vision.ClipEncoder`.
        config: Fields of ``CLIPVisionConfig``, for files that have no configuration or are not on this machine yet.
        architecture: Name of an open_clip model, for the same purpose.

    Raises:
        ConfigError: The architecture is unspecified or contradictory.
        WeightsError: The files' configuration does not exist.
    """
    if config is not None and architecture is not None:
        raise ConfigError(
            f"{OWNER}: config and architecture={architecture!r} both name the architecture; give only one."
        )
    given = None if config is None else PublishedClip(known_fields(config), None, own=False)
    if architecture is not None:
        given = _named(architecture, None)
    if source is None:
        if given is None:
            raise ConfigError(f"{OWNER} takes either source (a folder, file or id) or config (a random encoder).")
        return given
    if source.startswith(OPEN_CLIP_PREFIX):
        if given is not None:
            raise ConfigError(
                f"{OWNER}: source={source!r} names its own architecture; leave config and architecture out."
            )
        return _named(*_name_and_tag(source))
    files = ModelSource.parse(source)
    own = _own_config(files)
    if own is not None and given is not None:
        _must_agree(given.fields, own.fields, files)
    found = own or given
    if own is None and architecture is not None and files.repo is None:
        shared_preparation(architecture, needed=("mean", "std"), owner=OWNER)
    if files.file is not None and (keys := state_keys(files.file)) is not None:
        check_keys(keys, files.file)
    if found is None:
        raise _unknown(files)
    return replace(found, source=files)


def vision_config(fields: Mapping[str, Any]) -> CLIPVisionConfig:
    """Return Hugging Face's configuration.

    Raises:
        ConfigError: A field has a value that it cannot have.
    """
    with checked_fields(OWNER):
        return CLIPVisionConfig(**fields)


def known_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a user's fields; refuse those that ``CLIPVisionConfig`` would accept but never read."""
    known = CLIPVisionConfig().to_dict()
    for name in config:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use fields of CLIPVisionConfig: {sorted(known)}."
            raise ConfigError(f"{OWNER}: config has no field {name!r}; {hint}")
    return dict(config)


def _own_config(files: ModelSource) -> PublishedClip | None:
    """Return the files' own configuration, in open_clip's or transformers' format."""
    check_reader(files, owner=OWNER)
    written = described_by(files).read_json(OPEN_CLIP_CONFIG, owner=OWNER)
    if written is not None:
        prepared = written.get("preprocess_cfg") or {}
        return _from_open_clip(written.get("model_cfg") or {}, prepared, files)
    settings = files.read_json("config.json", owner=OWNER)
    if settings is None:
        return None
    if "mm_vision_tower" in settings:  # LLaVA's own format
        tower = str(settings["mm_vision_tower"])
        return replace(describe_clip(tower), source=files, own=True, elsewhere=tower)
    nested = settings.get("vision_config")
    fields = dict(nested) if isinstance(nested, Mapping) else settings
    if "projection_dim" in settings:  # a whole CLIP, whose vision_config holds another one that is never read
        fields = {**fields, "projection_dim": settings["projection_dim"]}
    prepared = files.read_json("preprocessor_config.json", owner=OWNER)
    if prepared is None:
        return PublishedClip(fields, files, own=True)
    absent = [name for name in ("image_mean", "image_std") if name not in prepared]
    if absent:
        raise WeightsError(
            f"{OWNER}: {files.find('preprocessor_config.json')} lacks {absent}; give a folder written by "
            "save_pretrained, or delete that file for OpenAI's normalization."
        )
    return PublishedClip(fields, files, own=True, mean=prepared["image_mean"], std=prepared["image_std"])


def _name_and_tag(source: str) -> tuple[str, str]:
    name, _, tag = source.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    if not name or not tag:
        raise ConfigError(
            f"{OWNER}: source={source!r} is incomplete; write 'open_clip:NAME/TAG', or architecture: NAME."
        )
    return name, tag


def _named(name: str, tag: str | None) -> PublishedClip:
    """Return a model from open_clip's list, with the weights of one of its tags."""
    from open_clip import get_model_config, list_models, list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg

    model_cfg = get_model_config(name)
    if model_cfg is None:
        near = get_close_matches(name, list_models(), n=3)
        raise ConfigError(f"{OWNER}: open_clip has no model {name!r}; the nearest are {near}.")
    tagged = {} if tag is None else get_pretrained_cfg(name, tag)
    if tag is not None and not tagged.get("hf_hub"):
        tags = list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"{OWNER}: open_clip has no weights {tag!r} of {name} on the Hugging Face Hub; its tags are {tags}."
        )
    files = ModelSource(f"{OPEN_CLIP_PREFIX}{name}/{tag}", repo=tagged["hf_hub"].rstrip("/")) if tag else None
    prepared = tagged or shared_preparation(name, owner=OWNER)
    # What the weights were trained with takes precedence over the name (open_clip warns of the difference).
    quick = tagged.get("quick_gelu", model_cfg.get("quick_gelu", False))
    return replace(_from_open_clip({**model_cfg, "quick_gelu": quick}, prepared, files), own=tag is not None)


def _from_open_clip(
    model_cfg: Mapping[str, Any], prepared: Mapping[str, Any], files: ModelSource | None
) -> PublishedClip:
    mean, std = prepared.get("mean") or OPENAI_MEAN, prepared.get("std") or OPENAI_STD
    return PublishedClip(clip_config(model_cfg), files, own=True, mean=mean, std=std, settings=model_cfg)


def _must_agree(given: Mapping[str, Any], own: Mapping[str, Any], files: ModelSource) -> None:
    """Refuse a setting that differs from the files' own; a wrong activation or head count would load silently."""
    theirs, ours = vision_config(own).to_dict(), vision_config(given).to_dict()
    differing = [name for name in given if name != "projection_dim" and ours.get(name) != theirs.get(name)]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{OWNER}: {name}={ours.get(name)!r} was given, but the weights of '{files.text}' were trained with "
            f"{theirs.get(name)!r}; correct it, or leave it out."
        )


def _unknown(files: ModelSource) -> Exception:
    """Build the error for a CLIP of unknown architecture."""
    if files.file is not None:
        if not files.file.is_file():
            return WeightsError(f"{OWNER}: no weights at {files.file}; check the path, or fetch them first.")
        return ConfigError(
            f"{OWNER}: {files.file} holds only weights; name their model with architecture (of open_clip, such as "
            "ViT-B-16 or ViT-L-14-336-quickgelu) or config (fields of CLIPVisionConfig)."
        )
    return files.absent("config.json", owner=OWNER)

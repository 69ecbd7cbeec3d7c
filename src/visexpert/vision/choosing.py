"""Choose the class of encoder that reads a source."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from visexpert.errors import ConfigError, WeightsError
from visexpert.io.source import ZOO_PREFIX, ModelSource
from visexpert.io.weights import state_keys
from visexpert.networks.looks import Look, look_at_keys
from visexpert.networks.open_clip import OPEN_CLIP_PREFIX
from visexpert.networks.timm import is_timm, is_vit
from visexpert.typed import typed
from visexpert.vision.clip import ClipEncoder
from visexpert.vision.encoder import VisionEncoder
from visexpert.vision.families import look_at, look_at_settings, look_at_tower, next_step
from visexpert.vision.of_open_clip import OpenClipEncoder
from visexpert.vision.of_timm import TimmEncoder
from visexpert.vision.of_transformers import TransformersEncoder

OWNER = "vision_encoder"

ENCODERS: Mapping[str, type[VisionEncoder]] = {
    kind.__name__: kind for kind in (ClipEncoder, TransformersEncoder, TimmEncoder, OpenClipEncoder)
}
"""Classes by name."""


@typed
def vision_encoder(source: str | None = None, **options: Any) -> VisionEncoder:
    """Return an encoder of the class that reads a source, with weights that are read on first use.

    Args:
        source: Folder, file or Hugging Face id of any class of encoder; ``zoo:NAME``; ``open_clip:NAME/TAG``; or a name
            of timm with its tag, such as ``vit_base_patch16_siglip_224.v2_webli``. None for a random encoder, which
            the options name.
        options: Options of that class, such as ``layer``; for a source that is not on this machine, also ``config`` (of
            transformers) or ``model`` (a name of timm or open_clip).

    Raises:
        ConfigError: Nothing says which class reads it, it cannot be taught, or its class lacks an option.
        WeightsError: Its configuration is not on this machine, and no option says what it is.
    """
    kind, arguments = encoder_of(source, options)
    return kind(**arguments)


def encoder_of(source: str | None, options: Mapping[str, Any]) -> tuple[type[VisionEncoder], dict[str, Any]]:
    """Return the class and arguments of :func:`vision_encoder`."""
    given = dict(options)
    if source is not None and is_timm(source) and look_at(ModelSource.parse(source)) is None:
        given.setdefault("model", source)
        source = f"timm/{source}"
    look = _look(source, given)
    if look is None:
        if source is None:
            raise ConfigError(f"{OWNER} needs source, or what a random encoder is: config or model.")
        raise _unknown(ModelSource.parse(source))
    if not look.readers:
        raise ConfigError(f"{OWNER}: '{source}' holds {look.what}; {next_step(look, str(source))}.")
    kind = ENCODERS[look.readers[0]]
    if kind is ClipEncoder and "model" in given and "architecture" not in given:
        given["architecture"] = given.pop("model")
    known = inspect.signature(kind).parameters
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(
            f"{OWNER}: '{source}' is read by {kind.__name__}, which has no option {unknown[0]!r}; "
            f"its options are {sorted(known)}."
        )
    return kind, {**({} if source is None else {"source": source}), **given}


def _look(source: str | None, options: Mapping[str, Any]) -> Look | None:
    """Return what a source is: by its files, else by the options, else by its name."""
    if source is not None and source.startswith(ZOO_PREFIX):
        return Look("a shipped CLIP", ("ClipEncoder",))
    if source is not None and source.startswith(OPEN_CLIP_PREFIX):
        return _named(source.removeprefix(OPEN_CLIP_PREFIX).partition("/")[0])
    files = None if source is None else ModelSource.parse(source)
    found = None if files is None else look_at(files)
    if found is None and files is not None and files.file is not None:
        found = look_at_keys(state_keys(files.file) or ())
    if found is None and options.get("architecture"):
        return Look("a CLIP", ("ClipEncoder",))
    if found is None and options.get("config"):
        return look_at_settings(options["config"])
    if found is None and options.get("model"):
        return _named(str(options["model"]))
    return found


def _named(name: str) -> Look:
    """Return what a name of timm or open_clip is.

    Raises:
        ConfigError: Neither has such a model.
    """
    from open_clip import get_model_config

    if is_timm(name):
        return Look(f"timm's model {name!r}", ("TimmEncoder",) if is_vit(name) else ())
    settings = get_model_config(name)
    if settings is None:
        raise ConfigError(f"{OWNER}: neither timm nor open_clip has a model {name!r}; see list_models() of both.")
    return look_at_tower(settings["vision_cfg"])


def _unknown(files: ModelSource) -> Exception:
    """Return the error for files that say nothing."""
    if files.file is not None:
        return ConfigError(
            f"{OWNER}: {files.file} holds only weights of a network that is not recognized; name its class "
            f"({', '.join(ENCODERS)}), and its model or config."
        )
    absent: WeightsError = files.absent("config.json", owner=OWNER)
    return absent

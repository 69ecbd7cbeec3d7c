"""Image processors of transformers as recipes: what their settings say, done on the device."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import transformers

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts.recipe import Framing, InputRecipe, Interpolation
from visexpert.io.source import ModelSource

_RESAMPLING: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
"""Numbers of PIL's filters that can be done on the device."""


def recipe_of(
    *,
    owner: str,
    source: ModelSource | None,
    processor: Mapping[str, Any] | None,
    size: int | None,
    interpolation: Interpolation | None,
) -> InputRecipe:
    """The recipe of a model's own image processor.

    Args:
        owner: Who asks, for messages.
        source: The model's files; ``preprocessor_config.json`` is read where it is on this machine.
        processor: What a user wrote of it; decides where the files are not here, else must agree with them.
        size: Side that the user asked for or the model's position embeddings are made for; comes before that of the
            processor, which may be smaller.
        interpolation: What a user asked for instead of the processor's own.

    Raises:
        ConfigError: Nothing, or contradicting things, are said of the processor, or it does what cannot be done here.
    """
    own = None if source is None else _own_settings(source, owner)
    if own is not None or processor is not None:
        if source is not None and processor is not None:
            must_agree(source, processor, owner=owner)
        return _recipe(settings_of(own or processor or {}, owner=owner), owner, size, interpolation)
    if source is not None:
        raise _absent(source, owner)
    if size is None:
        raise ConfigError(f"{owner}: nothing says which size of image this model reads; give image_size.")
    return InputRecipe(size)


def _absent(source: ModelSource, owner: str) -> WeightsError:
    """Return the error for files without an image processor, with the ways out where the model itself is there."""
    if source.path is None or not source.path.is_dir():
        return source.absent("preprocessor_config.json", owner=owner)
    return WeightsError(
        f"{owner}: no preprocessor_config.json in {source.path}; a model's save_pretrained writes none; save "
        "the image processor there, too (its own save_pretrained), fetch the file of the model it was made "
        f"from (`hf download ORG/NAME preprocessor_config.json --local-dir {source.path}`), or give processor: "
        "{image_processor_type: ViTImageProcessor, image_mean: ..., image_std: ...}."
    )


def must_agree(source: ModelSource, processor: Mapping[str, Any], *, owner: str) -> None:
    """Compare what a user wrote of a processor with its own file, where that is on this machine.

    Raises:
        ConfigError: They differ.
    """
    own = _own_settings(source, owner)
    if own is None:
        return
    given, found = settings_of(processor, owner=owner), settings_of(own, owner=owner)
    for name in processor:
        if _plain(given.get(name)) != _plain(found.get(name)):
            raise ConfigError(
                f"{owner}: {name} of the processor of '{source.text}' is {found.get(name)!r}, not "
                f"{given.get(name)!r}; correct it, or leave it out."
            )


def settings_of(processor: Mapping[str, Any], *, owner: str) -> dict[str, Any]:
    """All settings of a processor, the defaults of its class included.

    Args:
        processor: As in ``preprocessor_config.json``; ``image_processor_type`` names the class.
        owner: Who asks, for messages.

    Raises:
        ConfigError: There is no such class in transformers.
    """
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type") or ""
    if not named:
        raise ConfigError(
            f"{owner}: the image processor names no image_processor_type among {sorted(processor)}; say which class of "
            "transformers it is, such as ViTImageProcessor."
        )
    name = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    kind = getattr(transformers, name, None) if name.endswith("ImageProcessor") else None
    if kind is None:
        known = [n for n in dir(transformers) if n.endswith("ImageProcessor")]
        near = get_close_matches(name, known, n=3) or "ViTImageProcessor, CLIPImageProcessor and BitImageProcessor"
        raise ConfigError(
            f"{owner}: image_processor_type {str(named)!r} is none of transformers'; the nearest are {near}."
        )
    own = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}
    return dict(kind(**{key: value for key, value in processor.items() if key not in own}).to_dict())


def _own_settings(source: ModelSource, owner: str) -> dict[str, Any] | None:
    settings = source.read_json("preprocessor_config.json", owner=owner)
    if settings is None:
        settings = (source.read_json("processor_config.json", owner=owner) or {}).get("image_processor")
    return settings


def _recipe(
    settings: Mapping[str, Any], owner: str, size: int | None, interpolation: Interpolation | None
) -> InputRecipe:
    normalize = settings.get("do_normalize", True) and settings.get("image_mean") is not None  # GLPN's has none
    resample = _RESAMPLING.get(int(settings.get("resample") or 2))
    if resample is None and interpolation is None:
        raise ConfigError(
            f"{owner}: the processor resizes by filter {settings['resample']!r}; give interpolation: bicubic (or "
            "bilinear) instead."
        )
    framing, side, share = _framing(settings)
    size = size or side
    if size is None:
        raise ConfigError(f"{owner}: the processor's size {settings.get('size')} is no square; give image_size.")
    return InputRecipe(
        image_size=size,
        mean=tuple(settings["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if normalize else (1.0, 1.0, 1.0),
        interpolation=interpolation or resample or "bicubic",
        framing=framing,
        crop_share=share,
        crop_floor=True,
    )


def _framing(settings: Mapping[str, Any]) -> tuple[Framing, int | None, float]:
    """Framing, side in pixels and share of the crop; framing ``own`` for what cannot be done with a fixed grid."""
    size = _plain(settings.get("size"))
    size = size if isinstance(size, dict) else {"height": size, "width": size}
    crop = _plain(settings.get("crop_size")) if settings.get("do_center_crop") else None
    side = crop.get("height") if isinstance(crop, dict) else crop
    if side is not None and "shortest_edge" in size:
        return "crop", side, side / size["shortest_edge"]
    if set(size) == {"longest_edge"}:
        pad = _plain(settings.get("pad_size")) or {}
        same = settings.get("do_pad") and pad == {"height": size["longest_edge"], "width": size["longest_edge"]}
        return ("pad" if same else "own"), size["longest_edge"], 1.0
    square = size.get("height") == size.get("width")
    side = size.get("height") if square else None
    stretched = square and side is not None and crop is None and not settings.get("keep_aspect_ratio")
    return ("squash" if stretched else "own"), side or size.get("shortest_edge"), 1.0


def _plain(value: Any) -> Any:
    """A setting as JSON would have it: sizes as dicts without what is not said, sequences as lists."""
    if isinstance(value, Mapping) or hasattr(value, "__dict__") and hasattr(value, "height"):
        entries = value.items() if isinstance(value, Mapping) else vars(value).items()
        return {key: item for key, item in entries if item is not None}
    return list(value) if isinstance(value, list | tuple) else value

"""The preprocessing of a model's own image processor, done on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

import transformers
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from visexpert.errors import ConfigError, WeightsError
from visexpert.grids import resized_to
from visexpert.io.source import ModelSource

Interpolation = Literal["bilinear", "bicubic"]
Framing = Literal["squash", "crop", "pad", "own"]
"""What to do with images that are not square: ``squash`` - stretch them, as ``ClipEncoder`` does, so that a patch of
every expert shows the same part as CLIP's; ``crop`` - resize the shortest edge and crop the center; ``pad`` - resize
the longest edge and pad with zeros on the right and below; ``own`` - do what the model's own processor does."""


@dataclass(frozen=True)
class Preprocessing:
    """How images are framed, resized and normalized for a model.

    Args:
        image_size: Side of the square that the model reads, in pixels.
        mean: Channel means, for pixels in [0, 1].
        std: Channel standard deviations, in the same units.
        interpolation: Interpolation when resizing, always antialiased.
        framing: ``squash``, ``crop`` or ``pad``; ``own`` if the model's own way is none of these.
        crop_share: With ``crop``: ``image_size`` as a share of the resized shortest edge, in (0, 1].
        crop_floor: If the crop would start between two pixels, whether to start it at the lower one, as transformers
            does, or at the even one, as torchvision, timm and open_clip do.
    """

    image_size: int
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bilinear"
    framing: Framing = "squash"
    crop_share: float = 1.0
    crop_floor: bool = False

    def adapted(
        self, *, owner: str, image_size: int | None, framing: Framing | None, interpolation: Interpolation | None
    ) -> Preprocessing:
        """Return this preprocessing with the user's options.

        A framing of None is the model's own; if that is not available here, images are squashed, with a warning.

        Raises:
            ConfigError: An option is unknown, or the size is below 1.
        """
        for name, value, allowed in (
            ("framing", framing or "own", get_args(Framing)),
            ("interpolation", interpolation or "bicubic", get_args(Interpolation)),
        ):
            if value not in allowed:
                raise ConfigError(f"{owner}: {name}={value!r} is unknown; use one of {list(allowed)}.")
        if image_size is not None and image_size < 1:
            raise ConfigError(f"{owner}: image_size must be at least 1 px, got {image_size}.")
        if framing is None and self.framing == "own":
            rank_zero_warn(
                f"{owner}: this model frames images in a way that is not available here, so they are squashed; set "
                "framing to squash, crop or pad."
            )
            framing = "squash"
        if framing == self.framing == "own":
            raise ConfigError(
                f"{owner}: this model frames images in a way that is not available here; set framing to squash, crop "
                "or pad."
            )
        return replace(
            self,
            image_size=image_size or self.image_size,
            framing=self.framing if framing in (None, "own") else framing,
            interpolation=interpolation or self.interpolation,
        )

    def prepare(self, images_BCHW: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Frame, resize and normalize images.

        Args:
            images_BCHW: Images (B, 3, H, W), float in [0, 1], of any size.
            mean: Channel means (1, 3, 1, 1), on the images' device.
            std: Channel standard deviations (1, 3, 1, 1), on the images' device.

        Returns:
            Pixels (B, 3, image_size, image_size).
        """
        size = self.image_size
        if self.framing == "pad":
            height, width = images_BCHW.shape[-2:]
            scale = size / max(height, width)
            normalized = (self._resized(images_BCHW, [_half_up(height * scale), _half_up(width * scale)]) - mean) / std
            return F.pad(normalized, (0, size - normalized.shape[-1], 0, size - normalized.shape[-2]))
        if self.framing == "crop":
            # The share is a ratio of integers: 224 / 0.875 must give 256, not 255.
            shortest = math.floor(size / self.crop_share + 1e-6)
            images_BCHW = self._cropped(self._resized(images_BCHW, [shortest]))
        else:
            images_BCHW = self.resized(images_BCHW)
        return (images_BCHW - mean) / std

    def resized(self, images_BCHW: Tensor) -> Tensor:
        """Stretch images (B, 3, H, W) in [0, 1] to the square that the model reads."""
        return self._resized(images_BCHW, [self.image_size, self.image_size])

    def _resized(self, images_BCHW: Tensor, size: list[int]) -> Tensor:
        if list(images_BCHW.shape[-2:]) == size:
            return images_BCHW

        def resize(given_BCHW: Tensor) -> Tensor:
            resized: Tensor = tv.resize(given_BCHW, size, InterpolationMode(self.interpolation), antialias=True)
            return resized.clamp(0.0, 1.0)

        return resized_to(images_BCHW, (*size, self.interpolation), resize)

    def _cropped(self, images_BCHW: Tensor) -> Tensor:
        size = self.image_size
        halves = [(side - size) / 2 for side in images_BCHW.shape[-2:]]
        top, left = (math.floor(half) if self.crop_floor else round(half) for half in halves)
        return images_BCHW[..., top : top + size, left : left + size]


def _half_up(length: float) -> int:
    return max(1, int(length + 0.5))


_RESAMPLING: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
"""PIL's filters that are available on the device, by number."""


def preprocessing_of(
    *,
    owner: str,
    source: ModelSource | None,
    processor: Mapping[str, Any] | None,
    size: int | None,
    interpolation: Interpolation | None,
) -> Preprocessing:
    """Return the preprocessing of a model's own image processor.

    Args:
        owner: Name of the caller, for messages.
        source: Files of the model; ``preprocessor_config.json`` is read if it is on this machine.
        processor: The user's settings of the processor, used if the file is not here; otherwise they must agree.
        size: Side that the user asked for, or that the model's position embeddings are made for; takes precedence over
            that of the processor, which may be smaller.
        interpolation: The user's choice instead of the processor's own.

    Raises:
        ConfigError: Settings are missing, contradict each other, or ask for what is not available here.
        WeightsError: ``preprocessor_config.json`` is missing, and no settings are given.
    """
    own = None if source is None else _own_settings(source, owner)
    if own is not None or processor is not None:
        if source is not None and processor is not None:
            must_agree(source, processor, owner=owner)
        return _preprocessing(settings_of(own or processor or {}, owner=owner), owner, size, interpolation)
    if source is not None:
        raise _absent(source, owner)
    if size is None:
        raise ConfigError(f"{owner}: the size of this model's images is not known; set image_size.")
    return Preprocessing(size)


def _absent(source: ModelSource, owner: str) -> WeightsError:
    """Return the error for files without an image processor, with the remedies if the model itself is there."""
    if source.path is None or not source.path.is_dir():
        return source.absent("preprocessor_config.json", owner=owner)
    return WeightsError(
        f"{owner}: no preprocessor_config.json in {source.path}, because a model's save_pretrained does not write it; "
        "save the image processor there too (with its own save_pretrained), fetch the file of the original model "
        f"(`hf download ORG/NAME preprocessor_config.json --local-dir {source.path}`), or set processor: "
        "{image_processor_type: ViTImageProcessor, image_mean: ..., image_std: ...}."
    )


def must_agree(source: ModelSource, processor: Mapping[str, Any], *, owner: str) -> None:
    """Check the user's settings of a processor against its own file, if that is on this machine.

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
                f"{given.get(name)!r}; correct or remove it."
            )


def settings_of(processor: Mapping[str, Any], *, owner: str) -> dict[str, Any]:
    """Return all settings of a processor, including the defaults of its class.

    Args:
        processor: Settings as in ``preprocessor_config.json``; ``image_processor_type`` names the class.
        owner: Name of the caller, for messages.

    Raises:
        ConfigError: There is no such class in transformers.
    """
    named = processor.get("image_processor_type") or processor.get("feature_extractor_type") or ""
    if not named:
        raise ConfigError(
            f"{owner}: the image processor has no image_processor_type, only {sorted(processor)}; set it to a class of "
            "transformers, such as ViTImageProcessor."
        )
    name = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    kind = getattr(transformers, name, None) if name.endswith("ImageProcessor") else None
    if kind is None:
        known = [n for n in dir(transformers) if n.endswith("ImageProcessor")]
        near = get_close_matches(name, known, n=3) or "ViTImageProcessor, CLIPImageProcessor and BitImageProcessor"
        raise ConfigError(f"{owner}: transformers has no image_processor_type {str(named)!r}; the nearest are {near}.")
    own = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}
    return dict(kind(**{key: value for key, value in processor.items() if key not in own}).to_dict())


def _own_settings(source: ModelSource, owner: str) -> dict[str, Any] | None:
    settings = source.read_json("preprocessor_config.json", owner=owner)
    if settings is None:
        settings = (source.read_json("processor_config.json", owner=owner) or {}).get("image_processor")
    return settings


def _preprocessing(
    settings: Mapping[str, Any], owner: str, size: int | None, interpolation: Interpolation | None
) -> Preprocessing:
    normalize = settings.get("do_normalize", True) and settings.get("image_mean") is not None  # GLPN's has none
    resample = _RESAMPLING.get(int(settings.get("resample") or 2))
    if resample is None and interpolation is None:
        raise ConfigError(
            f"{owner}: the processor resizes with filter {settings['resample']!r}, which is not available here; set "
            "interpolation to bicubic or bilinear."
        )
    framing, side, share = _framing(settings)
    size = size or side
    if size is None:
        raise ConfigError(f"{owner}: the processor's size {settings.get('size')} is not square; set image_size.")
    return Preprocessing(
        image_size=size,
        mean=tuple(settings["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=tuple(settings["image_std"]) if normalize else (1.0, 1.0, 1.0),
        interpolation=interpolation or resample or "bicubic",
        framing=framing,
        crop_share=share,
        crop_floor=True,
    )


def _framing(settings: Mapping[str, Any]) -> tuple[Framing, int | None, float]:
    """Return framing, side in pixels and crop share; framing is ``own`` if the processor needs more than a square."""
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
    """Return a setting as it is in JSON: sizes as dicts without None, sequences as lists."""
    if isinstance(value, Mapping) or hasattr(value, "__dict__") and hasattr(value, "height"):
        entries = value.items() if isinstance(value, Mapping) else vars(value).items()
        return {key: item for key, item in entries if item is not None}
    return list(value) if isinstance(value, list | tuple) else value

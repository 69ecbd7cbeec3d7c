"""Models of transformers before and after their weights arrive: configuration, image processor, loading."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig
from transformers.utils import logging

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts.sam_attention import chunk_attention
from visexpert.experts.towers import build_network, factory_of, key_mapping, vision_part
from visexpert.io.reading import read_object
from visexpert.io.source import FETCH_AGAIN, ModelSource
from visexpert.io.weights import fill_module, reshaped, state_keys, unreadable
from visexpert.vision.families import checked_fields
from visexpert.vision.positions import fit_positions

NATIVE_SIZE = ("image_size", "img_size")

INTERPOLATING = ("interpolate_pos_encoding", "_resize_pos_embed", "resize_positional_embeddings")
"""Names of methods by which models of transformers fit their position embeddings to an image."""

UNUSED = ("pooler.", "head.")
"""How names begin of weights behind the patch tokens, which checkpoints without a head lack."""


@dataclass(frozen=True)
class HubModel:
    """A model of transformers, described without its weights and without a download.

    Args:
        owner: Expert that asks, for messages.
        source: Its files; None for a random network.
        config: Its configuration; of a model with a text tower, the vision part.
        given: What a user wrote of it.
        auto: Name of the ``AutoModel...`` class that builds it.
    """

    owner: str
    source: ModelSource | None
    config: PreTrainedConfig
    given: Mapping[str, Any] | None
    auto: str

    @classmethod
    def describe(cls, *, owner: str, auto: str, source: str | None, config: Mapping[str, Any] | None) -> HubModel:
        """Read ``config.json`` where it is on this machine; else take what was given.

        Raises:
            ConfigError: Nothing, or contradicting things, are said of the model.
            WeightsError: Its configuration is nowhere.
        """
        files = None if source is None else ModelSource.parse(source)
        own = None if files is None else files.read_json("config.json", owner=owner)
        if own is None and config is None:
            if files is None:
                raise ConfigError(f"{owner} takes a source (a folder or hub id), or config for a random network.")
            raise files.absent("config.json", owner=owner)
        given = None if config is None else config_of(config, owner=owner, strict=True)
        found = given if own is None else config_of(own, owner=owner)
        assert found is not None
        if own is not None and config is not None:
            _must_agree(config, given, found, f"{owner}: the weights of '{source}'")
        _must_read_images(found, owner)
        return cls(owner, files, found, config, auto)

    @property
    def native_size(self) -> int | None:
        """Side that the model's position embeddings are made for; None where it has none."""
        for part in (self.config, getattr(self.config, "backbone_config", None)):
            for name in NATIVE_SIZE:
                side = getattr(part, name, None)
                side = side[0] if isinstance(side, list | tuple) and len(set(side)) == 1 else side
                if isinstance(side, int):
                    return side
        patches = getattr(self.config, "num_patches", None)  # SigLIP 2 reads images of any shape
        return math.isqrt(patches) * int(self.config.patch_size) if isinstance(patches, int) else None

    def _built(self, config: PreTrainedConfig) -> nn.Module:
        return build_network(config, auto=self.auto, owner=self.owner)

    def _resized(self, image_size: int) -> PreTrainedConfig | None:
        """The configuration for images of another size; None where nothing in it changes."""
        config = copy.deepcopy(self.config)
        for part in (config, getattr(config, "backbone_config", None)):
            for name in NATIVE_SIZE:
                side = getattr(part, name, None)
                if isinstance(side, int | list | tuple):
                    setattr(part, name, image_size if isinstance(side, int) else [image_size] * len(side))
        return config if config.to_dict() != self.config.to_dict() else None

    def _interpolates(self) -> bool:
        """See :func:`own_interpolation`; a network without memory shows it."""
        with torch.device("meta"):
            return own_interpolation(self._built(copy.deepcopy(self.config)))

    def build(self, image_size: int) -> nn.Module:
        """The network for images of this size, with random weights and fused attention wherever it exists.

        Raises:
            ConfigError: transformers has no such network.
        """
        resized = self._resized(image_size)
        try:
            config = copy.deepcopy(self.config) if resized is None or self._interpolates() else resized
            model = self._built(config)
        except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{self.owner}: {self.auto} cannot build this model ({reason}).") from error
        chunk_attention(model)
        return model.eval()

    def load(self, model: nn.Module) -> None:
        """Fill a network that :meth:`build` made, through transformers' own loader (renamed keys, split files).

        Position embeddings are interpolated where the network is for another size of image.

        Raises:
            WeightsError: The weights are nowhere, or do not fit.
            ConfigError: Their configuration differs from the one that was given.
        """
        if self.source is None:
            return
        config_path = self.source.fetch("config.json", owner=self.owner)
        with suppress(WeightsError):  # its processor, to compare; not every model has a file for it
            self.source.fetch("preprocessor_config.json", owner=self.owner)
        path = self.source.fetch_weights(owner=self.owner)
        own = config_of(self.source.read_json("config.json", owner=self.owner) or {}, owner=self.owner)
        if self.given is not None:
            given = config_of(self.given, owner=self.owner)
            _must_agree(self.given, given, own, f"{self.owner}: the weights of '{self.source.text}'")
        try:
            with quiet():
                loaded, report = factory_of(own, auto=self.auto, owner=self.owner).from_pretrained(
                    str(config_path.parent),
                    config=own,
                    dtype=torch.float32,
                    local_files_only=True,
                    output_loading_info=True,
                    key_mapping=self._key_mapping(path, model),
                    ignore_mismatched_sizes=True,  # transformers tells no shapes in its error; they are refused below
                )
        except (OSError, ValueError, RuntimeError, LookupError, EOFError, SafetensorError, UnpicklingError) as error:
            raise unreadable(path, error, owner=self.owner) from error
        _must_fit(report["mismatched_keys"], path, config_path, self.owner)
        state = dict(loaded.state_dict())
        absent = sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED))
        if absent:
            raise WeightsError(f"{self.owner}: {path} lacks {absent[:3]}; use the weights of this model.")
        state = fit_positions(state, model.state_dict())
        fill_module(model, state, owner=self.owner, path=path)

    def _key_mapping(self, path: Path, model: nn.Module) -> dict[str, str] | None:
        """See :func:`~visexpert.experts.towers.key_mapping`."""
        if path.suffix == ".json":
            listed = read_object(path, error=WeightsError, owner=self.owner, step=FETCH_AGAIN).get("weight_map")
            keys: Collection[str] = listed or {}
        else:
            keys = state_keys(path) or ()
        assert self.source is not None
        whole = str((self.source.read_json("config.json", owner=self.owner) or {}).get("model_type"))
        return key_mapping(keys, model, whole=whole, optional=UNUSED, whose=f"{self.owner}: {path}")


def _must_fit(mismatched: Collection[tuple[str, Any, Any]], path: Path, config: Path, owner: str) -> None:
    """Refuse weights of other shapes than the network of their own ``config.json``."""
    if shapes := reshaped(mismatched):
        raise WeightsError(
            f"{owner}: the weights in {path} do not fit {config}: {', '.join(shapes)}; the two do not belong "
            "together, take both from the same model."
        )


def config_of(fields: Mapping[str, Any], *, owner: str, strict: bool = False) -> PreTrainedConfig:
    """A configuration of transformers; the vision part of a model that has one.

    Args:
        fields: As in ``config.json``.
        owner: Who asks, for messages.
        strict: Refuse fields that the configuration does not have (a user's typing errors).

    Raises:
        ConfigError: The kind of model is unknown, or a field is.
    """
    if "model_type" not in fields and "architecture" in fields:  # as timm writes it
        raise ConfigError(
            f"{owner}: this is timm's model {fields['architecture']!r}; use class_path: visexpert.experts.TimmExpert."
        )
    if not fields.get("model_type") and "auto_map" not in fields:
        raise ConfigError(
            f"{owner}: the configuration has no model_type, only {sorted(fields)[:5]}; add that of the model, such as "
            "model_type: vit, or take the config.json that belongs to the weights."
        )
    kind = str(fields.get("model_type"))
    if kind not in CONFIG_MAPPING and "auto_map" in fields:
        raise ConfigError(
            f"{owner}: the code of model_type {kind!r} comes with the model (auto_map) instead of transformers, and is "
            "never run here; take a conversion to transformers' format, or an expert of your own (docs/own-expert.md)."
        )
    if kind not in CONFIG_MAPPING:
        near = get_close_matches(kind, CONFIG_MAPPING.keys(), n=3)
        raise ConfigError(f"{owner}: transformers has no model_type {kind!r}; the nearest are {near}.")
    with checked_fields(owner):
        config = CONFIG_MAPPING[kind](**{key: value for key, value in fields.items() if key != "model_type"})
    if strict:
        _known_fields(fields, config, owner)
    return vision_part(config)


_READ_INSTEAD = {
    "input_ids": "is a language model: it reads text",
    "input_values": "reads sound",
    "input_features": "reads sound",
}
"""What a network is whose ``forward`` takes this and no pixels."""


def _must_read_images(config: PreTrainedConfig, owner: str) -> None:
    """Refuse what reads text or sound; else the first thing missed would be an image processor."""
    network: Any = MODEL_MAPPING.get(type(config), None)
    kinds = network if isinstance(network, tuple | list) else () if network is None else (network,)
    for kind in kinds:
        taken = inspect.signature(kind.forward).parameters
        instead = next((what for name, what in _READ_INSTEAD.items() if name in taken), None)
        if instead is not None and not any(name.startswith("pixel_values") for name in taken):
            raise ConfigError(
                f"{owner}: model_type {config.model_type!r} {instead} ({kind.__name__}), and experts read images; give "
                "an encoder of images (docs/families.md lists some)."
            )


def _known_fields(fields: Mapping[str, Any], config: PreTrainedConfig, owner: str) -> None:
    known = {*type(config)().to_dict(), *config.attribute_map, "model_type", "num_labels", "architectures"}
    for name, value in fields.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(f"{owner}: {type(config).__name__} has no field {name!r}; the nearest are {near}.")
        nested = getattr(config, name, None)
        if isinstance(value, Mapping) and isinstance(nested, PreTrainedConfig):
            _known_fields(value, nested, owner)


def _must_agree(written: Mapping[str, Any], given: Any, own: Any, whose: str) -> None:
    """Refuse a setting that differs from the model's own; heads and activations would load without a word."""
    written = vision_part(written)
    for name in written:
        ours, theirs = getattr(given, name, None), getattr(own, name, None)
        if isinstance(ours, PreTrainedConfig):
            _must_agree(written[name], ours, theirs, whose)
        elif ours != theirs:
            raise ConfigError(f"{whose} were made with {name}={theirs!r}, not {ours!r}; correct it, or leave it out.")


def own_interpolation(model: nn.Module) -> bool:
    """Whether the model's own code fits its position embeddings to the size of an image."""
    return any(
        any(hasattr(part, name) for name in INTERPOLATING) or type(part).__name__.startswith("Interpolate")
        for part in model.modules()
    )


def interpolates(model: nn.Module) -> bool:
    """Whether the model does so only when it is asked to."""
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def takes_patches(model: nn.Module) -> bool:
    """Whether the model reads patches of images of any shape (SigLIP 2's NaFlex) instead of images."""
    return "spatial_shapes" in inspect.signature(model.forward).parameters


def patches_of(pixels_BCHW: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    """Square images as such a model takes them, without padding, as its own image processor cuts them.

    Returns:
        ``pixel_values`` (B, N, patch x patch x 3), each row by row with the channels last, and the grid of each image.
    """
    config: Any = model.config
    patch = int(config.patch_size)
    cells = pixels_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, patch, w, patch)
    shape = list(cells.shape[2:5:2])
    return {
        "pixel_values": cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor([shape] * len(pixels_BCHW), device="cpu"),  # it is read, also on ``meta``
    }


def prefix_and_suffix(model: nn.Module, image_size: int, count: int) -> tuple[int | None, int]:
    """How many of ``count`` tokens stand before and behind the grid that the configuration speaks of.

    Returns:
        None as the first where the configuration speaks of another grid (a pyramid's last stage is smaller).
    """
    config = getattr(model, "config", None)
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) and len(set(patch)) == 1 else patch
    suffix = int(getattr(config, "num_detection_tokens", 0) or 0)
    if not isinstance(patch, int) or not patch:
        return None, suffix
    first = count - suffix - (image_size // patch) ** 2
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    return (first if first in (0, registers, 1 + registers, 2) else None), suffix


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report of the text tower that is left out."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

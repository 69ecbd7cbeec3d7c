"""Models from transformers: build one from its configuration, then load its weights."""

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
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention
from transformers.utils import logging

from visexpert.errors import ConfigError, WeightsError
from visexpert.io.reading import read_object
from visexpert.io.source import FETCH_AGAIN, ModelSource
from visexpert.io.weights import fill_module, reshaped, state_keys, unreadable
from visexpert.networks.looks import told
from visexpert.networks.positions import fit_positions
from visexpert.networks.towers import build_network, checked_fields, factory_of, key_mapping, vision_part

NATIVE_SIZE = ("image_size", "img_size")

INTERPOLATING = ("interpolate_pos_encoding", "_resize_pos_embed", "resize_positional_embeddings")
"""Methods with which models in transformers fit their position embeddings to an image."""

UNUSED = ("pooler.", "head.")
"""Prefixes of weights that come after the patch tokens; checkpoints without a head lack them."""

SAM_QUERIES = 256
"""Queries per chunk of SAM's attention: with 16 heads and 4096 keys their bias takes 67 MB per image in float32;
that of all queries takes 1.07 GB."""


@dataclass(frozen=True)
class DescribedModel:
    """Description of a model from transformers, made without its weights and without a download.

    Args:
        owner: Name of the expert, for messages.
        source: Files of the model; None for a random network.
        config: Configuration of the model, or of its vision part if it has others.
        given: Fields of the configuration that the user wrote.
        auto: Name of the ``AutoModel...`` class that builds it.
    """

    owner: str
    source: ModelSource | None
    config: PreTrainedConfig
    given: Mapping[str, Any] | None
    auto: str

    @classmethod
    def describe(cls, *, owner: str, auto: str, source: str | None, config: Mapping[str, Any] | None) -> DescribedModel:
        """Read ``config.json`` if it is on this machine; otherwise take the given fields.

        Raises:
            ConfigError: Neither a source nor a configuration is given, or the two contradict each other.
            WeightsError: ``config.json`` is missing, and no configuration is given.
        """
        files = None if source is None else ModelSource.parse(source)
        own = None if files is None else files.read_json("config.json", owner=owner)
        if own is None and config is None:
            if files is None:
                raise ConfigError(f"{owner} needs source (a folder or Hugging Face id), or config (a random network).")
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
        """Side of the images that the model's position embeddings are made for; None if it has none."""
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
        """Return the configuration for images of another size; None if nothing in it changes."""
        config = copy.deepcopy(self.config)
        for part in (config, getattr(config, "backbone_config", None)):
            for name in NATIVE_SIZE:
                side = getattr(part, name, None)
                if isinstance(side, int | list | tuple):
                    setattr(part, name, image_size if isinstance(side, int) else [image_size] * len(side))
        return config if config.to_dict() != self.config.to_dict() else None

    def _interpolates(self) -> bool:
        """Return :func:`own_interpolation` of the network."""
        return own_interpolation(self._plain())

    def build(self, image_size: int) -> nn.Module:
        """Build the network for images of this size, with random weights and, if it exists, fused attention.

        Raises:
            ConfigError: transformers cannot build such a network.
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

    def load(self, model: nn.Module) -> tuple[str, ...]:
        """Load weights into a network from :meth:`build` with transformers' own loader (renamed keys, split files).

        Position embeddings are interpolated if the network is for images of another size.

        Returns:
            Names of weights behind the patch tokens (:data:`UNUSED`) that the files lack; they stay random.

        Raises:
            WeightsError: The weights are missing, or do not fit.
            ConfigError: Their configuration differs from the given one.
        """
        if self.source is None:
            return ()
        config_path = self.source.fetch("config.json", owner=self.owner)
        with suppress(WeightsError):  # to compare its processor; not every model has this file
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
                    trust_remote_code=False,
                    output_loading_info=True,
                    key_mapping=self._key_mapping(path),
                    ignore_mismatched_sizes=True,  # its own error does not name shapes; refused below
                )
        except (OSError, ValueError, RuntimeError, LookupError, EOFError, SafetensorError, UnpicklingError) as error:
            raise unreadable(path, error, owner=self.owner) from error
        _must_fit(report["mismatched_keys"], path, config_path, self.owner)
        state = dict(loaded.state_dict())
        absent = sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED))
        if absent:
            raise WeightsError(
                f"{self.owner}: {told(weight_names(path, owner=self.owner), path)}; a {self.config.model_type} lacks "
                f"{absent[:3]}; use the weights of this model."
            )
        # What was put into the network, such as MoLE, keeps its values: a model's own files do not have it.
        own_keys = self._plain().state_dict().keys()
        kept = {key: value for key, value in model.state_dict().items() if key not in own_keys}
        state = kept | fit_positions(state, model.state_dict())
        fill_module(model, state, owner=self.owner, path=path)
        return tuple(sorted(report["missing_keys"]))

    def _plain(self) -> nn.Module:
        """Return the network as the library builds it, on ``meta``."""
        with torch.device("meta"):
            return self._built(copy.deepcopy(self.config))

    def _key_mapping(self, path: Path) -> dict[str, str] | None:
        """Return the :func:`~visexpert.networks.towers.key_mapping` for a file or an index of files."""
        keys = weight_names(path, owner=self.owner)
        assert self.source is not None
        whole = str((self.source.read_json("config.json", owner=self.owner) or {}).get("model_type"))
        return key_mapping(keys, self._plain(), whole=whole, optional=UNUSED, whose=f"{self.owner}: {path}")


def weight_names(path: Path, *, owner: str) -> Collection[str]:
    """Return the names of the weights in a file, or in the files of an index."""
    if path.suffix == ".json":
        return read_object(path, error=WeightsError, owner=owner, step=FETCH_AGAIN).get("weight_map") or {}
    return state_keys(path) or ()


def _must_fit(mismatched: Collection[tuple[str, Any, Any]], path: Path, config: Path, owner: str) -> None:
    """Check that the weights have the shapes that their own ``config.json`` asks for."""
    if shapes := reshaped(mismatched):
        raise WeightsError(
            f"{owner}: {told(weight_names(path, owner=owner), path)}, and do not fit {config}: {', '.join(shapes)}; "
            "take both files from the same model."
        )


def config_of(fields: Mapping[str, Any], *, owner: str, strict: bool = False) -> PreTrainedConfig:
    """Return a configuration of transformers, or that of the vision part if the model has others.

    Args:
        fields: Fields as in ``config.json``.
        owner: Name of the caller, for messages.
        strict: Whether to refuse fields that the configuration does not have, such as misspelled ones.

    Raises:
        ConfigError: The ``model_type`` or a field is unknown.
    """
    if "model_type" not in fields and "architecture" in fields:  # as timm writes it
        raise ConfigError(
            f"{owner}: {fields['architecture']!r} is a model of timm; use class_path: visexpert.experts.TimmExpert."
        )
    if not fields.get("model_type") and "auto_map" not in fields:
        raise ConfigError(
            f"{owner}: the configuration has no model_type, only {sorted(fields)[:5]}; add one, such as model_type: "
            "vit, or take the config.json that belongs to the weights."
        )
    kind = str(fields.get("model_type"))
    if kind not in CONFIG_MAPPING and "auto_map" in fields:
        raise ConfigError(
            f"{owner}: the code of model_type {kind!r} comes with the model (auto_map), not with transformers, and is "
            "never run here; use a conversion to transformers' format, or write an expert (docs/own-expert.md)."
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
"""What a model does whose ``forward`` takes this argument and no pixels."""


def _must_read_images(config: PreTrainedConfig, owner: str) -> None:
    """Check that a model does not read text or sound; otherwise the error would be about its image processor."""
    network: Any = MODEL_MAPPING.get(type(config), None)
    kinds = network if isinstance(network, tuple | list) else () if network is None else (network,)
    for kind in kinds:
        taken = inspect.signature(kind.forward).parameters
        instead = next((what for name, what in _READ_INSTEAD.items() if name in taken), None)
        if instead is not None and not any(name.startswith("pixel_values") for name in taken):
            raise ConfigError(
                f"{owner}: model_type {config.model_type!r} {instead} ({kind.__name__}), but experts read images; use "
                "an image encoder (docs/families.md lists some)."
            )


def _known_fields(fields: Mapping[str, Any], config: PreTrainedConfig, owner: str) -> None:
    known = {*type(config)().to_dict(), *config.attribute_map, "model_type", "num_labels", "architectures"}
    for name, value in fields.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it."
            raise ConfigError(f"{owner}: {type(config).__name__} has no field {name!r}; {hint}")
        nested = getattr(config, name, None)
        if isinstance(value, Mapping) and isinstance(nested, PreTrainedConfig):
            _known_fields(value, nested, owner)


def _must_agree(written: Mapping[str, Any], given: Any, own: Any, whose: str) -> None:
    """Check settings against the model's own; weights load without an error if heads or activations differ."""
    written = vision_part(written)
    for name in written:
        ours, theirs = getattr(given, name, None), getattr(own, name, None)
        if isinstance(ours, PreTrainedConfig):
            _must_agree(written[name], ours, theirs, whose)
        elif ours != theirs:
            raise ConfigError(f"{whose} were made with {name}={theirs!r}, not {ours!r}; correct or remove it.")


def own_interpolation(model: nn.Module) -> bool:
    """Return whether the model's own code fits its position embeddings to the size of an image."""
    return any(
        any(hasattr(part, name) for name in INTERPOLATING) or type(part).__name__.startswith("Interpolate")
        for part in model.modules()
    )


def interpolates(model: nn.Module) -> bool:
    """Return whether the model interpolates its position embeddings only if asked to."""
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def takes_patches(model: nn.Module) -> bool:
    """Return whether the model reads patches instead of images (SigLIP 2's NaFlex, for images of any shape)."""
    return "spatial_shapes" in inspect.signature(model.forward).parameters


def patches_of(pixels_BCHW: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    """Cut square images into patches as the model's own image processor does, without padding.

    Returns:
        ``pixel_values`` (B, N, patch x patch x 3), row-major with the channels last, and the grid of each image.
    """
    config: Any = model.config
    patch = int(config.patch_size)
    shape = [side // patch for side in pixels_BCHW.shape[-2:]]
    return {
        "pixel_values": cut(pixels_BCHW, patch),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor([shape] * len(pixels_BCHW), device="cpu"),  # its values are read, even on meta
    }


def cut(pixels_BCHW: Tensor, patch: int) -> Tensor:
    """Cut images into flat patches (B, N, patch x patch x 3), row-major with the channels last."""
    cells = pixels_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, patch, w, patch)
    flat_BNF: Tensor = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return flat_BNF


def prefix_and_suffix(model: nn.Module, image_size: int, count: int) -> tuple[int | None, int]:
    """Return how many of ``count`` tokens come before and after the patch grid that the configuration describes.

    Returns:
        The first is None if the configuration describes another grid (the last stage of a pyramid is smaller).
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
    """Silence transformers' report about the weights that are left out, such as those of a text tower."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class ChunkedSamAttention(SamVisionSdpaAttention):
    """Attention with the output of transformers' class, computed for a few rows of queries at a time.

    SAM adds a bias q . (R_h[row distance] + R_w[column distance]) to each logit (MViTv2, arXiv 2112.01526). It depends
    on the query, so fused attention takes it as a mask, which the library builds for all S x S pairs: 4096 x 4096 per
    head at 1024 px. Here the mask is built for a few rows of queries at a time. This saves memory in inference only:
    with gradients, autograd keeps the masks of all rows.
    """

    def forward(  # type: ignore[override]  # the library annotates less than it returns
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, None]:
        """Attend within maps (B, h, w, D); attention weights are never returned."""
        batch, height, width, _ = hidden_states.shape
        heads = self.num_attention_heads
        qkv = self.qkv(hidden_states).reshape(batch, height * width, 3, heads, -1)
        query_BHSd, key_BHSd, value_BHSd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        tables = self._tables(height, width, query_BHSd.dtype)
        rows = max(1, SAM_QUERIES // width)
        chunks = [
            F.scaled_dot_product_attention(chunk, key_BHSd, value_BHSd, attn_mask=_bias(chunk, first, width, tables))
            for first, chunk in zip(range(0, height, rows), query_BHSd.split(rows * width, dim=2), strict=True)
        ]
        attended = torch.cat(chunks, dim=2).transpose(1, 2).reshape(batch, height, width, -1)
        return self.proj(attended), None

    def _tables(self, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return R_h (h, h, d) and R_w (w, w, d), by query and key."""
        if not self.use_rel_pos:
            return None
        by_row = self.get_rel_pos(height, height, self.rel_pos_h)
        by_column = self.get_rel_pos(width, width, self.rel_pos_w)
        return by_row.to(dtype), by_column.to(dtype)


def _bias(query_BHQd: Tensor, first: int, width: int, tables: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Return the bias (B, heads, Q, S) for whole rows of queries, starting at row ``first``."""
    if tables is None:
        return None
    by_row, by_column = tables
    query = query_BHQd.unflatten(2, (-1, width))
    rel_h = torch.einsum("bnrwd,rkd->bnrwk", query, by_row[first : first + query.shape[2]])
    rel_w = torch.einsum("bnrwd,wkd->bnrwk", query, by_column)
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(4).flatten(2, 3)


def chunk_attention(model: nn.Module) -> None:
    """Chunk the attention of all global blocks of every ``SamVisionModel`` in a model; weights and names stay.

    Windowed blocks have only 14 x 14 tokens each and stay as they are.
    """
    for layer in model.modules():
        attention = getattr(layer, "attn", None)
        if type(attention) is SamVisionSdpaAttention and getattr(layer, "window_size", 0) == 0:
            attention.__class__ = ChunkedSamAttention

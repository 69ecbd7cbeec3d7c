"""CLIP's vision encoder, the one that knowledge goes into."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from visexpert.errors import ConfigError, WeightsError
from visexpert.resources import ZOO_PREFIX, fill_module, load_safetensors, resolve_source, weights_digest
from visexpert.types import VisionTokens
from visexpert.vision.mole_settings import MoLESettings

MOLE_KEY = re.compile(r"\.mlp\.(router|fc1_experts|fc2_experts)\.")
"""Keys of a state dict that :func:`visexpert.vision.add_mole` adds to those of CLIP."""

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder(nn.Module):
    """Hugging Face's ``CLIPVisionModel`` behind named tokens, resizing and normalising on the device.

    The network is built at once from ``config.json`` (or ``config``) with random weights; :meth:`load_weights` fills
    it. Layers after the one that is read are not run.

    Args:
        source: Folder in ``save_pretrained`` form (``config.json``, ``model.safetensors``, optionally
            ``preprocessor_config.json``), or ``zoo:NAME`` for a shipped one.
        layer: Which hidden state to hand on: -1 the last, -2 the one before (LLaVA's and MoVE-KD's choice), ...
            No final LayerNorm is applied, as in LLaVA.
        config: Fields of ``CLIPVisionConfig`` for a random encoder without weights; excludes ``source``.
        licence: Licence of the weights, for the reports of exports; null is that of the package for ``zoo:`` sources.
        mole: Put a mixture of low-rank experts into its MLPs (MoVE-KD's student); null for a plain CLIP.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        source: str | None = None,
        layer: int = -2,
        config: dict[str, Any] | None = None,
        licence: str | None = None,
        mole: MoLESettings | None = None,
    ) -> None:
        super().__init__()
        self._given = {"source": source, "layer": layer, "config": config, "licence": licence}
        shipped = source is not None and source.startswith(ZOO_PREFIX)
        self.licence = licence or ("Apache-2.0" if shipped else "not stated")
        if (source is None) == (config is None):
            raise ConfigError("ClipEncoder takes either source (a folder or zoo:NAME) or config (a random encoder).")
        self.source = None if source is None else resolve_source(source)
        settings = _known_fields(config) if config is not None else read_json(self.source, "config.json")
        clip_config = CLIPVisionConfig(**_vision_fields(settings))
        for side in (clip_config.image_size, clip_config.patch_size):
            _side(side)
        clip_config._attn_implementation = "sdpa"
        self.model = CLIPVisionModel(clip_config)
        depth = clip_config.num_hidden_layers
        if not -depth - 1 <= layer <= -1:
            raise ConfigError(f"ClipEncoder: layer={layer} is outside -{depth + 1}..-1 of a CLIP with {depth} layers.")
        self.layer = layer
        if mole is not None:
            from visexpert.vision.mole import add_mole  # which knows CLIP

            add_mole(self, **vars(mole))
        mean, std = self._normalisation()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def config(self) -> CLIPVisionConfig:
        """The Hugging Face configuration."""
        return self.model.config

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return _side(self.config.image_size)

    @property
    def width(self) -> int:
        """Token width D."""
        return int(self.config.hidden_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Grid of the patch tokens, height x width = T."""
        side = self.image_size // _side(self.config.patch_size)
        return side, side

    def load_weights(self) -> None:
        """Read ``model.safetensors`` of the source; a random encoder (``config=...``) keeps its weights.

        Raises:
            WeightsError: The file is missing or does not fit.
        """
        if self.source is None:
            return
        path = self.source / "model.safetensors"
        state = load_safetensors(path, owner="ClipEncoder")
        # Files written before transformers 5 carry a `vision_model.` prefix.
        state = {key.removeprefix("vision_model."): value for key, value in state.items()}
        # What MoLE has added keeps its start: no file of CLIP's own has it.
        state = {key: value for key, value in self.model.state_dict().items() if MOLE_KEY.search(key)} | state
        fill_module(self.model, state, owner="ClipEncoder", path=path)

    def read_modules(self) -> tuple[nn.Module, ...]:
        """Parts that the tokens depend on; those behind the layer that is read get no gradient from them."""
        layers = self.model.encoder.layers
        return self.model.embeddings, self.model.pre_layrnorm, *layers[: len(layers) + 1 + self.layer]

    def mole_layers(self) -> tuple[nn.Module, ...]:
        """The MLPs that have MoLE, in the order of the blocks."""
        mlps = [block.get_submodule("mlp") for block in self.model.encoder.layers]
        return tuple(mlp for mlp in mlps if hasattr(mlp, "added_modules"))

    def plain_modules(self) -> tuple[nn.Module, ...]:
        """Parts of CLIP itself that the tokens depend on, without what MoLE has added."""
        embeddings, norm, *blocks = self.read_modules()
        inner = [child for block in blocks for name, child in block.named_children() if name != "mlp"]
        for block in blocks:
            inner += [block.mlp.fc1, block.mlp.fc2]  # type: ignore[union-attr, list-item]
        return embeddings, norm, *inner

    def plain_copy(self) -> ClipEncoder:
        """The same CLIP without MoLE, with the same weights."""
        copy = ClipEncoder(**self._given)  # type: ignore[arg-type]
        own = self.model.state_dict()
        copy.model.load_state_dict({key: value for key, value in own.items() if not MOLE_KEY.search(key)}, strict=True)
        return copy

    def fingerprint(self) -> str:
        """Hash of weights, layer, heads, activation and input: what the tokens depend on besides the image."""
        config = self.config
        facts = [self.layer, self.image_size, config.num_attention_heads, config.hidden_act, config.layer_norm_eps]
        facts += [self.mean.flatten().tolist(), self.std.flatten().tolist()]
        return weights_digest(self.model, facts=json.dumps(facts))

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Resize (bicubic, antialiased, as CLIP's processor) and normalise images (B, 3, H, W) in [0, 1]."""
        size = (self.image_size, self.image_size)
        if images_BCHW.shape[-2:] != size:
            images_BCHW = F.interpolate(images_BCHW, size=size, mode="bicubic", antialias=True, align_corners=False)
            images_BCHW = images_BCHW.clamp(0.0, 1.0)
        return (images_BCHW - self.mean) / self.std

    def forward(self, images_BCHW: Tensor) -> VisionTokens:
        """Encode images (B, 3, H, W), float in [0, 1], any size, into patch tokens (B, T, D) and [CLS] (B, D)."""
        hidden_BND = self.model.pre_layrnorm(self.model.embeddings(self.preprocess(images_BCHW)))
        for layer in self.read_modules()[2:]:
            hidden_BND = layer(hidden_BND, None)
        return VisionTokens(hidden_BND[:, 1:], self.grid_hw, cls_BD=hidden_BND[:, 0])

    def _normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        if self.source is None or not (self.source / "preprocessor_config.json").is_file():
            return OPENAI_MEAN, OPENAI_STD
        settings = read_json(self.source, "preprocessor_config.json")
        absent = [name for name in ("image_mean", "image_std") if name not in settings]
        if absent:
            raise WeightsError(
                f"ClipEncoder: {self.source / 'preprocessor_config.json'} lacks {absent}; give a folder written by "
                "save_pretrained, or delete that file for OpenAI's normalisation."
            )
        return settings["image_mean"], settings["image_std"]


def read_json(folder: Path | None, name: str) -> dict[str, Any]:
    """Read a JSON object from a model folder.

    Raises:
        WeightsError: The file is missing or no JSON object.
    """
    path = (folder or Path()) / name
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise WeightsError(
            f"ClipEncoder: cannot read {path} ({error}); give a folder written by save_pretrained, or zoo:clip."
        ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"ClipEncoder: {path} holds a {type(loaded).__name__}, a JSON object is needed.")
    return loaded


def _side(size: object) -> int:
    """A side that Hugging Face writes as a number, though its type admits pairs."""
    if not isinstance(size, int):
        raise ConfigError(f"ClipEncoder: a side of {size} is not supported; images and patches must be square.")
    return size


def _known_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a user wrote, refused where ``CLIPVisionConfig`` would take them and then not read them."""
    known = CLIPVisionConfig().to_dict()
    for name in config:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use fields of CLIPVisionConfig: {sorted(known)}."
            raise ConfigError(f"ClipEncoder: config has no field {name!r}; {hint}")
    return dict(config)


def _vision_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The vision part of a full CLIP config, or the config itself."""
    nested = settings.get("vision_config")
    return dict(nested) if isinstance(nested, Mapping) else dict(settings)

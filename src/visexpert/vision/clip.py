"""CLIP's vision encoder, which receives the experts' knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from visexpert.errors import ConfigError, require_channels, require_numbers
from visexpert.io.source import WEIGHT_FILES, ZOO_PREFIX
from visexpert.networks.alone import Alone, folder_of, of_open_clip, of_transformers
from visexpert.networks.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES, OPEN_CLIP_PREFIX
from visexpert.networks.positions import resize_positions
from visexpert.networks.preprocessing import Preprocessing
from visexpert.typed import typed
from visexpert.vision.anatomy import ClipAnatomy
from visexpert.vision.convert import open_clip_config, to_open_clip
from visexpert.vision.encoder import VisionEncoder
from visexpert.vision.mole import MoLESettings
from visexpert.vision.published import OWNER, describe_clip, vision_config
from visexpert.vision.saving import (
    TRANSFORMERS_USAGE,
    own_processor,
    processor_settings,
    save_tower,
    save_with_transformers,
)
from visexpert.vision.saving_open_clip import OPEN_CLIP_USAGE, preprocess_of, save_with_open_clip

POSITIONS = "embeddings.position_embedding.weight"


@typed
class ClipEncoder(VisionEncoder):
    """Hugging Face's ``CLIPVisionModel`` with named tokens; resizes and normalizes on the device.

    The network is built with random weights, without a download; :meth:`load_weights` fills it from safetensors or from
    torch files, without running code from them. open_clip weights are converted exactly when loaded
    (:mod:`visexpert.vision.convert`). Layers after the one in use are not run.

    Args:
        source: ``zoo:NAME`` for a shipped encoder; a folder (also ``local-dir:PATH``) or Hugging Face id (``ORG/NAME``,
            ``hf:ORG/NAME@REVISION``, also ``hf-hub:``) of transformers or open_clip, or of a LLaVA, whose vision tower
            is used; ``open_clip:NAME/TAG`` from open_clip's list, such as ``open_clip:ViT-L-14-336/openai``; or a file
            of weights of either library (or a training checkpoint), together with ``architecture`` or ``config``. Null
            for a random encoder.
        layer: Which hidden state to pass on: -1 the last, -2 the one before (LLaVA's and MoVE-KD's choice), ...
            No final LayerNorm is applied, as in LLaVA.
        config: Fields of ``CLIPVisionConfig``, for a random encoder or a source whose own configuration is not on this
            machine yet; if it is, both must agree.
        architecture: Name of an open_clip model instead of ``config``, such as ``ViT-L-14-336-quickgelu``.
        image_size: Side of the input in pixels; null for the source's own. For any other size, position embeddings are
            interpolated as in the source's own library (transformers: bicubic; open_clip: with antialias as well).
        license: License of the weights, for export reports; null means the package's own for ``zoo:`` sources.
        mole: Add a mixture of low-rank experts to its MLPs (MoVE-KD's student); null for a plain CLIP.
    """

    model: CLIPVisionModel
    usage = TRANSFORMERS_USAGE
    returns_embeddings = True

    def __init__(
        self,
        *,
        source: str | None = None,
        layer: int = -2,
        config: dict[str, Any] | None = None,
        architecture: str | None = None,
        image_size: int | None = None,
        license: str | None = None,
        mole: MoLESettings | None = None,
    ) -> None:
        require_numbers("ClipEncoder", least=1, image_size=image_size)
        given = {"source": source, "layer": layer, "config": config, "license": license}
        given |= {"architecture": architecture, "image_size": image_size}
        published = describe_clip(source, config=config, architecture=architecture)
        shipped = source is not None and source.startswith(ZOO_PREFIX)
        fields = {**published.fields, **({"image_size": image_size} if image_size else {})}
        clip_config = vision_config(fields)
        side, patch = (_side(value) for value in (clip_config.image_size, clip_config.patch_size))
        clip_config._attn_implementation = "sdpa"
        super().__init__(
            model=CLIPVisionModel(clip_config),
            anatomy=ClipAnatomy(),
            layer=layer,
            preprocessing=Preprocessing(side, published.mean, published.std, "bicubic"),
            patch_size=patch,
            source=source,
            license=license or ("Apache-2.0" if shipped else published.license()),
            given=given,
            mole=mole,
        )
        self.published = published
        if published.settings is not None:
            self.usage = OPEN_CLIP_USAGE
        self.resized = image_size is not None

    @property
    def config(self) -> CLIPVisionConfig:
        """The Hugging Face configuration."""
        return self.model.config

    @property
    def width(self) -> int:
        """Token width D."""
        return int(self.config.hidden_size)

    @property
    def activation(self) -> str | None:
        """See :meth:`VisionEncoder.activation`: ``quick_gelu`` or another."""
        return str(self.config.hidden_act)

    def formats(self) -> dict[str, str | None]:
        """See :meth:`VisionEncoder.formats`: all of them, but for ``native`` of a lone file."""
        found: dict[str, str | None] = {"hf": None, "native": None, "open_clip": None}
        if self.published.settings is None and self.published.source is not None and self.published.source.file:
            found["native"] = (
                f"keeps the text tower, and nothing describes that of the lone file {self.published.source.file.name}: "
                "give architecture in place of config, or a folder"
            )
        if self.layer < -self.depth:
            found["open_clip"] = f"returns no tokens before the first block (layer {self.layer})"
            found["native"] = found["open_clip"] if self.published.settings is not None else found["native"]
        return found | dict.fromkeys(("llava", "onnx", "torch_export", "visexpert"))

    def alone(self) -> Alone | str:
        """See :meth:`VisionEncoder.alone`: by transformers or open_clip, whose the files are."""
        files, architecture = self.published.source, self._given["architecture"]
        if files is None:
            return "random weights"
        if self.published.elsewhere is not None:
            return "weights in LLaVA's format, which no library here reads"
        size = self.image_size if self.resized else None
        if files.text.startswith(OPEN_CLIP_PREFIX):
            name, _, tag = files.text.removeprefix(OPEN_CLIP_PREFIX).partition("/")
            return of_open_clip(name, files.find(*OPEN_CLIP_FILES, *WEIGHT_FILES), size, tag=tag)
        if architecture is not None:
            return of_open_clip(architecture, files.file or files.find(*OPEN_CLIP_FILES, *WEIGHT_FILES), size)
        if files.find(OPEN_CLIP_CONFIG) is not None:
            return of_open_clip(f"local-dir:{folder_of(files, OPEN_CLIP_CONFIG)}", None, size)
        if files.find("config.json") is not None:
            return of_transformers(files)
        return "weights without a configuration, which no library reads"

    def load_weights(self) -> None:
        """Read the weights of the source; a random encoder (no source) keeps its own.

        Raises:
            WeightsError: They do not exist, or do not fit; the message says how to fetch them.
        """
        if self.source is None:
            return
        self.published = self.published.completed()
        require_channels("ClipEncoder", mean=self.published.mean, std=self.published.std)
        self.preprocessing = replace(self.preprocessing, mean=self.published.mean, std=self.published.std)
        self.mean.copy_(torch.tensor(self.published.mean).view(1, 3, 1, 1))
        self.std.copy_(torch.tensor(self.published.std).view(1, 3, 1, 1))
        found = self.published.load()
        projection_DP = found.projection_DP
        if projection_DP is not None:
            self.projection_PE = projection_DP.to(self.mean)
            if found.own_projection:
                self.projection_dim = self.config.projection_dim = int(projection_DP.shape[1])
        state = dict(found.tensors)
        if self.resized and POSITIONS in state:
            state[POSITIONS] = resize_positions(
                state[POSITIONS], to_hw=self.grid_hw, prefix=1, antialias=found.antialias
            )
        self.fill(state, path=found.path)

    def rebuilt(self) -> ClipEncoder:
        """See :meth:`VisionEncoder.rebuilt`; a copy of a tiled encoder reads whole images."""
        return ClipEncoder(**self._given)

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """See :meth:`VisionEncoder.save`: a folder of the source's library and class."""
        source = self.published.source
        weights = self.model.state_dict() if state is None else state
        if self.published.settings is not None:
            self._save_with_open_clip(weights, folder)
            return
        settings = processor_settings(
            own_processor(source, owner=OWNER),
            self.model,
            self.preprocessing,
            owner=OWNER,
        )
        save_with_transformers(self.model, weights, folder, source=source, processor=settings, owner=OWNER)

    def save_as(
        self, form: str, folder: Path, state: Mapping[str, Tensor], *, projection_dim: int | None = None
    ) -> None:
        """See :meth:`VisionEncoder.save_as`: the vision tower alone, as a ``CLIPVisionModel`` or for open_clip.

        open_clip's image embedding is then the pooled output: ``proj`` is the identity.
        """
        if form == "open_clip":
            dtype = next(value.dtype for value in state.values() if value.is_floating_point())
            save_with_open_clip(
                {key: value.to(dtype) for key, value in to_open_clip(state).items()},
                folder,
                whole={},
                source=None,
                settings={"embed_dim": self.width, **open_clip_config(self.config)},
                preprocess=preprocess_of(self.preprocessing),
            )
        else:
            save_tower(self.model, state, folder, preprocessing=self.preprocessing, projection_dim=projection_dim)

    def _save_with_open_clip(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        settings = dict(self.published.settings or {})
        settings["vision_cfg"] = {**settings["vision_cfg"], "image_size": self.image_size}
        settings["quick_gelu"] = self.config.hidden_act == "quick_gelu"
        whole = self.published.whole()
        visual = to_open_clip(weights)
        if "visual.proj" in whole:
            del visual["proj"]
        else:
            settings["embed_dim"] = self.width  # the embedding is the pooled output itself
        save_with_open_clip(
            visual,
            folder,
            whole=whole,
            source=self.published.source,
            settings=settings,
            preprocess=preprocess_of(self.preprocessing),
        )

    def plain_copy(self) -> ClipEncoder:
        """Return the same CLIP without MoLE, with the same weights."""
        copy = super().plain_copy()
        assert isinstance(copy, ClipEncoder)
        return copy

    def facts(self) -> Mapping[str, object]:
        """Return heads, activation and epsilon."""
        config = self.config
        return {"heads": config.num_attention_heads, "act": config.hidden_act, "eps": config.layer_norm_eps}


def _side(size: object) -> int:
    """Return a side length, which Hugging Face stores as a number though its type allows pairs."""
    if not isinstance(size, int):
        raise ConfigError(f"ClipEncoder: a side of {size} must be one number: images and patches must be square.")
    return size

"""Experts from transformers: its vision models, and the vision part of its whole models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from visexpert.errors import ConfigError
from visexpert.experts.base import TokenKind
from visexpert.experts.huggingface import HubModel, interpolates, patches_of, prefix_and_suffix, takes_patches
from visexpert.experts.maps import MapExpert, map_of
from visexpert.experts.preprocessing import Framing, Interpolation, must_agree, preprocessing_of


class HubExpert(MapExpert):
    """What experts from transformers share: a description before the weights, and transformers' own loader.

    Args:
        auto: Name of the ``AutoModel...`` class.
        wrap: Makes of its network one that maps (B, 3, H, W) to (B, E, h, w).
        source: Folder in ``save_pretrained`` form, or hub id such as ``facebook/dinov2-large``; null for a random
            network.
        config: ``model_type`` and other fields of ``config.json``, for a random network or for a source that is not on
            this machine yet; where it is, they must agree.
        processor: ``image_processor_type`` and other fields of ``preprocessor_config.json``, likewise. Mean, standard
            deviation, interpolation and framing are the file's own; a random network has 0.5, 0.5 and bilinear.
        image_size: Side of the input in pixels; null for that of the model's position embeddings, else of the
            processor. Position embeddings are interpolated.
        framing: What becomes of an image that is no square: ``squash`` (as CLIP here), ``crop``, ``pad``, or ``own``
            for the processor's own.
        interpolation: ``bilinear`` or ``bicubic``; null for the processor's own.
        license: License of the weights; null for what the model card says.
        facts: See :class:`~visexpert.experts.maps.MapExpert`.
        tokens: ``features`` or ``prediction``.
    """

    def __init__(
        self,
        *,
        auto: str,
        wrap: Callable[[nn.Module], nn.Module],
        source: str | None = None,
        config: dict[str, Any] | None = None,
        processor: dict[str, Any] | None = None,
        image_size: int | None = None,
        framing: Framing = "squash",
        interpolation: Interpolation | None = None,
        license: str | None = None,
        facts: Mapping[str, object],
        tokens: TokenKind = "features",
    ) -> None:
        owner = type(self).__name__
        described = HubModel.describe(owner=owner, auto=auto, source=source, config=config)
        size = image_size or described.native_size
        preprocessing = preprocessing_of(
            owner=owner, source=described.source, processor=processor, size=size, interpolation=interpolation
        ).adapted(owner=owner, image_size=image_size, framing=framing, interpolation=interpolation)
        model = described.build(preprocessing.image_size)
        super().__init__(
            network=wrap(model),
            preprocessing=preprocessing,
            facts={**facts, "model": described.config.model_type},
            tokens=tokens,
            license=license or (described.source.license() if described.source else None),
        )
        self.described = described
        self.processor = processor

    @property
    def weights_from(self) -> str | None:
        """See :attr:`VisionExpert.weights_from`."""
        return None if self.described.source is None else self.described.source.text

    def load_weights(self) -> None:
        """Read the weights from the folder, the hub's cache or the hub; a random network keeps its own.

        Raises:
            WeightsError: They are nowhere, or do not fit; the message says what fetches them.
            ConfigError: The model's own configuration differs from the one that was given.
        """
        model = self.network.model
        assert isinstance(model, nn.Module)
        self.described.load(model)
        if self.described.source is not None and self.processor is not None:
            must_agree(self.described.source, self.processor, owner=type(self).__name__)


class TransformersExpert(HubExpert):
    """Tokens of any vision encoder of transformers; of a whole model, of its vision part.

    CLIP and its kin (MetaCLIP 2, AltCLIP, Chinese-CLIP, CLIPSeg), SigLIP, AIMv2, BLIP, OWL-ViT, FLAVA, Florence-2,
    SAM, SAM 2, and the tower inside LLaVA, InternVL or PaliGemma are read from the folder of the whole model. Models
    of videos, of images cut into patches beforehand (Qwen2-VL), or with code of their own are refused.

    Args:
        layer: Null for the last features as the model gives them, final norm (or SAM's neck) included; else one of
            ``hidden_states``, -1 for that of the last block.
        kwargs: See :class:`HubExpert`.
    """

    def __init__(self, *, layer: int | None = None, **kwargs: Any) -> None:
        super().__init__(
            auto="AutoModel", wrap=lambda model: EncoderMap(model, layer=layer), facts={"layer": layer}, **kwargs
        )


class EncoderMap(nn.Module):
    """An encoder of transformers as (B, 3, H, W) -> (B, E, h, w).

    Args:
        model: The model.
        layer: Which of ``hidden_states``; None for the last features.
        headed: The model has a head; only what makes its features is run.
    """

    def __init__(self, model: nn.Module, *, layer: int | None = None, headed: bool = False) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.headed = headed

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Feature map of the last or the chosen layer."""
        encoder = _without_head(self.model) if self.headed else self.model
        if frames := _frames(encoder.config):
            raise ValueError(f"it reads videos of {frames} frames")
        if not takes_patches(encoder) and (others := _other_inputs(encoder)):
            raise ValueError(f"it reads no plain images: it needs {' and '.join(others)} beside pixels")
        size = int(pixels_BCHW.shape[-1])
        asked = {"interpolate_pos_encoding": True} if interpolates(encoder) else {}
        unrolled = hasattr(encoder, "unroll_schedule")
        states = {"output_hidden_states": True} if unrolled or self.layer is not None else {}
        if takes_patches(encoder):
            output = encoder(**patches_of(pixels_BCHW, encoder), **states)
        else:
            output = encoder(pixels_BCHW, **asked, **states)
        features = _features(output, self.layer, unrolled=unrolled)
        if hasattr(encoder.config, "num_group_tokens"):
            raise ValueError("its tokens are groups of patches, which have no place")
        prefix, suffix = prefix_and_suffix(encoder, size, int(features.shape[1]) if features.ndim == 3 else 0)
        return map_of(features, prefix=prefix, suffix=suffix)


def _features(output: Any, layer: int | None, *, unrolled: bool) -> Tensor:
    """What a model calls its last features, or one of its hidden states.

    Args:
        output: Of the model.
        layer: Which of its hidden states; None for the last features.
        unrolled: Its tokens are sorted by window (Hiera); ``reshaped_hidden_states`` has them by rows.

    Raises:
        ValueError: Nothing in the output has one of the names that transformers gives to features.
    """
    named = output if isinstance(output, ModelOutput) else {}
    found: Any
    if unrolled:
        found = _at(output.reshaped_hidden_states, -1 if layer is None else layer).flatten(1, 2)  # of (B, h, w, E)
    elif layer is not None:
        states = named.get("hidden_states")
        found = None if states is None else _at(states, layer)
    else:
        maps = named.get("feature_maps")  # of a backbone
        names = ("last_hidden_state", "encoder_last_hidden_state")
        found = maps[-1] if maps else next((named[name] for name in names if named.get(name) is not None), None)
    if not isinstance(found, Tensor):
        raise ValueError(f"it hands on {list(named) or type(output).__name__}, and no features of patches among them")
    return found


def _at(states: Sequence[Tensor], layer: int) -> Tensor:
    """Return one of the hidden states.

    Raises:
        ConfigError: There is none of this index.
    """
    if not -len(states) <= layer < len(states):
        raise ConfigError(
            f"layer {layer} is none of the model's hidden states; give one from {-len(states)} to {len(states) - 1} "
            "(-1 for the last block), or leave it out for the last features."
        )
    return states[layer]


def _other_inputs(model: nn.Module) -> list[str]:
    """Names of what a model needs beside pixels, such as the grid of patches that were cut beforehand (Qwen2-VL)."""
    taken = list(inspect.signature(model.forward).parameters.values())[1:]
    named = (each for each in taken if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD))
    return [each.name for each in named if each.default is each.empty]


def _frames(config: Any) -> int:
    """Of how many frames the videos are that a model reads; 0 for one that reads images."""
    counts = (getattr(config, name, None) for name in ("num_frames", "frames_per_clip"))
    return next((count for count in counts if isinstance(count, int) and count > 1), 0)


def _without_head(model: nn.Module) -> nn.Module:
    """The part of a model with a head that makes its features."""
    backbone = getattr(model, "backbone", None)
    base = getattr(model, "base_model", model)
    assert isinstance(base, nn.Module)
    return backbone if isinstance(backbone, nn.Module) else base

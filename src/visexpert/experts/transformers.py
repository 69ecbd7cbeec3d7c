"""Experts from transformers: its vision models, and the vision part of its multimodal models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts.base import TokenKind
from visexpert.experts.maps import MapExpert, SummarizedMap, map_of
from visexpert.networks.huggingface import DescribedModel, interpolates, patches_of, prefix_and_suffix, takes_patches
from visexpert.networks.preprocessing import Framing, Interpolation, must_agree, preprocessing_of
from visexpert.typed import typed
from visexpert.vision.anatomy import OF_TRANSFORMERS


class AutoModelExpert(MapExpert):
    """Base of experts from transformers: built from a description, then loaded with transformers' own loader.

    Args:
        auto: Name of the ``AutoModel...`` class.
        wrap: Turns the network into one that maps (B, 3, H, W) to (B, E, h, w).
        source: Folder written by ``save_pretrained``, or Hugging Face id such as ``facebook/dinov2-large``; null for a
            random network.
        config: ``model_type`` and other fields of ``config.json``, for a random network or for a source that is not on
            this machine yet. If the file is there, it must have the same values.
        processor: ``image_processor_type`` and other fields of ``preprocessor_config.json``, under the same rule. Mean,
            standard deviation, interpolation and framing come from the file; a random network uses 0.5, 0.5, bilinear.
        image_size: Side of the input in pixels; null for that of the model's position embeddings, or of the processor
            if it has none. Position embeddings are interpolated.
        framing: What to do with images that are not square: ``squash`` (as CLIP does here), ``crop``, ``pad``, or
            ``own`` for the processor's way.
        interpolation: ``bilinear`` or ``bicubic``; null for the processor's own.
        license: License of the weights; null for the one in the model card.
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
        described = DescribedModel.describe(owner=owner, auto=auto, source=source, config=config)
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
        """Read the weights from the folder, or from the Hugging Face Hub or its cache; a random network keeps its own.

        Raises:
            WeightsError: They are missing, or do not fit; the message says how to fetch them.
            ConfigError: The model's own configuration differs from the given one.
        """
        model = self.network.model
        assert isinstance(model, nn.Module)
        absent = self.described.load(model)
        if absent and self.summarizes:
            raise WeightsError(
                f"{type(self).__name__}: the weights of '{self.weights_from}' lack {list(absent[:2])}, which its "
                "summary needs; set agglomeration.summary to 0, or fetch weights that have them."
            )
        if self.described.source is not None and self.processor is not None:
            must_agree(self.described.source, self.processor, owner=type(self).__name__)


@typed
class TransformersExpert(AutoModelExpert):
    """Tokens of any vision encoder in transformers, or of the vision part of a multimodal model.

    The vision parts of CLIP and its variants (MetaCLIP 2, AltCLIP, Chinese-CLIP, CLIPSeg), SigLIP, AIMv2, BLIP,
    OWL-ViT, FLAVA, Florence-2, SAM, SAM 2, LLaVA, InternVL and PaliGemma are read from the folder of the whole model.
    Models that read videos or images already cut into patches (Qwen2-VL), or bring their own code, are refused. The
    pooled output of CLIP, SigLIP, SigLIP 2, DINOv2 and DINOv3 is their summary; others give none, since a pooled output
    may be a mean of patch tokens, or come from a head without weights.

    Args:
        layer: Index into ``hidden_states``, -1 for the last block; null for the model's last features, after the final
            norm (or SAM's neck).
        kwargs: See :class:`AutoModelExpert`.
    """

    def __init__(self, *, layer: int | None = None, **kwargs: Any) -> None:
        super().__init__(
            auto="AutoModel", wrap=lambda model: EncoderMap(model, layer=layer), facts={"layer": layer}, **kwargs
        )


class EncoderMap(SummarizedMap):
    """Map pixels (B, 3, H, W) to features (B, E, h, w) with an encoder from transformers.

    Args:
        model: Model from transformers.
        layer: Index into ``hidden_states``; None for the last features.
        headed: Whether the model has a head; only the part before it is run.
    """

    def __init__(self, model: nn.Module, *, layer: int | None = None, headed: bool = False) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.headed = headed

    def read(self, pixels_BCHW: Tensor, *, summarize: bool) -> tuple[Tensor, Tensor | None]:
        """Return the feature map of the last or the chosen layer, and the pooled output."""
        encoder = _without_head(self.model) if self.headed else self.model
        if frames := _frames(encoder.config):
            raise ValueError(f"it reads videos of {frames} frames")
        if not takes_patches(encoder) and (others := _other_inputs(encoder)):
            raise ValueError(f"it does not read plain images: besides pixels it needs {' and '.join(others)}")
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
            raise ValueError("its tokens are groups of patches, which have no position")
        prefix, suffix = prefix_and_suffix(encoder, size, int(features.shape[1]) if features.ndim == 3 else 0)
        pooled = getattr(output, "pooler_output", None) if type(encoder).__name__ in OF_TRANSFORMERS else None
        return map_of(features, prefix=prefix, suffix=suffix), pooled


def _features(output: Any, layer: int | None, *, unrolled: bool) -> Tensor:
    """Return a model's last features, or one of its hidden states.

    Args:
        output: Output of the model.
        layer: Index into its hidden states; None for the last features.
        unrolled: Whether its tokens are sorted by window (Hiera); ``reshaped_hidden_states`` has them row by row.

    Raises:
        ValueError: Nothing in the output has a name that transformers gives to features.
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
        raise ValueError(f"its output, {list(named) or type(output).__name__}, has no features of patches")
    return found


def _at(states: Sequence[Tensor], layer: int) -> Tensor:
    """Return one of the hidden states.

    Raises:
        ConfigError: The index is out of range.
    """
    if not -len(states) <= layer < len(states):
        raise ConfigError(
            f"layer must be from {-len(states)} to {len(states) - 1}, got {layer}; -1 is the last block, and without "
            "layer you get the last features."
        )
    return states[layer]


def _other_inputs(model: nn.Module) -> list[str]:
    """Return the names of inputs that a model needs besides pixels, such as the grid of patches (Qwen2-VL)."""
    taken = list(inspect.signature(model.forward).parameters.values())[1:]
    named = (each for each in taken if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD))
    return [each.name for each in named if each.default is each.empty]


def _frames(config: Any) -> int:
    """Return how many frames a model reads; 0 if it reads images."""
    counts = (getattr(config, name, None) for name in ("num_frames", "frames_per_clip"))
    return next((count for count in counts if isinstance(count, int) and count > 1), 0)


def _without_head(model: nn.Module) -> nn.Module:
    """Return the part of a model that comes before its head."""
    backbone = getattr(model, "backbone", None)
    base = getattr(model, "base_model", model)
    assert isinstance(base, nn.Module)
    return backbone if isinstance(backbone, nn.Module) else base

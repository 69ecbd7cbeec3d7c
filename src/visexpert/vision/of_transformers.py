"""Encoders from transformers: CLIP, SigLIP, SigLIP 2, DINOv2 and DINOv3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from visexpert.errors import ConfigError, WeightsError, require_numbers
from visexpert.io.source import ModelSource
from visexpert.networks.alone import Alone, of_transformers
from visexpert.networks.huggingface import DescribedModel
from visexpert.networks.preprocessing import Interpolation, must_agree, preprocessing_of
from visexpert.typed import typed
from visexpert.vision.anatomy import OF_TRANSFORMERS
from visexpert.vision.encoder import VisionEncoder
from visexpert.vision.families import check_reader
from visexpert.vision.mole import MoLESettings
from visexpert.vision.saving import (
    TRANSFORMERS_USAGE,
    own_processor,
    processor_settings,
    save_with_transformers,
)

OWNER = "TransformersEncoder"

IN_LLAVA = ("CLIPVisionModel", "SiglipVisionModel")
"""Towers of transformers' LLaVA that its forward is held to here."""


@typed
class TransformersEncoder(VisionEncoder):
    """A vision transformer of transformers, as the encoder to train; its own keys and shapes stay.

    ``CLIPVisionModel``, ``SiglipVisionModel``, ``Siglip2VisionModel`` (square images), ``Dinov2Model``, with registers
    too, and ``DINOv3ViTModel``, also as the vision part of a whole model's folder. For a CLIP,
    :class:`~visexpert.vision.ClipEncoder` also reads open_clip's and LLaVA's files.

    Args:
        source: Folder written by ``save_pretrained``, or Hugging Face id such as ``google/siglip2-base-patch16-224``;
            null for a random encoder.
        layer: Which hidden state to pass on: -1 the last, -2 the one before, ... No final norm is applied.
        config: ``model_type`` and other fields of ``config.json``, for a random encoder or for a source that is not on
            this machine yet. If the file is there, it must have the same values.
        processor: ``image_processor_type`` and other fields of ``preprocessor_config.json``, under the same rule.
        image_size: Side of the input in pixels; null for the model's own. Position embeddings are interpolated as the
            model's own code does.
        interpolation: ``bilinear`` or ``bicubic``; null for the processor's own.
        license: License of the weights; null for the one in the model card.
        mole: Add a mixture of low-rank experts to its MLPs; null for the plain network.

    Raises:
        ConfigError: A family that cannot be taught here, or settings that do not fit.
        WeightsError: ``config.json`` is missing, and no configuration is given.
    """

    model: PreTrainedModel
    usage = TRANSFORMERS_USAGE
    returns_embeddings = True

    def __init__(
        self,
        *,
        source: str | None = None,
        layer: int = -2,
        config: dict[str, Any] | None = None,
        processor: dict[str, Any] | None = None,
        image_size: int | None = None,
        interpolation: Interpolation | None = None,
        license: str | None = None,
        mole: MoLESettings | None = None,
    ) -> None:
        require_numbers(OWNER, least=1, image_size=image_size)
        given = {"source": source, "layer": layer, "config": config, "processor": processor, "license": license}
        given |= {"image_size": image_size, "interpolation": interpolation}
        if source is not None:
            check_reader(ModelSource.parse(source), owner=OWNER)
        described = DescribedModel.describe(owner=OWNER, auto="AutoModel", source=source, config=config)
        preprocessing = preprocessing_of(
            owner=OWNER,
            source=described.source,
            processor=processor,
            size=image_size or described.native_size,
            interpolation=interpolation,
        ).adapted(owner=OWNER, image_size=image_size, framing="squash", interpolation=interpolation)
        model = described.build(preprocessing.image_size)
        anatomy = OF_TRANSFORMERS.get(type(model).__name__)
        if anatomy is None:
            raise ConfigError(
                f"{OWNER}: {type(model).__name__} (model_type {described.config.model_type!r}) cannot be taught here; "
                f"use one of {', '.join(OF_TRANSFORMERS)}, a ViT of timm (TimmEncoder), or add its family "
                "(docs/encoders.md); as a teacher it can be a TransformersExpert."
            )
        assert isinstance(model, PreTrainedModel)
        model.set_attn_implementation("sdpa")
        super().__init__(
            model=model,
            anatomy=anatomy,
            layer=layer,
            preprocessing=preprocessing,
            patch_size=int(model.config.patch_size),
            source=source,
            license=license or (described.source.license() if described.source else None),
            given=given,
            mole=mole,
        )
        self.described, self.processor = described, processor

    @property
    def width(self) -> int:
        """Token width D."""
        return int(self.model.config.hidden_size)

    def alone(self) -> Alone | str:
        """See :meth:`VisionEncoder.alone`."""
        source = self.described.source
        return super().alone() if source is None else of_transformers(source)

    def load_weights(self) -> None:
        """Read the weights of the source with transformers' own loader; a random encoder keeps its own.

        Raises:
            WeightsError: They do not exist, or do not fit; the message says how to fetch them.
            ConfigError: The model's own configuration differs from the given one.
        """
        absent = self.described.load(self.model)
        if absent:
            raise WeightsError(
                f"{OWNER}: the weights of '{self.source}' lack the pooling head ({', '.join(absent[:2])}, ...), which "
                "would stay random; set vision_use_head: false in its config.json, or fetch weights with the head."
            )
        if self.described.source is not None and self.processor is not None:
            must_agree(self.described.source, self.processor, owner=OWNER)

    def facts(self) -> Mapping[str, object]:
        """Return the configuration, without what only names it."""
        fields = self.model.config.to_dict()
        unread = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
        return {
            "config": {name: value for name, value in fields.items() if name not in unread},
        }

    def formats(self) -> dict[str, str | None]:
        """See :meth:`VisionEncoder.formats`."""
        return super().formats() | {"native": None, "hf": None, "llava": self._not_in_llava()}

    def _not_in_llava(self) -> str | None:
        """Return why LLaVA has no place for the network; None if it has."""
        kind, own = type(self.model).__name__, getattr(self.model.config, "image_size", None)
        if kind not in IN_LLAVA:
            return f"holds a {' or '.join(IN_LLAVA)}, not a {kind}"
        if own != self.image_size:
            return f"reads images as its tower's positions are for, {own} px, not image_size={self.image_size}"
        return None

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """See :meth:`VisionEncoder.save`: a folder of the source's class, image processor and tokenizer with it."""
        source = self.described.source
        settings = processor_settings(
            self.processor or own_processor(source, owner=OWNER),
            self.model,
            self.preprocessing,
            owner=OWNER,
        )
        weights = self.model.state_dict() if state is None else state
        save_with_transformers(self.model, weights, folder, source=source, processor=settings, owner=OWNER)

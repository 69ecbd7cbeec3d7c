"""Encoders from timm: ViT, DeiT, SigLIP, DINO, BEiT, EVA and others of its vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visexpert.errors import ConfigError, require_numbers
from visexpert.io.source import ModelSource
from visexpert.io.weights import read_source
from visexpert.networks.alone import Alone, of_timm
from visexpert.networks.preprocessing import Interpolation
from visexpert.networks.timm import DescribedTimm
from visexpert.typed import typed
from visexpert.vision.anatomy import OF_TIMM, Anatomy
from visexpert.vision.encoder import VisionEncoder
from visexpert.vision.families import check_keys_for, check_reader
from visexpert.vision.mole import MoLESettings
from visexpert.vision.saving import save_with_timm

OWNER = "TimmEncoder"


@typed
class TimmEncoder(VisionEncoder):
    """A vision transformer of timm, as the encoder to train; its own keys, shapes and head stay.

    Args:
        source: Folder in timm's format (``config.json`` and weights, as on the Hugging Face Hub), a file of weights
            together with ``model``, or a Hugging Face id such as ``timm/vit_base_patch16_siglip_224.v2_webli``; null
            for ``model`` with random weights.
        model: Name with its tag, such as ``vit_base_patch16_224.augreg_in21k``, for a random encoder, a lone file or a
            source that is not on this machine yet.
        layer: Which hidden state to pass on: -1 the last block's, -2 the one before, ... No final norm is applied.
        image_size: Side of the input in pixels; null for the model's own. Position embeddings are interpolated by
            timm.
        interpolation: ``bilinear`` or ``bicubic``; null for the model's own.
        license: License of the weights; null for the one that timm or the model card states.
        arguments: Further arguments of the timm model, such as ``{init_values: 1.0e-5}``.
        mole: Add a mixture of low-rank experts to its MLPs; null for the plain network.

    Raises:
        ConfigError: A model that cannot be taught here, such as a ConvNet, or settings that do not fit.
        WeightsError: ``config.json`` is missing, and no model is given.
    """

    usage = """\
import timm

model = timm.create_model(f"local-dir:{{FOLDER}}", pretrained=True).eval()
data = timm.data.resolve_model_data_config(model)
pixels = timm.data.create_transform(**data, is_training=False)(image)[None]
(tokens,) = model.forward_intermediates(
    pixels, indices=[{index}], norm=False, output_fmt="NLC", intermediates_only=True
)  # patch tokens that the run read"""

    def __init__(
        self,
        *,
        source: str | None = None,
        model: str | None = None,
        layer: int = -2,
        image_size: int | None = None,
        interpolation: Interpolation | None = None,
        license: str | None = None,
        arguments: dict[str, Any] | None = None,
        mole: MoLESettings | None = None,
    ) -> None:
        require_numbers(OWNER, least=1, image_size=image_size)
        given: dict[str, Any] = {"source": source, "model": model, "layer": layer, "image_size": image_size}
        given |= {"interpolation": interpolation, "license": license, "arguments": arguments}
        if source is not None:
            check_reader(ModelSource.parse(source), owner=OWNER)
        described = DescribedTimm.describe(source, model=model, arguments=arguments, owner=OWNER)
        preprocessing = described.preprocessing(interpolation).adapted(
            owner=OWNER, image_size=image_size, framing="squash", interpolation=interpolation
        )
        network = described.build(preprocessing.image_size)
        anatomy, patch_size = read_trunk(network, described.architecture, owner=OWNER)
        super().__init__(
            model=network,
            anatomy=anatomy,
            layer=layer,
            preprocessing=preprocessing,
            patch_size=patch_size,
            source=source,
            license=license or described.license(),
            given=given,
            mole=mole,
        )
        self.described = described

    @property
    def width(self) -> int:
        """Token width D."""
        return int(self.model.embed_dim)  # type: ignore[arg-type]

    def alone(self) -> Alone | str:
        """See :meth:`VisionEncoder.alone`."""
        source = self.described.source
        return super().alone() if source is None else of_timm(self.described, source, self.image_size)

    def load_weights(self) -> None:
        """Read the weights, which timm's own code fits to image and patch size; a random encoder keeps its own.

        Raises:
            WeightsError: They do not exist, or do not fit; the message says how to fetch them.
        """
        if self.source is None:
            return
        found = read_source(ModelSource.parse(self.source), owner=OWNER)
        check_keys_for(found.tensors, self.model.state_dict(), found.path, owner=OWNER)
        state = self.described.adapted(found, image_size=self.image_size)
        self.fill(state, path=found.path)

    def facts(self) -> Mapping[str, object]:
        """Return name and arguments of the model."""
        return {
            "model": self.described.architecture,
            "arguments": self.described.arguments,
        }

    def formats(self) -> dict[str, str | None]:
        """See :meth:`VisionEncoder.formats`."""
        return super().formats() | {"native": self.no_embeddings()}

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """See :meth:`VisionEncoder.save`: a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""
        how = self.preprocessing
        side = self.image_size
        data: dict[str, Any] = {"input_size": (3, side, side), "mean": tuple(how.mean), "std": tuple(how.std)}
        data |= {"interpolation": self.interpolation, "crop_pct": 1.0, "crop_mode": "squash"}
        weights = self.model.state_dict() if state is None else state
        arguments = self.described.sized(side)
        save_with_timm(
            self.model,
            weights,
            folder,
            settings=self.described.published(),
            arguments=arguments,
            data=data,
            owner=OWNER,
        )


def read_trunk(trunk: nn.Module, name: str, *, owner: str) -> tuple[Anatomy, int]:
    """Return how a network of timm is read, and the side of its patches in pixels.

    Args:
        trunk: The network.
        name: Its name in timm, for messages.
        owner: Name of the caller, for messages.

    Raises:
        ConfigError: It is a ConvNet or another network that cannot be taught here.
    """
    kind = type(trunk).__name__
    anatomy = OF_TIMM.get(kind)
    taken = f"use a vision transformer of timm ({', '.join(OF_TIMM)})"
    as_teacher = f"as a teacher it can be {'an OpenClipExpert' if 'OpenClip' in owner else 'a TimmExpert'}"
    if anatomy is None:
        raise ConfigError(
            f"{owner}: {name} is a {kind} of timm, which cannot be taught here; {taken}, or add its family "
            f"(docs/encoders.md); {as_teacher}."
        )
    embedding = trunk.get_submodule("patch_embed")
    if hasattr(embedding, "backbone"):
        raise ConfigError(
            f"{owner}: {name} cuts no patches but begins with a ConvNet, and "
            f"cannot be taught here; {taken} that begins with patches; {as_teacher}."
        )
    patch_hw: tuple[int, int] = embedding.patch_size  # type: ignore[assignment]
    if len(set(patch_hw)) > 1:
        raise ConfigError(f"{owner}: {name} has patches of {patch_hw} px, but they must be square.")
    return anatomy, patch_hw[0]

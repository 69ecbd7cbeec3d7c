"""Encoders from open_clip whose image tower is a vision transformer of timm, such as SigLIP and EVA-02."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visexpert.errors import ConfigError, require_numbers
from visexpert.io.source import ModelSource
from visexpert.networks import RANDOM
from visexpert.networks.alone import Alone, of_open_clip_source
from visexpert.networks.open_clip import OPEN_CLIP_PREFIX, DescribedOpenClip
from visexpert.networks.preprocessing import Interpolation
from visexpert.typed import typed
from visexpert.vision.anatomy import Anatomy, BlockInputs
from visexpert.vision.encoder import VisionEncoder
from visexpert.vision.families import check_reader
from visexpert.vision.mole import MoLESettings
from visexpert.vision.of_timm import read_trunk
from visexpert.vision.saving_open_clip import OPEN_CLIP_USAGE, preprocess_of, read_whole, save_with_open_clip

OWNER = "OpenClipEncoder"


class TrunkAnatomy(Anatomy):
    """open_clip's ``TimmModel``: a trunk of timm and a head that projects into the space of the text tower.

    Args:
        trunk: How the trunk is read.
    """

    def __init__(self, trunk: Anatomy) -> None:
        self.of_trunk = trunk
        self.blocks_at = f"trunk.{trunk.blocks_at}"

    def takes_any_size(self, model: Any) -> bool:
        return self.of_trunk.takes_any_size(model.trunk)

    def stem(self, model: nn.Module) -> tuple[nn.Module, ...]:
        return self.of_trunk.stem(model.get_submodule("trunk"))

    def pooling(self, model: nn.Module) -> tuple[nn.Module, ...]:
        trunk = model.get_submodule("trunk")
        return *self.of_trunk.pooling(trunk), trunk.get_submodule("head"), model.get_submodule("head")

    def prefix(self, model: Any) -> int:
        return self.of_trunk.prefix(model.trunk)

    def has_cls(self, model: Any) -> bool:
        return self.of_trunk.has_cls(model.trunk)

    def heads(self, model: Any) -> int:
        return self.of_trunk.heads(model.trunk)

    def embed(self, model: Any, pixels_BCHW: Tensor) -> tuple[Tensor, BlockInputs]:
        return self.of_trunk.embed(model.trunk, pixels_BCHW)

    def pool(self, model: Any, last_BND: Tensor) -> Tensor | None:
        pooled_BP: Tensor = model.head(model.trunk.forward_head(model.trunk.norm(last_BND)))
        return pooled_BP if pooled_BP.ndim == 2 else None

    def attends_in_pooling(self, model: Any) -> bool:
        return self.of_trunk.attends_in_pooling(model.trunk)

    def pool_scores(self, model: Any, last_BND: Tensor) -> Tensor | None:
        return self.of_trunk.pool_scores(model.trunk, last_BND)


@typed
class OpenClipEncoder(VisionEncoder):
    """An image tower of open_clip with a vision transformer of timm, as the encoder to train.

    The network is open_clip's own ``TimmModel``, with its keys (``trunk. ...``, ``head. ...``) and shapes; its pooled
    output is in the space of the text tower. Towers that are plain ViTs are read by
    :class:`~visexpert.vision.ClipEncoder`.

    Args:
        source: Folder or Hugging Face id with an ``open_clip_config.json``, such as ``timm/ViT-B-16-SigLIP``;
            ``open_clip:NAME/TAG`` from open_clip's list, such as ``open_clip:ViT-B-16-SigLIP/webli``; or a file of
            weights together with ``model``. Null for ``model`` with random weights.
        model: Name in ``open_clip.list_models()``, such as ``EVA02-B-16``, for a random encoder, a lone file, or a
            source that is not on this machine yet.
        layer: Which hidden state to pass on: -1 the last block's, -2 the one before, ... No final norm is applied.
        image_size: Side of the input in pixels; null for the model's own. Position embeddings are interpolated by
            timm.
        interpolation: ``bilinear`` or ``bicubic``; null for the model's own.
        license: License of the weights; null for the one in the model card.
        mole: Add a mixture of low-rank experts to its MLPs; null for the plain network.

    Raises:
        ConfigError: A tower that cannot be taught here, such as a ConvNet, or settings that do not fit.
        WeightsError: ``open_clip_config.json`` is missing, and no model is given.
    """

    usage = OPEN_CLIP_USAGE

    def __init__(
        self,
        *,
        source: str | None = None,
        model: str | None = None,
        layer: int = -2,
        image_size: int | None = None,
        interpolation: Interpolation | None = None,
        license: str | None = None,
        mole: MoLESettings | None = None,
    ) -> None:
        require_numbers(OWNER, least=1, image_size=image_size)
        given: dict[str, Any] = {"source": source, "model": model, "layer": layer, "image_size": image_size}
        given |= {"interpolation": interpolation, "license": license}
        if source is not None and not source.startswith(OPEN_CLIP_PREFIX):
            check_reader(ModelSource.parse(source), owner=OWNER)
        described = _described(source, model)
        _must_be_of_timm(described, source or str(model))
        preprocessing = described.preprocessing().adapted(
            owner=OWNER, image_size=image_size, framing="squash", interpolation=interpolation
        )
        network = described.build(preprocessing.image_size)
        name = described.settings["vision_cfg"]["timm_model_name"]
        anatomy, patch_size = read_trunk(network.get_submodule("trunk"), name, owner=OWNER)
        super().__init__(
            model=network,
            anatomy=TrunkAnatomy(anatomy),
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
        return int(self.model.get_submodule("trunk").embed_dim)  # type: ignore[arg-type]

    def alone(self) -> Alone | str:
        """See :meth:`VisionEncoder.alone`."""
        source = self.described.source
        if source is None:
            return super().alone()
        return of_open_clip_source(str(self.described.model), source, self.image_size)

    def load_weights(self) -> None:
        """Read the image tower of the weights; a random encoder keeps its own.

        Raises:
            WeightsError: They do not exist, or do not fit; the message says how to fetch them.
            ConfigError: The model's own configuration differs from the named model's.
        """
        if self.described.source is None:
            return
        path, state = self.described.read(self.model, image_size=self.image_size)
        self.fill(state, path=path)

    def formats(self) -> dict[str, str | None]:
        """See :meth:`VisionEncoder.formats`: open_clip builds the tower at one size only."""
        own, reason = self.described.side, None
        if self.image_size != own:
            reason = f"is open_clip's, which builds this tower for {own} px, not image_size={self.image_size}"
        return super().formats() | {"native": reason or self.no_embeddings()}

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """See :meth:`VisionEncoder.save`: a folder for ``open_clip.create_model("local-dir:FOLDER")``."""
        source = self.described.source
        save_with_open_clip(
            self.model.state_dict() if state is None else state,
            folder,
            whole={} if source is None else read_whole(source, owner=OWNER),
            source=source,
            settings=self.described.settings,
            preprocess=preprocess_of(self.preprocessing),
        )

    def facts(self) -> Mapping[str, object]:
        """Return open_clip's settings of the tower."""
        return {"vision": self.described.settings["vision_cfg"], "embed_dim": self.described.settings["embed_dim"]}


def _described(source: str | None, model: str | None) -> DescribedOpenClip:
    """Return the description of the source, or of a named model with random weights."""
    if source is None and model is None:
        raise ConfigError(f"{OWNER} needs source (a folder, id or open_clip:NAME/TAG), or model (a name of open_clip).")
    if source is None or not source.startswith(OPEN_CLIP_PREFIX):
        return DescribedOpenClip.describe(source or RANDOM, model=model, framing="squash", owner=OWNER)
    name, _, tag = source.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    if not tag or model is not None:
        raise ConfigError(f"{OWNER}: source={source!r} must be 'open_clip:NAME/TAG', and model left out.")
    return DescribedOpenClip.describe(tag, model=name, framing="squash", owner=OWNER)


def _must_be_of_timm(described: DescribedOpenClip, text: str) -> None:
    """Check that a tower is one of timm's.

    Raises:
        ConfigError: It is open_clip's own ViT or ResNet.
    """
    vision = described.settings["vision_cfg"]
    if "timm_model_name" in vision:
        return
    if isinstance(vision.get("layers", 12), int):
        raise ConfigError(
            f"{OWNER}: the tower of '{text}' is open_clip's own ViT; class_path: visexpert.vision.ClipEncoder reads it."
        )
    raise ConfigError(
        f"{OWNER}: the tower of '{text}' is CLIP's ResNet, a ConvNet, which cannot be taught here; as a teacher it can "
        "be an OpenClipExpert."
    )

"""Check before training that a run can be exported to the formats it is meant for."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from visexpert.errors import ConfigError
from visexpert.export import check_encoder, check_formats
from visexpert.export.llava import check_language
from visexpert.language import PrefixLM
from visexpert.methods import FusingMethod, Method
from visexpert.vision import mole_settings


class MeantFor(Callback):
    """Refuse before training what `visexpert export` could not write afterwards.

    Experts of a method that fuses them are no obstacle: `visexpert merge` comes before the export.

    Args:
        formats: Formats of `visexpert export` that the run is to be written in, such as ``[hf, llava]``.

    Raises:
        ConfigError: An unknown format, or one whose packages are missing.
    """

    def __init__(self, *, formats: list[str]) -> None:
        check_formats(formats)
        self.formats = tuple(formats)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model before a fit, when it is built and its weights need not be there.

        Raises:
            ConfigError: A format cannot hold the model.
        """
        if stage == "fit":
            check_exportable(pl_module, self.formats)


def check_exportable(model: LightningModule, formats: Sequence[str]) -> None:
    """Refuse a model that could not be written in some formats.

    Raises:
        ConfigError: The first obstacle.
    """
    if not isinstance(model, Method):
        raise ConfigError(f"MeantFor: {type(model).__name__} has no encoder to export; remove it from the callbacks.")
    clip = model.clip
    for name in formats:
        check_encoder(clip, name)
        if name == "llava":
            problems = llava_problems(model)
            if problems:
                raise ConfigError(
                    f"MeantFor: llava cannot hold {problems[0]}; train without it, or remove llava from formats."
                )
            assert isinstance(model.language, PrefixLM)
            check_language(model.language.model)
        if name == "visexpert" and mole_settings(clip) is None and not isinstance(model, FusingMethod):
            raise ConfigError("MeantFor: visexpert is for an encoder with MoLE, which this one lacks; take hf.")


def llava_problems(model: Method) -> list[str]:
    """Return the settings of a method's language model, projector and encoder that LLaVA cannot hold."""
    language, layers, norm = model.language, model.projector.layers, model.projector.norm
    scale = language.position_scale if isinstance(language, PrefixLM) else 0
    problems = {
        f"language: {type(language).__name__} (it needs PrefixLM)": not isinstance(language, PrefixLM),
        f"position_scale: {scale} (it needs 0)": scale,
        "image_newline: true (tiles)": isinstance(language, PrefixLM) and language.image_newline is not None,
        f"clip: {type(model.clip).__name__} (tiles)": model.clip.reads_tiles,
        "a projector other than mlp2x_gelu": not isinstance(layers, nn.Sequential) or len(layers) != 3,
        "projector.norm: true (it needs false)": not isinstance(norm, nn.Identity),
    }
    return [*(problem for problem, found in problems.items() if found), *model.beside_clip()]

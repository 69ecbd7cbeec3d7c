"""Folders of a CLIP alone: for ``transformers``, for ``open_clip``, and, with its MoLE, for visexpert itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging as hf_logging

from visexpert.errors import ConfigError
from visexpert.export.rounding import stored_weights
from visexpert.export.source import ExportSource
from visexpert.vision import mole_settings


def write_hf(source: ExportSource, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, for ``transformers`` 4 and 5."""
    projection = None if source.projection is None else source.projection.dim
    source.clip.save_as("hf", folder, stored_weights(source), projection_dim=projection)


def write_open_clip(source: ExportSource, folder: Path) -> None:
    """Write ``open_clip_config.json`` and ``open_clip_model.safetensors``.

    Raises:
        ConfigError: open_clip lacks the activation, or does not return the tokens.
    """
    depth = source.clip.depth
    if min(source.clip.layer, *source.layers) < -depth:
        raise ConfigError(
            f"open_clip returns no tokens before the first block (layer {-depth - 1}); use the format hf."
        )
    source.clip.save_as("open_clip", folder, stored_weights(source))


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of ``transformers`` while it writes."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


MODEL_TYPE = "visexpert_clip_mole"
"""Unknown to ``transformers``, so that its auto classes refuse the folder instead of dropping MoLE."""

VISEXPERT_USAGE = """\
import json

from torchvision.transforms.functional import to_tensor
from visexpert.vision import ClipEncoder, MoLESettings

settings = MoLESettings(**json.load(open(f"{{FOLDER}}/mole.json")))
clip = ClipEncoder(source=FOLDER, layer={layer}, mole=settings).eval()
clip.load_weights()
tokens = clip(to_tensor(image)[None]).tokens_BTD
# In a configuration: clip.init_args {{source: FOLDER, layer: {layer}, mole: what mole.json holds}}."""


def write_visexpert(source: ExportSource, folder: Path) -> None:
    """Write ``config.json``, ``mole.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    Raises:
        ConfigError: The CLIP has no MoLE.
    """
    settings = mole_settings(source.clip)
    if settings is None:
        raise ConfigError("The format visexpert is for a CLIP with MoLE; this one has none, use the format hf.")
    write_hf(source, folder)
    (folder / "mole.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_type": MODEL_TYPE, "architectures": ["ClipEncoder"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

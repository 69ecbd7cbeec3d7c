"""A folder for visexpert's own ``ClipEncoder``: a student whose MoLE stays as it was trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from visexpert.errors import ConfigError
from visexpert.export import hf
from visexpert.export.source import ExportSource
from visexpert.vision import mole_settings

MODEL_TYPE = "visexpert_clip_mole"
"""No type that ``transformers`` knows: its auto classes refuse the folder instead of dropping MoLE."""

USAGE = """\
import json
from visexpert.vision import ClipEncoder, MoLESettings

settings = MoLESettings(**json.load(open("FOLDER/mole.json")))
clip = ClipEncoder(source="FOLDER", layer={layer}, mole=settings).eval()
clip.load_weights()
tokens = clip(images).tokens_BTD  # images float32 (B, 3, H, W) in [0, 1], any size
# In a configuration: clip.init_args {{source: FOLDER, layer: {layer}, mole: what mole.json holds}}."""


def write(source: ExportSource, folder: Path) -> None:
    """Write ``config.json``, ``mole.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    Raises:
        ConfigError: A plain CLIP, which needs no folder of its own kind.
    """
    settings = mole_settings(source.clip)
    if settings is None:
        raise ConfigError("--format visexpert is for a CLIP with MoLE; a plain one is read from --format hf as well.")
    hf.write(source, folder)
    (folder / "mole.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_type": MODEL_TYPE, "architectures": ["ClipEncoder"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

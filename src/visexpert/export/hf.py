"""A folder for ``transformers``: ``CLIPVisionModel`` and its image processor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor
from transformers.utils import logging as hf_logging

from visexpert.export.rounding import stored
from visexpert.export.source import ExportSource

USAGE = """\
from transformers import AutoImageProcessor, CLIPVisionModel

processor, model = AutoImageProcessor.from_pretrained(FOLDER), CLIPVisionModel.from_pretrained(FOLDER)
output = model(**processor(images=image, return_tensors="pt"), output_hidden_states=True)
tokens = output.hidden_states[{layer}][:, 1:]  # patch tokens as the language model reads them"""


PREFIX = "vision_model."
"""What ``transformers`` 4 writes before each key, and what 5 reads, too. Without it (as 5 writes) 4 would warn, start
from random weights and go on."""


def write(source: ExportSource, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, for ``transformers`` 4 and 5."""
    config = vision_config(source)
    config.architectures, config.dtype = [type(source.clip.model).__name__], source.dtype or torch.float32
    config.save_pretrained(folder)
    state = {PREFIX + key: stored(value, source.dtype) for key, value in source.clip.model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor(source).save_pretrained(folder)


def vision_config(source: ExportSource) -> Any:
    """A copy of CLIP's configuration that says how wide the projection was, though it is not in the folder."""
    config = copy.deepcopy(source.clip.config)
    if source.projection is not None:
        config.projection_dim = source.projection.dim
    return config


def image_processor(source: ExportSource) -> CLIPImageProcessor:
    """CLIP's processor with the settings of :meth:`ClipEncoder.preprocess`."""
    how = source.preprocessing
    size = dict(zip(("height", "width"), how["size"], strict=True))
    return CLIPImageProcessor(
        do_resize=True,
        size=size,
        resample=3,
        do_center_crop=False,
        crop_size=size,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=how["mean"],
        image_std=how["std"],
        do_convert_rgb=True,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep ``transformers`` from drawing progress bars while it writes."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()

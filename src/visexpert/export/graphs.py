"""The encoder as one graph with a dynamic batch, normalized pixels to named tokens: ONNX and ``torch.export``."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from visexpert.export.source import ExportSource, outputs_of
from visexpert.vision import VisionEncoder, equipped_blocks, merge_for_inference

PIXELS_USAGE = """\
image = image.resize(({side}, {side}), Image.Resampling.{resampling})
pixels = (np.asarray(image, dtype=np.float32) / 255 - {mean}) / {std}
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)"""

ONNX_USAGE = f"""\
import numpy as np
import onnxruntime

{PIXELS_USAGE}
session = onnxruntime.InferenceSession(f"{{{{FOLDER}}}}/model.onnx")
(tokens,) = session.run(["patch_tokens"], {{{{"pixel_values": pixels}}}})"""

INLINE_BYTES = 1_500_000_000
"""Above this, weights go into a file beside the graph: protobuf is limited to 2 GB."""


def write_onnx(source: ExportSource, folder: Path) -> None:
    """Write ``model.onnx``, with the preprocessing of ``pixel_values`` in its metadata."""
    with _quiet(), torch.no_grad():
        traced, names = trace(source)
        program = torch.onnx.export(
            traced, input_names=["pixel_values"], output_names=names, dynamo=True, verbose=False
        )
    assert program is not None
    program.model.metadata_props["preprocessing"] = json.dumps(source.preprocessing)
    program.model.metadata_props["patch_tokens_layer"] = str(source.clip.layer)
    size = sum(value.nbytes for value in traced.state_dict.values())
    program.save(str(folder / "model.onnx"), external_data=size > INLINE_BYTES)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's log of each rewritten node."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


TORCH_EXPORT_USAGE = f"""\
import numpy as np
import torch

{PIXELS_USAGE}
encoder = torch.export.load(f"{{{{FOLDER}}}}/model.pt2").module()
tokens = encoder(torch.from_numpy(pixels))["patch_tokens"]"""


def write_torch_export(source: ExportSource, folder: Path) -> None:
    """Write ``model.pt2``."""
    torch.export.save(trace(source)[0], folder / "model.pt2")


def trace(source: ExportSource) -> tuple[ExportedProgram, list[str]]:
    """Return the encoder as a graph for any number of images, and the names of its outputs."""
    network = NamedOutputs(for_inference(source.clip), source.layers).eval()
    side = source.clip.image_size
    example = torch.zeros(2, 3, side, side)  # a batch of one would become a constant
    with torch.no_grad():
        program = torch.export.export(
            network, (example,), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}
        )
        return program, list(network(example))


class NamedOutputs(nn.Module):
    """Maps normalized pixels to named tensors: an encoder as one graph.

    Args:
        clip: The encoder.
        layers: Hidden states to return.
    """

    def __init__(self, clip: VisionEncoder, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.clip, self.layers = clip, layers

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Map (B, 3, S, S) to hidden states, patch tokens of the layer read and, where there is one, pooled output."""
        return outputs_of(self.clip, self.layers, pixel_values)


def for_inference(clip: VisionEncoder) -> VisionEncoder:
    """Return the encoder for a graph: a plain one itself, MoLE with merged weights wherever that is exact.

    What a network computes from the shape of its images alone is computed once.
    """
    clip = merge_for_inference(clip, keep_weighed=True) if equipped_blocks(clip) else clip
    fixed = clip.anatomy.fixed(clip.model, clip.image_size)
    if fixed is clip.model:
        return clip
    found = copy.copy(clip)
    found._modules = {**clip._modules, "model": fixed}  # the encoder itself keeps its network
    return found

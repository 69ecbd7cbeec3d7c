"""The CLIP as one graph with a dynamic batch, normalized pixels to named tokens: ONNX and ``torch.export``."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from visexpert.export.source import PATCH_TOKENS, POOLED, ExportSource, layer_name
from visexpert.vision import ClipEncoder, equipped_blocks, merge_for_inference

ONNX_USAGE = """\
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
(tokens,) = session.run(["patch_tokens"], {{"pixel_values": pixels}})  # float32 (B, 3, {side}, {side}), normalized"""

INLINE_BYTES = 1_500_000_000
"""Above this, weights go into a file beside the graph: protobuf is limited to 2 GB."""


def write_onnx(source: ExportSource, folder: Path) -> None:
    """Write ``model.onnx``, with the preprocessing of ``pixel_values`` in its metadata."""
    network = NamedOutputs(for_inference(source.clip), source.layers).eval()
    side = source.clip.image_size
    # A batch of one would become a constant.
    example = torch.zeros(2, 3, side, side)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["pixel_values"],
            output_names=list(network(example)),
            dynamo=True,
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["preprocessing"] = json.dumps(source.preprocessing)
    program.model.metadata_props["patch_tokens_layer"] = str(source.clip.layer)
    size = sum(parameter.nbytes for parameter in network.parameters())
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


TORCH_EXPORT_USAGE = """\
import torch

encoder = torch.export.load("FOLDER/model.pt2").module()
tokens = encoder(pixels)["patch_tokens"]  # float32 (B, 3, {side}, {side}), normalized"""


def write_torch_export(source: ExportSource, folder: Path) -> None:
    """Write ``model.pt2``."""
    side = source.clip.image_size
    with torch.no_grad():
        program = torch.export.export(
            NamedOutputs(for_inference(source.clip), source.layers).eval(),
            (torch.zeros(2, 3, side, side),),
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        )
    torch.export.save(program, folder / "model.pt2")


class NamedOutputs(nn.Module):
    """Maps normalized pixels to named tensors: a CLIP as one graph.

    Args:
        clip: The encoder.
        layers: Hidden states to return.
    """

    def __init__(self, clip: ClipEncoder, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = clip.model
        self.layer, self.layers = clip.layer, layers

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Map (B, 3, S, S) to hidden states (B, 1 + T, D), patch tokens (B, T, D) of the layer read, pooled (B, D)."""
        states = [self.model.pre_layrnorm(self.model.embeddings(pixel_values))]
        for layer in self.model.encoder.layers:
            states.append(layer(states[-1], None))
        return {
            **{layer_name(layer): states[layer] for layer in self.layers},
            PATCH_TOKENS: states[self.layer][:, 1:],
            POOLED: self.model.post_layernorm(states[-1][:, 0]),
        }


def for_inference(clip: ClipEncoder) -> ClipEncoder:
    """Return the CLIP for a graph: a plain one itself, MoLE with merged weights wherever that is exact."""
    return merge_for_inference(clip, keep_weighed=True) if equipped_blocks(clip) else clip

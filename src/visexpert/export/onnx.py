"""One ONNX graph with a dynamic batch: normalized pixels to named tokens."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from visexpert.export.source import ExportSource, NamedOutputs, for_inference

USAGE = """\
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
(tokens,) = session.run(["patch_tokens"], {{"pixel_values": pixels}})  # float32 (B, 3, {side}, {side}), normalized"""

INLINE_BYTES = 1_500_000_000
"""Above this the weights go into a file beside the graph: protobuf holds no more than 2 GB."""


def write(source: ExportSource, folder: Path) -> None:
    """Write ``model.onnx``; its metadata says how an image becomes ``pixel_values``."""
    network = NamedOutputs(for_inference(source.clip), source.layers).eval()
    side = source.clip.image_size
    # Two images: a batch of one would be taken for a constant.
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
    """Keep the exporter's log of each rewritten node to itself."""
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

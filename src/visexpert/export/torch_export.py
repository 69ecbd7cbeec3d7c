"""A ``torch.export`` program with a dynamic batch, which torch alone runs."""

from __future__ import annotations

from pathlib import Path

import torch

from visexpert.export.source import ExportSource, NamedOutputs, for_inference

USAGE = """\
import torch

encoder = torch.export.load("FOLDER/model.pt2").module()
tokens = encoder(pixels)["patch_tokens"]  # float32 (B, 3, {side}, {side}), normalized"""


def write(source: ExportSource, folder: Path) -> None:
    """Write ``model.pt2``."""
    side = source.clip.image_size
    with torch.no_grad():
        program = torch.export.export(
            NamedOutputs(for_inference(source.clip), source.layers).eval(),
            (torch.zeros(2, 3, side, side),),
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        )
    torch.export.save(program, folder / "model.pt2")

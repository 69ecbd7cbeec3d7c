"""Graphs of every family: onnxruntime and torch.export give what the family's own library gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.vision.test_encoder_families import TIMM, TRANSFORMERS, Case, of_timm, of_transformers
from tests.vision.test_open_clip_encoder import folder
from visexpert.export import ExportSource, check_encoder, graphs
from visexpert.export.graphs import write_onnx, write_torch_export
from visexpert.vision import OpenClipEncoder

IN_ONNX = {"siglip", "siglip2", "dinov3 gated", "eva02_tiny_patch14_224", "beit_base_patch16_224", "open_clip"}
"""One of each kind of attention and positions: seconds each."""

FAMILIES = ("clip", "siglip", "siglip2", "dinov2 registers", "dinov3 gated")
TRUNKS = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_small_patch16_rope_mixed_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
)


def of_open_clip(path: Path) -> Case:
    visual = folder(path, "siglip")
    encoder = OpenClipEncoder(source=str(path))

    def reference(pixels: Tensor, layer: int) -> Tensor:
        given: dict[str, Any] = {"norm": False, "output_fmt": "NLC", "intermediates_only": True}
        given |= {"return_prefix_tokens": True, "indices": [encoder.depth + layer]}
        ((patches, prefix),) = visual.trunk.forward_intermediates(pixels, **given)
        return torch.cat([prefix, patches], dim=1)

    return Case(encoder, reference, visual)


def case_of(name: str, path: Path, patch: pytest.MonkeyPatch) -> Case:
    """Write a network of one block, which takes least time to trace."""
    if name in TRUNKS:
        patch.setitem(TIMM, name, TIMM[name] | {"depth": 1})
    elif name in FAMILIES and "dino" not in name:  # DINO's configuration names its stages
        patch.setattr(TRANSFORMERS[name], "num_hidden_layers", 1)
    if name == "open_clip":
        return of_open_clip(path)
    return of_timm(name, path, image_size=112) if name in TRUNKS else of_transformers(name, path)


@pytest.mark.parametrize("name", [*FAMILIES, *TRUNKS, "open_clip"])
def test_a_graph_gives_what_the_encoders_library_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name, tmp_path / "in", monkeypatch)
    encoder = case.encoder
    encoder.load_weights()
    encoder.eval().requires_grad_(False)
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    for graph in ("onnx", "torch_export"):
        check_encoder(encoder, graph)
    source = ExportSource(encoder, (-1,), None, {})
    traced = graphs.trace(source)
    monkeypatch.setattr(graphs, "trace", lambda _: traced)
    write_torch_export(source, tmp_path)
    pixels = torch.randn(3, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        expected = {"layer_minus_1": case.reference(pixels, -1), "pooled": case.pooled(pixels)}
        found = torch.export.load(tmp_path / "model.pt2").module()(pixels)
    torch.testing.assert_close({key: found[key] for key in expected}, expected, atol=1e-5, rtol=0)
    if name in IN_ONNX:
        write_onnx(source, tmp_path)
        session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        run = map(torch.from_numpy, session.run(list(expected), {"pixel_values": pixels.numpy()}))
        torch.testing.assert_close(dict(zip(expected, run, strict=True)), expected, atol=1e-4, rtol=0)
    after = encoder.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_a_graph_of_siglip_2_has_the_positions_of_its_image_size(tmp_path: Path) -> None:
    case = of_transformers("siglip2", tmp_path / "in", image_size=48)
    case.encoder.load_weights()
    write_torch_export(ExportSource(case.encoder.eval().requires_grad_(False), (-1,), None, {}), tmp_path)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "model.pt2").module()(pixels)["layer_minus_1"]
        assert found.shape == (2, 36, 32)
        torch.testing.assert_close(found, case.reference(pixels, -1), atol=1e-5, rtol=0)

"""Plans for encoders of other families at their true size, against the library's own networks and hand counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
import yaml
from torch import nn

import visexpert as vx
from visexpert.planning import Asked, make_plan, read_configs
from visexpert.planning.counting import count_step
from visexpert.planning.meta import weightless

LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
SIGLIP2: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
DINOV2: dict[str, Any] = {**LARGE, "image_size": 518, "patch_size": 14}
DINOV3: dict[str, Any] = {
    **LARGE,
    "intermediate_size": 4096,
    "image_size": 224,
    "patch_size": 16,
    "num_register_tokens": 4,
}


def of_transformers(kind: str, processor: str, fields: dict[str, Any]) -> dict[str, Any]:
    given = {"config": {"model_type": kind, **fields}, "processor": {"image_processor_type": processor}}
    return {
        "class_path": "visexpert.vision.TransformersEncoder",
        "init_args": {**given, "image_size": fields["image_size"], "layer": -1},
    }


def of_timm(name: str) -> dict[str, Any]:
    return {"class_path": "visexpert.vision.TimmEncoder", "init_args": {"model": name, "layer": -1}}


def linears(tokens: int, width: int, hidden: int, matrices: int, depth: int) -> int:
    """FLOP of the blocks: four projections, the MLP's matrices, and attention's two products."""
    return depth * (2 * tokens * width * (4 * width + matrices * hidden) + 4 * tokens * tokens * width)


CASES: dict[str, tuple[dict[str, Any], Callable[[], nn.Module], int, int, float]] = {
    # settings, the library's own network, tokens, FLOP by hand, published millions of parameters
    "SigLIP 2 So400m/14-384": (
        of_transformers("siglip_vision_model", "SiglipImageProcessor", SIGLIP2),
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP2)),
        27 * 27,
        linears(729, 1152, 4304, 2, 27) + 2 * 729 * 3 * 14 * 14 * 1152,
        428,
    ),
    "DINOv2-L/14": (
        of_transformers("dinov2", "BitImageProcessor", DINOV2),
        lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2)),
        1 + 37 * 37,
        linears(1370, 1024, 4096, 2, 24) + 2 * 1369 * 3 * 14 * 14 * 1024,
        304,
    ),
    "DINOv3-L/16 of transformers": (
        of_transformers("dinov3_vit", "DINOv3ViTImageProcessor", DINOV3),
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3)),
        5 + 14 * 14,
        linears(201, 1024, 4096, 2, 24) + 2 * 196 * 3 * 16 * 16 * 1024,
        303,
    ),
    "DINOv3-L/16 of timm": (
        of_timm("vit_large_patch16_dinov3"),
        lambda: timm.create_model("vit_large_patch16_dinov3", num_classes=0),
        5 + 16 * 16,
        linears(261, 1024, 4096, 2, 24) + 2 * 256 * 3 * 16 * 16 * 1024,
        303,
    ),
    "EVA-02-B/14-448": (
        of_timm("eva02_base_patch14_448"),
        lambda: timm.create_model("eva02_base_patch14_448", num_classes=0),
        1 + 32 * 32,
        linears(1025, 768, 2048, 3, 12) + 2 * 1024 * 3 * 14 * 14 * 768,
        86,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_flop_of_an_encoder_equal_independent_counts(name: str) -> None:
    settings, build, tokens, by_hand, millions = CASES[name]
    with weightless():
        encoder = getattr(vx, settings["class_path"].rpartition(".")[2])(**settings["init_args"])
    encoder.mark_weights_in_place()
    images_BCHW = torch.empty(1, 3, encoder.image_size, encoder.image_size, device="meta")
    with torch.no_grad():
        cost = count_step(lambda: encoder(images_BCHW).tokens_BTD, encoder, {"encoder": [encoder]})
    assert encoder.grid_hw[0] * encoder.grid_hw[1] + encoder.prefix == tokens
    assert cost.forward["encoder"] == pytest.approx(by_hand, rel=0.02)
    with torch.device("meta"):
        network = build()
    count = sum(parameter.numel() for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count
    assert count == pytest.approx(millions * 1e6, rel=0.02)


def test_the_plan_of_a_run_equals_independent_counts(tmp_path: Path) -> None:
    clip, _, tokens, by_hand, millions = CASES["EVA-02-B/14-448"]
    config = yaml.safe_load(Path("configs/movekd/encoder-only.yaml").read_text(encoding="utf-8"))
    arguments = config["model"]["init_args"]
    arguments["clip"] = clip
    del arguments["store"]
    arguments["experts"] = {"semantic": arguments["experts"]["semantic"]}
    arguments["weighting"] = {"clip_teacher_weight": 0.0, "teachers": "uniform", "tokens": "uniform"}
    (path := tmp_path / "large.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    plan = make_plan(read_configs([path]), Asked())
    (student,) = (row for row in plan.rows if row.role == "student")
    assert student.trained + student.frozen == pytest.approx(millions * 1e6, rel=0.02)
    assert student.forward == pytest.approx(by_hand / 1e9, rel=0.02)
    assert student.backward == pytest.approx(2 * by_hand / 1e9, rel=0.02)  # but for the gradient of the pixels
    numbers = sum(row.trained + row.frozen for row in plan.rows)
    assert plan.memory.weights == pytest.approx(4 * numbers, rel=0.02)
    assert plan.memory.optimizer == pytest.approx(8 * sum(row.trained for row in plan.rows), rel=0.02)
    widths = 8 * 768 + 4 * 2048  # two norms, Q, K, V rotated, attention, sums; gate, its SiLU, product, norm
    assert plan.activation_bytes == pytest.approx(4 * tokens * 12 * widths, rel=0.3)

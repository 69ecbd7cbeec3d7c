"""Two loads of one folder are one model, whatever was probed before, and the model that transformers itself loads.

Indices and frequencies of positions are in no file: they are computed when a network is built, or cached by size for as
long as the process lives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForDepthEstimation

from tests.experts.tiny_models import CLIP_VISION, randomized, saved
from visexpert.experts import DepthExpert, TransformersExpert
from visexpert.experts.maps import MapExpert

SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32, "window_size": 2}
BEIT: dict[str, Any] = {**CLIP_VISION, "model_type": "beit"}
ZOE: dict[str, Any] = {
    "model_type": "zoedepth",
    "neck_hidden_sizes": [8] * 4,
    "fusion_hidden_size": 8,
    "bottleneck_features": 8,
    "num_attractors": [4, 2, 2, 1],
    "bin_embedding_dim": 8,
    "backbone_config": {
        **BEIT,
        "use_relative_position_bias": True,
        "reshape_hidden_states": False,
        "out_indices": [1, 2, 3, 4],
        "num_hidden_layers": 4,
    },
}
COMPUTED: dict[str, dict[str, Any]] = {
    "clip": {**CLIP_VISION, "model_type": "clip_vision_model"},
    "aimv2": {**CLIP_VISION, "model_type": "aimv2_vision_model"},
    "mlcd": {**CLIP_VISION, "model_type": "mlcd_vision_model"},
    "dinov3": {**CLIP_VISION, "model_type": "dinov3_vit", "num_register_tokens": 4},
    "beit": {**BEIT, "use_relative_position_bias": True},
    "beit_shared": {**BEIT, "use_shared_relative_position_bias": True},
    "data2vec": {**BEIT, "model_type": "data2vec-vision", "use_relative_position_bias": True},
    "swin": {**SWIN, "model_type": "swin"},
    "swinv2": {**SWIN, "model_type": "swinv2"},
    "levit": {
        "model_type": "levit",
        "image_size": 64,
        "hidden_sizes": [16, 16, 16],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "zoedepth": ZOE,
}


def last_features(model: Any, pixels_BCHW: Tensor) -> Tensor:
    """What transformers calls so; of ZoeDepth the depth that it predicts."""
    with torch.no_grad():
        output = model.eval()(pixels_BCHW)
    depth_BHW = output.get("predicted_depth")
    features: Tensor = output.last_hidden_state if depth_BHW is None else depth_BHW.unsqueeze(-1)
    return features


def loaded(name: str, folder: Path) -> MapExpert:
    depth: dict[str, Any] = {"tokens": "prediction", "scale": "raw"}
    expert = DepthExpert(source=str(folder), **depth) if name == "zoedepth" else TransformersExpert(source=str(folder))
    expert.load_weights()
    return expert.eval()


@pytest.mark.parametrize("name", list(COMPUTED))
def test_two_loads_are_one_model_and_the_librarys(tmp_path: Path, name: str) -> None:
    fields = dict(COMPUTED[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    auto: Any = AutoModelForDepthEstimation if name == "zoedepth" else AutoModel
    saved(randomized(auto.from_config(config)), transformers.BitImageProcessor(), tmp_path)
    first, second = loaded(name, tmp_path), loaded(name, tmp_path)
    assert buffers_outside_the_file(first.network) == buffers_outside_the_file(second.network)
    images_BCHW = torch.rand(2, 3, first.image_size, first.image_size)
    with torch.no_grad():
        tokens_BSE, again_BSE = first(images_BCHW).tokens_BSE, second(images_BCHW).tokens_BSE
    pixels_BCHW = (images_BCHW - first.mean) / first.std
    expected = last_features(auto.from_pretrained(tmp_path), pixels_BCHW)
    expected_BNE = expected.flatten(1, -2)
    assert expected_BNE.isfinite().all() and expected_BNE.std() > 1e-4
    assert torch.equal(tokens_BSE, again_BSE) and first.fingerprint() == second.fingerprint()
    torch.testing.assert_close(tokens_BSE, expected_BNE[:, -tokens_BSE.shape[1] :], atol=1e-5, rtol=1e-5)


def buffers_outside_the_file(network: nn.Module) -> dict[str, list[float]]:
    """Buffers that no file holds."""
    inside = network.state_dict()
    return {name: value.flatten().tolist() for name, value in network.named_buffers() if name not in inside}

"""Depth and segmentation experts against transformers itself, and normals of surfaces that are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    DPTImageProcessor,
    SegformerImageProcessor,
)

from tests.experts.tiny_models import DEPTH, SEGFORMER, randomized, saved
from visexpert.errors import ConfigError
from visexpert.experts import DepthExpert, NormalsFromDepth, SegmentationExpert


def config_of(fields: dict[str, Any]) -> Any:
    return AutoConfig.for_model(fields["model_type"], **{k: v for k, v in fields.items() if k != "model_type"})


@pytest.fixture
def depth_folder(tmp_path: Path) -> tuple[Any, str]:
    """A tiny Depth Anything and where it lies."""
    model = randomized(AutoModelForDepthEstimation.from_config(config_of(DEPTH)))
    for parameter in model.head.parameters():  # its last ReLU must not cut everything off
        torch.nn.init.uniform_(parameter, 0.0, 0.5)
    processor = DPTImageProcessor(size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14)
    return model, str(saved(model, processor, tmp_path))


def loaded(expert: Any) -> Any:
    expert.load_weights()
    return expert.eval()


def pixels(expert: Any, images_BCHW: Tensor) -> Tensor:
    normalized: Tensor = (images_BCHW - expert.mean) / expert.std
    return normalized


def test_depth__features_are_the_backbones(depth_folder: tuple[Any, str]) -> None:
    model, source = depth_folder
    expert = loaded(DepthExpert(source=source))
    assert (expert.grid_hw, expert.token_dim, expert.tokens, expert.image_size) == ((4, 4), 16, "features", 56)
    images_BCHW = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        expected_BNE = model.backbone(pixels(expert, images_BCHW)).feature_maps[-1]
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, expected_BNE[:, 1:], atol=1e-5, rtol=1e-5)
        states = model.backbone(pixels(expert, images_BCHW), output_hidden_states=True).hidden_states
        second = loaded(DepthExpert(source=source, layer=-2))(images_BCHW).tokens_BSE
    torch.testing.assert_close(second, states[-2][:, 1:], atol=1e-5, rtol=1e-5)


def test_depth__prediction_is_the_models(depth_folder: tuple[Any, str]) -> None:
    model, source = depth_folder
    raw = loaded(DepthExpert(source=source, tokens="prediction", scale="raw"))
    images_BCHW = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        expected_BHW = model(pixels(raw, images_BCHW)).predicted_depth
        tokens = raw(images_BCHW)
        assert tokens.grid_hw == (56, 56) and tokens.tokens_BSE.shape == (2, 56 * 56, 1)
        torch.testing.assert_close(tokens.tokens_BSE.view(2, 56, 56), expected_BHW, atol=1e-5, rtol=1e-5)
        unit = loaded(DepthExpert(source=source, tokens="prediction", map_size=28))(images_BCHW).tokens_BSE
    means = torch.nn.functional.avg_pool2d(expected_BHW[:, None], 2).flatten(1)
    spread = means.amax(1, keepdim=True) - means.amin(1, keepdim=True)
    assert spread.min() > 1e-3
    torch.testing.assert_close(unit[..., 0], (means - means.amin(1, keepdim=True)) / spread, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["depth_anything", "prompt_depth_anything"])
@pytest.mark.parametrize("tokens", ["features", "prediction"])
def test_depth__another_patch_than_the_backbones_is_refused(kind: str, tokens: Any) -> None:
    """The decoder counts patches by its own field: transformers fails on such a model once it runs."""
    with pytest.raises(ConfigError, match=r"patch_size of '\w+' is 16, but 14 in its backbone_config; .*14"):
        DepthExpert(config={**DEPTH, "model_type": kind, "patch_size": 16}, tokens=tokens)
    assert DepthExpert(config={**DEPTH, "model_type": kind, "patch_size": 14}, tokens=tokens).token_dim in (1, 16)


def test_depth__features_do_not_run_the_decoder(depth_folder: tuple[Any, str]) -> None:
    expert = loaded(DepthExpert(source=depth_folder[1]))
    expert.network.model.head.register_forward_hook(lambda *_: pytest.fail("the decoder ran"))
    expert(torch.rand(1, 3, 56, 56))


def test_segmentation__class_probabilities(tmp_path: Path) -> None:
    model = randomized(AutoModelForSemanticSegmentation.from_config(config_of(SEGFORMER)))
    source = str(saved(model, SegformerImageProcessor(size={"height": 64, "width": 64}), tmp_path))
    expert = loaded(SegmentationExpert(source=source, tokens="prediction"))
    assert (expert.image_size, expert.grid_hw, expert.token_dim) == (64, (16, 16), 5)
    images_BCHW = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels(expert, images_BCHW)).logits.softmax(1).flatten(2).transpose(1, 2)
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, expected, atol=1e-5, rtol=1e-5)
        features = loaded(SegmentationExpert(source=source))
        last = model.segformer(pixels(expert, images_BCHW)).last_hidden_state
        torch.testing.assert_close(
            features(images_BCHW).tokens_BSE, last.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5
        )
    smaller = loaded(SegmentationExpert(source=source, tokens="prediction", map_size=8))(images_BCHW).tokens_BSE
    assert smaller.shape == (2, 64, 5)
    torch.testing.assert_close(smaller.sum(-1), torch.ones(2, 64))


def test_segmentation__masks_with_classes(tmp_path: Path) -> None:
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}
    swin |= {"out_features": ["stage1", "stage2", "stage3", "stage4"], "image_size": 64}
    fields = {"model_type": "mask2former", "backbone_config": swin, "feature_size": 32, "mask_feature_size": 32}
    fields |= {"hidden_dim": 32, "encoder_feedforward_dim": 16, "dim_feedforward": 16, "num_attention_heads": 2}
    fields |= {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "num_labels": 4}
    expert = SegmentationExpert(config=fields, tokens="prediction", masks=True, image_size=64).eval()
    assert (expert.grid_hw, expert.token_dim) == ((16, 16), 4)
    images_BCHW = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output = expert.network.get_submodule("model")(pixels(expert, images_BCHW))
        found = expert(images_BCHW).tokens_BSE.transpose(1, 2).unflatten(2, (16, 16))
    classes, masks = output.class_queries_logits.softmax(-1), output.masks_queries_logits.sigmoid()
    by_hand = sum(classes[1, query, 2] * masks[1, query, 3, 7] for query in range(5))
    torch.testing.assert_close(found[1, 2, 3, 7], by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("options", "message"), [({"scale": "metres"}, "scale='metres' is unknown")])
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DepthExpert(config=DEPTH, **options)


def tiny_depth(**options: Any) -> DepthExpert:
    return DepthExpert(config=DEPTH, **{"tokens": "prediction", "scale": "raw", "map_size": 32, **options})


@pytest.mark.parametrize("normal", [(0.0, 0.0, 1.0), (0.3, 0.0, 0.9), (0.0, -0.4, 0.8), (0.2, 0.3, 0.9)])
def test_normals_of_a_plane_are_its_normal(normal: tuple[float, float, float]) -> None:
    """A plane n . p = 2 seen by a pinhole: along the ray (x, y, 1) its distance is 2 / (n . (x, y, 1))."""
    expert = NormalsFromDepth(depth=tiny_depth(), field_of_view=60.0, inverse=False)
    unit = torch.tensor(normal) / torch.tensor(normal).norm()
    focal = 16 / math.tan(math.radians(30))
    steps = (torch.arange(32) - 15.5) / focal
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    distance_HW = 2 / (unit[0] * x + unit[1] * y + unit[2])
    found_3HW = expert.normals(distance_HW[None, None])[0]
    inner = found_3HW[:, 2:-2, 2:-2]
    torch.testing.assert_close(inner, unit.view(3, 1, 1).expand_as(inner), atol=2e-2, rtol=0)


def test_normals__tokens_are_unit_vectors_of_the_depth_experts_grid() -> None:
    depth = tiny_depth()
    for parameter in depth.network.get_submodule("model.head").parameters():
        torch.nn.init.uniform_(parameter, 0.0, 0.5)
    expert = NormalsFromDepth(depth=depth).eval()
    assert (expert.token_dim, expert.grid_hw, expert.tokens, expert.inverse) == (3, (32, 32), "prediction", True)
    tokens_BSE = expert(torch.rand(2, 3, 40, 50)).tokens_BSE
    assert tokens_BSE.shape == (2, 1024, 3)
    torch.testing.assert_close(tokens_BSE.norm(dim=-1), torch.ones(2, 1024), atol=1e-4, rtol=0)
    assert len({expert.fingerprint(), NormalsFromDepth(depth=depth, field_of_view=50).fingerprint()}) == 2


def test_normals__inverse_depth_of_any_scale_and_shift_is_one_distance() -> None:
    expert = NormalsFromDepth(depth=tiny_depth(), nearest=0.25)
    inverse = torch.rand(1, 1, 8, 8)
    distance = expert.distance(inverse)
    assert (distance.min().item(), distance.max().item()) == pytest.approx((0.25, 1.0))
    assert distance.flatten().argmin() == inverse.flatten().argmax()  # the greatest inverse depth is nearest
    torch.testing.assert_close(expert.distance(inverse * 7 + 3), distance, atol=1e-5, rtol=1e-4)


def test_normals__refuse_what_gives_no_distances() -> None:
    for options in ({"scale": "image"}, {"tokens": "features"}):
        with pytest.raises(ConfigError, match="depth needs tokens: prediction and scale: raw"):
            NormalsFromDepth(depth=tiny_depth(**options))
    with pytest.raises(ConfigError, match=r"\(0, 180\) .* got 180.0 and 0.1"):
        NormalsFromDepth(depth=tiny_depth(), field_of_view=180.0)
    dpt = {"model_type": "dpt", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32}
    dpt |= {"intermediate_size": 16, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3], "fusion_hidden_size": 8}
    silent = DepthExpert(config={**dpt, "neck_hidden_sizes": [4, 8, 8, 8]}, tokens="prediction", scale="raw")
    with pytest.raises(ConfigError, match="NormalsFromDepth: .*inverse.*true or false"):
        NormalsFromDepth(depth=silent)
    assert NormalsFromDepth(depth=silent, inverse=True).inverse

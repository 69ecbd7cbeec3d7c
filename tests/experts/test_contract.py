"""Every expert of the package keeps the contract of ``VisionExpert``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import GenericAlias
from typing import Any

import open_clip
import pytest
import torch

import visexpert.experts
import visexpert.tabletop
from tests.experts.tiny_models import CLIP_VISION, DEPTH, DINOV2, SAM, SEGFORMER, TIMM, TIMM_ARGUMENTS
from visexpert.experts import (
    DepthExpert,
    ExpertHub,
    KorniaEdges,
    NormalsFromDepth,
    OpenClipExpert,
    SegmentationExpert,
    TimmExpert,
    TransformersExpert,
    VisionExpert,
)
from visexpert.tabletop import TinyExpert
from visexpert.types import Batch, ExpertTokens

TOWER = {
    "embed_dim": 10,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 24, "head_width": 6},
}
SEGMENTATION: dict[str, Any] = {"config": SEGFORMER, "image_size": 64}

BUILDERS: dict[str, Callable[[], VisionExpert]] = {
    "timm": lambda: TimmExpert(model=TIMM, weights="random", arguments=TIMM_ARGUMENTS, image_size=64),
    "timm, cropped": lambda: TimmExpert(
        model=TIMM, weights="random", arguments=TIMM_ARGUMENTS, image_size=64, framing="own", layer=-2
    ),
    "timm, convolutions": lambda: TimmExpert(model="resnet18.tv_in1k", weights="random", image_size=64),
    "open_clip": lambda: OpenClipExpert(model="tiny-vit", weights="random"),
    "CLIP": lambda: TransformersExpert(config={**CLIP_VISION, "model_type": "clip_vision_model"}, layer=-2),
    "DINOv2": lambda: TransformersExpert(config=DINOV2),
    "SAM": lambda: TransformersExpert(
        config=SAM, processor={"image_processor_type": "SamImageProcessor"}, framing="own"
    ),
    "depth, features": lambda: DepthExpert(config=DEPTH),
    "depth, prediction": lambda: DepthExpert(config=DEPTH, tokens="prediction", map_size=14),
    "segmentation, features": lambda: SegmentationExpert(**SEGMENTATION),
    "segmentation, prediction": lambda: SegmentationExpert(**SEGMENTATION, tokens="prediction"),
    "edges": lambda: KorniaEdges(image_size=32),
    "edges, sobel": lambda: KorniaEdges(method="sobel", image_size=32, map_size=16),
    "normals": lambda: NormalsFromDepth(depth=DepthExpert(config=DEPTH, tokens="prediction", scale="raw", map_size=14)),
    "zoo": lambda: TinyExpert(source="zoo:depth"),
}


@pytest.fixture(autouse=True)
def tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", TOWER)


def test_every_expert_of_the_package_is_below() -> None:
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for package in (visexpert.experts, visexpert.tabletop)
        for found in pkgutil.iter_modules(package.__path__)
    ]
    found = {
        item
        for module in modules
        for item in vars(module).values()
        if inspect.isclass(item) and not isinstance(item, GenericAlias)
    }
    experts = {item for item in found if issubclass(item, VisionExpert) and not inspect.isabstract(item)}
    concrete = {item for item in experts if not any(issubclass(other, item) for other in experts - {item})}
    assert concrete == {type(build()) for build in BUILDERS.values()}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_contract(name: str) -> None:
    """Images of any size give tokens of the size that was said, each image's its own, frozen, in any precision."""
    expert = BUILDERS[name]()
    hub = ExpertHub({"it": expert})

    def tokens_of(images_BCHW: torch.Tensor) -> ExpertTokens:
        return hub(Batch(images_BCHW, torch.arange(len(images_BCHW)), split=""))["it"]  # type: ignore[no-any-return]

    hub.train()
    expert.load_weights()
    for shape in ((expert.image_size, expert.image_size), (37, 90)):
        images_BCHW = torch.rand(3, 3, *shape)
        tokens = tokens_of(images_BCHW)
        assert tokens.grid_hw == expert.grid_hw
        assert tokens.tokens_BSE.shape == (3, expert.grid_hw[0] * expert.grid_hw[1], expert.token_dim)
        assert tokens.tokens_BSE.isfinite().all() and not tokens.tokens_BSE.requires_grad
        alone = tokens_of(images_BCHW[1:2]).tokens_BSE
        torch.testing.assert_close(alone, tokens.tokens_BSE[1:2], atol=1e-4, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokens_of(images_BCHW).tokens_BSE.isfinite().all()
    assert not any(parameter.requires_grad for parameter in hub.parameters())
    assert expert.fingerprint() == expert.fingerprint()


@pytest.mark.parametrize("name", BUILDERS)
def test_sizes_are_known_before_weights_and_without_memory(name: str) -> None:
    expert = BUILDERS[name]()
    with torch.device("meta"):
        twin = BUILDERS[name]()
    assert all(parameter.is_meta for parameter in twin.parameters())
    sizes = [(e.image_size, e.token_dim, e.grid_hw, e.tokens, e.license) for e in (expert, twin)]
    assert sizes[0] == sizes[1]

"""An expert's own summary of the image: what each library pools, and its width without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests.experts.test_open_clip import VIT
from tests.experts.tiny_models import CLIP_VISION, DINOV2, SAM, TIMM_ARGUMENTS, randomized
from visexpert.errors import WeightsError
from visexpert.experts import OpenClipExpert, TimmExpert, TransformersExpert, VisionExpert
from visexpert.networks.open_clip import STUB_TEXT

SMALL: dict[str, Any] = {**CLIP_VISION, "hidden_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", **SMALL},
    "siglip": {"model_type": "siglip_vision_model", **SMALL},
    "siglip without a head": {"model_type": "siglip_vision_model", "vision_use_head": False, **SMALL},
    "dinov2": DINOV2,
    "dinov3": {"model_type": "dinov3_vit", "num_register_tokens": 2, **SMALL},
    "sam": SAM,
    "vit, whose pooler may have no weights": {"model_type": "vit", **SMALL},
}
WIDTHS = {"clip": 24, "siglip": 24, "dinov2": 16, "dinov3": 24}


def summarized(expert: VisionExpert) -> tuple[VisionExpert, Tensor, Tensor | None]:
    """The expert, preprocessed images, and its summary of them."""
    expert.eval().summarizes = True
    images_BCHW = torch.rand(2, 3, expert.image_size, expert.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return expert, expert.preprocess(images_BCHW), expert(images_BCHW).summary_BF


@pytest.mark.parametrize("family", FAMILIES)
def test_of_transformers_it_is_the_pooled_output(family: str) -> None:
    expert, pixels_BCHW, summary_BF = summarized(TransformersExpert(config=FAMILIES[family]))
    assert expert.summary_width() == WIDTHS.get(family)
    if family not in WIDTHS:
        assert summary_BF is None
        return
    assert summary_BF is not None
    with torch.no_grad():
        own = expert.network.model(pixels_BCHW)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(summary_BF, own.pooler_output, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "arguments", "width"),
    [
        ("vit_tiny_patch16_224", {}, 24),
        ("vit_base_patch16_siglip_224", {"patch_size": 16}, 24),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, None),  # the mean of its patch tokens
        ("resnet18", None, None),
    ],
)
def test_of_timm_it_is_cls_or_attention(name: str, arguments: dict[str, Any] | None, width: int | None) -> None:
    given = {} if arguments is None else {**TIMM_ARGUMENTS, **arguments}
    expert, pixels_BCHW, summary_BF = summarized(TimmExpert(model=name, weights="random", arguments=given))
    assert expert.summary_width() == width
    if width is None:
        assert summary_BF is None
        return
    assert summary_BF is not None
    with torch.no_grad():
        own = expert.network.model(pixels_BCHW)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(summary_BF, own, atol=1e-6, rtol=0)


def test_of_open_clip_it_is_the_image_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", VIT)
    clip: Any = randomized(CLIP(VIT["embed_dim"], VIT["vision_cfg"], STUB_TEXT, quick_gelu=False))
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    made = OpenClipExpert(model="tiny-vit", weights=str(tmp_path / "clip.safetensors"))
    made.load_weights()
    expert, pixels_BCHW, summary_BF = summarized(made)
    with torch.no_grad():
        own = clip.visual(pixels_BCHW)
    assert expert.summary_width() == own.shape[1] == 10 and summary_BF is not None
    torch.testing.assert_close(summary_BF, own, atol=1e-5, rtol=1e-5)
    assert OpenClipExpert(model="tiny-vit", weights="random", layer=-2).summary_width() is None


def test_it_is_left_out_unless_asked_for_and_tokens_stay() -> None:
    expert, _, summary_BF = summarized(TransformersExpert(config=FAMILIES["clip"]))
    images_BCHW = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        asked = expert(images_BCHW)
        expert.summarizes = False
        plain = expert(images_BCHW)
    assert summary_BF is not None and plain.summary_BF is None and torch.equal(plain.tokens_BSE, asked.tokens_BSE)


def test_a_pooling_head_without_weights_is_refused_as_summary(tmp_path: Path) -> None:
    fields = {name: value for name, value in FAMILIES["siglip"].items() if name != "model_type"}
    SiglipVisionModel(SiglipVisionConfig(**fields, vision_use_head=False)).save_pretrained(tmp_path / "siglip")
    config = tmp_path / "siglip" / "config.json"
    config.write_text(config.read_text().replace('"vision_use_head": false', '"vision_use_head": true'))
    expert = TransformersExpert(
        source=str(tmp_path / "siglip"), processor={"image_processor_type": "SiglipImageProcessor"}
    )
    expert.load_weights()  # patch tokens need no head
    expert.summarizes = True
    with pytest.raises(WeightsError, match=r"head.*agglomeration\.summary"):
        expert.load_weights()

"""OpenClipExpert against open_clip itself, on tiny random towers in the formats that open_clip publishes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor

from tests.experts.tiny_models import randomized
from visexpert.errors import ConfigError, WeightsError
from visexpert.experts import OpenClipExpert
from visexpert.networks.open_clip import STUB_TEXT

VIT: dict[str, Any] = {
    "embed_dim": 10,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 24, "head_width": 6},
}
TIMM: dict[str, Any] = {
    "embed_dim": 10,
    "vision_cfg": {"image_size": 64, "timm_model_name": "resnet18", "timm_pool": "", "timm_proj": "linear"},
}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names more in open_clip's list, as ``open_clip.add_model_config`` would put them there."""
    for name, settings in (("tiny-vit", VIT), ("tiny-timm", TIMM)):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, settings)


def published(path: Path, settings: dict[str, Any], **changes: Any) -> Any:
    """A whole CLIP written as a checkpoint; returns its image tower."""
    vision = {**settings["vision_cfg"], **changes}
    model: Any = randomized(CLIP(settings["embed_dim"], vision, STUB_TEXT, quick_gelu=False))
    save_file(model.state_dict(), path)
    return model.visual


def loaded(**options: Any) -> OpenClipExpert:
    expert = OpenClipExpert(**options).eval()
    expert.load_weights()
    return expert


def expected(visual: Any, expert: OpenClipExpert, images_BCHW: Tensor, index: int, norm: bool) -> Tensor:
    with torch.no_grad():
        found = visual.forward_intermediates(
            (images_BCHW - expert.mean) / expert.std, indices=[index], output_fmt="NCHW", normalize_intermediates=norm
        )
    map_BEHW: Tensor = found["image_intermediates"][0]
    return map_BEHW.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("name", "settings", "grid", "width"), [("tiny-vit", VIT, 4, 24), ("tiny-timm", TIMM, 2, 512)])
def test_tokens_equal_open_clips(tmp_path: Path, name: str, settings: dict[str, Any], grid: int, width: int) -> None:
    visual = published(tmp_path / "clip.safetensors", settings)
    expert = loaded(model=name, weights=str(tmp_path / "clip.safetensors"))
    assert (expert.grid_hw, expert.token_dim) == ((grid, grid), width)
    images_BCHW = torch.rand(2, 3, expert.image_size, expert.image_size)
    last = len(visual.transformer.resblocks) - 1 if name == "tiny-vit" else 4
    reference = expected(visual, expert, images_BCHW, last, norm=True)
    torch.testing.assert_close(expert(images_BCHW).tokens_BSE, reference, atol=1e-4, rtol=1e-4)


def test_a_layer_is_that_block_without_the_final_norm(tmp_path: Path) -> None:
    visual = published(tmp_path / "clip.safetensors", VIT)
    expert = loaded(model="tiny-vit", weights=str(tmp_path / "clip.safetensors"), layer=-2)
    images_BCHW = torch.rand(2, 3, 32, 32)
    reference = expected(visual, expert, images_BCHW, 1, norm=False)
    torch.testing.assert_close(expert(images_BCHW).tokens_BSE, reference, atol=1e-4, rtol=1e-4)


def test_another_size_equals_open_clips_own_interpolation(tmp_path: Path) -> None:
    visual = published(tmp_path / "clip.safetensors", VIT)
    expert = loaded(model="tiny-vit", weights=str(tmp_path / "clip.safetensors"), image_size=48)
    state = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    target: Any = CLIP(10, {**VIT["vision_cfg"], "image_size": 48}, STUB_TEXT)
    open_clip.model.resize_pos_embed(state, target)
    positions = expert.network.state_dict()["visual.positional_embedding"]
    assert expert.grid_hw == (6, 6)
    torch.testing.assert_close(positions, state["visual.positional_embedding"])


def test_the_tag_decides_weights_normalization_and_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with torch.device("meta"):
        expert = OpenClipExpert(model="ViT-B-32", weights="openai")
    assert (expert.grid_hw, expert.token_dim, expert.image_size) == ((7, 7), 768, 224)
    assert type(expert.network.get_submodule("visual.transformer.resblocks.0.mlp.gelu")).__name__ == "QuickGELU"
    assert expert.preprocessing.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    with pytest.raises(WeightsError, match=r"'timm/vit_base_patch32_clip_224.openai' is not in the cache"):
        expert.load_weights()


def test_random_towers_keep_their_weights() -> None:
    expert = OpenClipExpert(model="tiny-vit", weights="random")
    before = expert.fingerprint()
    expert.load_weights()
    assert expert.fingerprint() == before


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"open_clip has no model 'ViT-B-33'; the nearest are \['ViT-B-"):
        OpenClipExpert(model="ViT-B-33", weights="openai")
    with pytest.raises(ConfigError, match="OpenClipExpert: .* 32 px"):
        OpenClipExpert(model="tiny-vit", weights="random", layer=7)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors .*visual\."):
        loaded(model="tiny-vit", weights=str(tmp_path / "x.safetensors"))
    published(tmp_path / "wide.safetensors", VIT, width=36)
    with pytest.raises(WeightsError, match="of another shape"):
        loaded(model="tiny-vit", weights=str(tmp_path / "wide.safetensors"))


@pytest.mark.parametrize(("pool", "shared"), [(True, 10), ("parallel", 24), ("cascade", 24)])
def test_coca_gives_the_features_before_its_pooling(tmp_path: Path, pool: bool | str, shared: int) -> None:
    """In a folder as open_clip writes it. The norm comes behind a single pooling, but before one of two."""
    text = {**STUB_TEXT, "embed_cls": True, "output_tokens": True}
    vision = {**VIT["vision_cfg"], "attentional_pool": pool, "attn_pooler_heads": 2, "output_tokens": True}
    settings = {
        "embed_dim": shared,
        "vision_cfg": vision,
        "text_cfg": text,
        "multimodal_cfg": {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1},
    }
    model: Any = randomized(open_clip.CoCa(**settings, quick_gelu=False))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    written = {"model_cfg": settings, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
    expert = loaded(model="coca_ViT-B-32", weights=str(tmp_path))
    assert expert.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3]) and expert.token_dim == 24
    seen: list[Tensor] = []
    before_pooling = model.visual.transformer if pool is True else model.visual.ln_post
    before_pooling.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images_BCHW = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        model.visual((images_BCHW - expert.mean) / expert.std)
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, seen[0][:, 1:], atol=1e-5, rtol=1e-5)


POOLED: dict[str, Any] = {"pool_type": "avg", "no_ln_pre": True}
TOKENS: dict[str, dict[str, Any]] = {
    "clipa": {**POOLED, "final_ln_after_pool": True},
    "norm_behind_the_class_token": {"final_ln_after_pool": True},
    "norm_before_the_mean": POOLED,
    "sin_cos": {"pos_embed_type": "sin_cos_2d"},
    "activation_and_norm": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 0.1}},
    "scaled_blocks": {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True},
    "patch_dropout": {"patch_dropout": 0.5, "ls_init_value": 0.1},
}


@pytest.mark.parametrize("name", list(TOKENS))
def test_tokens_are_what_open_clip_calls_so(tmp_path: Path, name: str) -> None:
    """Its own forward says by ``output_tokens`` which ones they are; a norm behind the pooling is none of theirs."""
    written = tmp_path / "clip.safetensors"
    visual = published(written, VIT, **TOKENS[name])
    settings = {"embed_dim": 10, "vision_cfg": {**VIT["vision_cfg"], **TOKENS[name]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}), encoding="utf-8")
    written.rename(tmp_path / "open_clip_model.safetensors")
    expert = loaded(model="tiny-vit", weights=str(tmp_path))
    visual.output_tokens = True
    images_BCHW = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        _, tokens_BSE = visual((images_BCHW - expert.mean) / expert.std)
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, tokens_BSE, atol=1e-4, rtol=1e-4)


def test_a_norm_behind_the_pooling_makes_other_fingerprints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the same, the tokens are not: the feature store must not take one for the other."""
    published(tmp_path / "clip.safetensors", VIT)
    found = []
    for after in (False, True):
        vision = {**VIT["vision_cfg"], "final_ln_after_pool": after}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", {**VIT, "vision_cfg": vision})
        found.append(loaded(model="tiny-vit", weights=str(tmp_path / "clip.safetensors")).fingerprint())
    assert found[0] != found[1]


def test_timm_trunks_give_what_is_pooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MobileCLIP's FastViT has a convolution between its last stage and the pooling, as :class:`TimmExpert` has it."""
    vision = {"image_size": 64, "timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None}
    settings = {"embed_dim": 10, "vision_cfg": vision}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-mobile", settings)
    visual = published(tmp_path / "clip.safetensors", settings)
    expert = loaded(model="tiny-mobile", weights=str(tmp_path / "clip.safetensors"))
    seen: list[Tensor] = []
    visual.trunk.final_conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images_BCHW = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        visual((images_BCHW - expert.mean) / expert.std)
        tokens_BSE = expert(images_BCHW).tokens_BSE
    torch.testing.assert_close(tokens_BSE, seen[0].flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    stage = loaded(model="tiny-mobile", weights=str(tmp_path / "clip.safetensors"), layer=-1)
    assert (expert.token_dim, stage.token_dim) == (768, 384)


def test_a_tower_for_images_that_are_no_squares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {**VIT, "vision_cfg": {**VIT["vision_cfg"], "image_size": [32, 48]}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-wide", wide)
    with pytest.raises(ConfigError, match=r"32 x 48 px.*squares"):
        OpenClipExpert(model="tiny-wide", weights="random")

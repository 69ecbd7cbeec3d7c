"""The converter against open_clip's own forward and Hugging Face's, on tiny random towers, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip import CLIP, get_model_config
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from visexpert.errors import ConfigError, WeightsError
from visexpert.vision.convert import (
    clip_config,
    from_hugging_face,
    from_open_clip,
    open_clip_config,
    to_hugging_face,
    to_open_clip,
)

FIELDS: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-3,
}


def hugging_face(act: str = "quick_gelu") -> CLIPVisionModel:
    """A random CLIPVisionModel whose every weight matters, biases and norms included."""
    model: CLIPVisionModel = CLIPVisionModel(CLIPVisionConfig(**FIELDS, hidden_act=act)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def open_clip_tower(settings: dict[str, Any], embed_dim: int) -> Any:
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    model = CLIP(embed_dim, settings["vision_cfg"], text, quick_gelu=settings.get("quick_gelu", False))
    tower: nn.Module = model.visual
    return tower.eval()


def compare(model: CLIPVisionModel, tower: Any, projection_DP: Tensor) -> None:
    pixels_BCHW = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        theirs = tower.forward_intermediates(pixels_BCHW, output_fmt="NLC", output_extra_tokens=True)
        ours = model(pixels_BCHW, output_hidden_states=True)
    for index in range(3):
        tokens = torch.cat([theirs["image_intermediates_prefix"][index], theirs["image_intermediates"][index]], 1)
        torch.testing.assert_close(tokens, ours.hidden_states[index + 1], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(theirs["image_features"], ours.pooler_output @ projection_DP, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_outwards_equals_open_clips_forward(act: str) -> None:
    model = hugging_face(act)
    tower = open_clip_tower(open_clip_config(model.config), 24)
    tower.load_state_dict(to_open_clip(model.state_dict()), strict=True)
    compare(model, tower, torch.eye(24))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_inwards_equals_open_clips_forward(quick_gelu: bool) -> None:
    cfg: dict[str, Any] = {
        "embed_dim": 10,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 24, "head_width": 6},
    }
    tower = open_clip_tower(cfg, 10)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3)
    whole = {f"visual.{key}": value for key, value in tower.state_dict().items()} | {"logit_scale": torch.tensor(1.0)}
    model = CLIPVisionModel(CLIPVisionConfig(**clip_config(cfg))).eval()
    for state in (whole, tower.state_dict()):
        vision = from_open_clip(state)
        model.load_state_dict(dict(vision.state), strict=True)
        assert vision.projection_DP is not None
        compare(model, tower, vision.projection_DP)


def test_there_and_back_is_exact() -> None:
    model = hugging_face()
    vision = from_open_clip(to_open_clip(model.state_dict(), projection_DP=torch.ones(24, 5)))
    expected = model.state_dict()
    assert vision.state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in vision.state.items())
    assert vision.projection_DP is not None and vision.projection_DP.shape == (24, 5)
    settings = open_clip_config(model.config) | {"embed_dim": 5}
    assert clip_config(settings).items() >= (FIELDS | {"hidden_act": "quick_gelu", "projection_dim": 5}).items()


@pytest.mark.parametrize("width", [24, 96, 1000, 1408])
def test_the_hidden_width_survives_the_ratio(width: int) -> None:
    for hidden in range(width, 4 * width, 7):
        config = CLIPVisionConfig(hidden_size=width, intermediate_size=hidden, num_attention_heads=1)
        assert int(width * open_clip_config(config)["vision_cfg"]["mlp_ratio"]) == hidden


def test_what_does_not_fit_is_refused() -> None:
    state = to_open_clip(hugging_face().state_dict())
    with pytest.raises(WeightsError, match=r"hold \['attn_pool.query'\], which CLIPVisionModel does not have"):
        from_open_clip(state | {"attn_pool.query": torch.zeros(1)})
    del state["transformer.resblocks.1.ln_2.bias"]
    with pytest.raises(WeightsError, match=r"lack 'transformer.resblocks.1.ln_2.bias'; only plain ViT"):
        from_open_clip(state)
    with pytest.raises(ConfigError, match=r"no vision tower with hidden_act='relu', only \['gelu', 'gelu_new'"):
        open_clip_config(CLIPVisionConfig(**FIELDS, hidden_act="relu"))
    for vision_cfg, named in (({"timm_model_name": "vit_x"}, "vit_x of timm"), ({"layers": [3, 4, 6, 3]}, "layers")):
        with pytest.raises(ConfigError, match=named):
            clip_config({"embed_dim": 8, "vision_cfg": vision_cfg})


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_the_projection_travels_both_ways(act: str) -> None:
    """open_clip's image embedding, which the projection ends, equals ``image_embeds`` of transformers."""
    config = CLIPVisionConfig(**FIELDS, hidden_act=act, projection_dim=10)
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tower_in = from_hugging_face(model.state_dict())
    tower = open_clip_tower(open_clip_config(config), 10)
    tower.load_state_dict(to_open_clip(tower_in.state, projection_DP=tower_in.projection_DP), strict=True)
    pixels_BCHW = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels_BCHW).image_embeds
        torch.testing.assert_close(tower(pixels_BCHW), expected, atol=2e-4, rtol=1e-4)
    back = to_hugging_face(from_open_clip(tower.state_dict()))
    fresh = CLIPVisionModelWithProjection(config).eval()
    fresh.load_state_dict(back, strict=True)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_whole_clip_of_transformers_gives_its_vision_tower() -> None:
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(vision_config=FIELDS, text_config=text, projection_dim=6))
    state = model.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}  # an old buffer
    tower = from_hugging_face(state)
    assert tower.state.keys() == hugging_face().state_dict().keys()
    assert tower.projection_DP is not None and tower.projection_DP.shape == (24, 6)
    plain = to_hugging_face(from_hugging_face(hugging_face().state_dict()))
    assert not any("projection" in key for key in plain)


@pytest.mark.parametrize("name", ["ViT-L-14-336", "ViT-L-14-336-quickgelu", "ViT-B-16", "ViT-B-32"])
def test_published_architectures_have_the_exact_keys_and_shapes_both_ways(name: str) -> None:
    """On ``meta``: L/14-336 has the 303.5 M parameters of methods C1, and no key is left over on either side."""
    cfg = get_model_config(name)
    with torch.device("meta"):
        config = CLIPVisionConfig(**clip_config(cfg))
        model = CLIPVisionModel(config)
        tower = open_clip_tower(cfg, int(cfg["embed_dim"]))
    theirs = {key: value.shape for key, value in tower.state_dict().items()}
    ours = {key: value.shape for key, value in model.state_dict().items()}
    read = from_open_clip(tower.state_dict())
    assert {key: value.shape for key, value in read.state.items()} == ours
    written = to_open_clip(model.state_dict(), projection_DP=read.projection_DP)
    assert {key: value.shape for key, value in written.items()} == theirs
    if "L-14-336" in name:
        assert round(sum(value.numel() for value in model.state_dict().values()) / 1e6, 1) == 303.5
        assert config.hidden_act == ("quick_gelu" if "quick" in name else "gelu")
        assert model.state_dict()["embeddings.position_embedding.weight"].shape == (577, 1024)

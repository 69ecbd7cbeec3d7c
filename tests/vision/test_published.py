"""CLIPs of transformers and open_clip, as both write them, give the same tokens as in their own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CLIP
from open_clip.model import resize_pos_embed, set_model_preprocess_cfg
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from tests.io.hub import put_in_cache
from visexpert.errors import ConfigError, WeightsError
from visexpert.networks.positions import resize_positions
from visexpert.vision import ClipEncoder
from visexpert.vision.published import describe_clip

FIELDS: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
CFG: dict[str, Any] = {
    "embed_dim": 10,
    "quick_gelu": True,
    "text_cfg": TEXT,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 24, "head_width": 6},
}


def randomized(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def open_clip_model(**changes: Any) -> Any:
    cfg = {**CFG, **changes}
    return randomized(CLIP(cfg["embed_dim"], cfg["vision_cfg"], TEXT, quick_gelu=cfg["quick_gelu"]))


@pytest.fixture
def transformers_folder(tmp_path: Path) -> Path:
    """A whole CLIP, text tower included, in save_pretrained form."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    model = randomized(CLIPModel(CLIPConfig(vision_config=FIELDS, text_config=text, projection_dim=10)))
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def open_clip_folder(tmp_path: Path) -> Path:
    """A whole CLIP in the form in which open_clip puts it on the Hugging Face Hub, written by open_clip's own code."""
    model = open_clip_model()
    (folder := tmp_path / "oc").mkdir()
    set_model_preprocess_cfg(model, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]})
    save_config_for_hf(model, folder / "open_clip_config.json", CFG)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def loaded(**options: Any) -> ClipEncoder:
    encoder = ClipEncoder(layer=-1, **options).eval()
    encoder.load_weights()
    return encoder


def check_against_open_clip(encoder: ClipEncoder, visual: Any, size: int = 32) -> None:
    images_BCHW = torch.rand(2, 3, size, size)
    with torch.no_grad():
        pixels_BCHW = (images_BCHW - encoder.mean) / encoder.std
        theirs = visual.forward_intermediates(pixels_BCHW, indices=[2], output_fmt="NLC")["image_intermediates"][0]
        torch.testing.assert_close(encoder(images_BCHW).tokens_BTD, theirs, atol=2e-4, rtol=1e-4)


def test_a_whole_clip_of_transformers(transformers_folder: Path) -> None:
    reference = CLIPVisionModel.from_pretrained(transformers_folder).eval()
    encoder = loaded(source=str(transformers_folder))
    images_BCHW = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        states = reference((images_BCHW - encoder.mean) / encoder.std).last_hidden_state
        torch.testing.assert_close(encoder(images_BCHW).tokens_BTD, states[:, 1:], atol=1e-5, rtol=1e-5)
    assert encoder.model.state_dict().keys() == reference.state_dict().keys()


def test_a_folder_of_open_clip(open_clip_folder: Path) -> None:
    encoder = loaded(source=str(open_clip_folder))
    visual = open_clip_model().visual
    tensors = load_file(open_clip_folder / "open_clip_model.safetensors")
    visual.load_state_dict({k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("visual.")})
    check_against_open_clip(encoder, visual)
    assert encoder.config.hidden_act == "quick_gelu" and encoder.config.num_attention_heads == 4
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    torch.testing.assert_close(encoder.std.flatten(), torch.tensor([0.2, 0.3, 0.4]))


def test_the_width_of_the_projection_is_that_of_the_files(
    transformers_folder: Path, open_clip_folder: Path, tmp_path: Path
) -> None:
    """``vision_config`` of a whole CLIP says 512, which nothing reads; the projection itself is decisive."""
    config = json.loads((transformers_folder / "config.json").read_text(encoding="utf-8"))
    assert config["projection_dim"] == 10 and config["vision_config"]["projection_dim"] == 512
    for folder in (transformers_folder, open_clip_folder):
        assert describe_clip(str(folder)).fields["projection_dim"] == 10
        encoder = loaded(source=str(folder))
        assert encoder.projection_dim == encoder.config.projection_dim == 10
    alone = tmp_path / "alone.safetensors"
    save_file(load_file(transformers_folder / "model.safetensors"), alone)
    encoder = loaded(source=str(alone), config=FIELDS)
    assert encoder.projection_dim == encoder.config.projection_dim == 10
    CLIPVisionModel.from_pretrained(transformers_folder).save_pretrained(tmp_path / "vision")
    assert loaded(source=str(tmp_path / "vision")).projection_dim is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_file_of_open_clip(tmp_path: Path, suffix: str, quick_gelu: bool) -> None:
    model = open_clip_model(quick_gelu=quick_gelu)
    path = tmp_path / f"clip{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    act = "quick_gelu" if quick_gelu else "gelu"
    check_against_open_clip(loaded(source=str(path), config={**FIELDS, "hidden_act": act}), model.visual)


def test_an_id_of_the_hub(open_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = loaded(source=str(open_clip_folder))
    put_in_cache(monkeypatch, tmp_path / "cache", "org/clip", open_clip_folder)
    for text in ("org/clip", "hf:org/clip"):
        encoder = loaded(source=text)
        assert encoder.fingerprint() == there.fingerprint()
        assert encoder.plain_copy().source == text


def test_an_id_that_is_not_here_builds_from_what_was_given_and_then_says_what_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with torch.device("meta"):
        encoder = ClipEncoder(source="openai/clip-vit-large-patch14-336", architecture="ViT-L-14-336-quickgelu")
    assert (encoder.width, encoder.grid_hw, encoder.image_size) == (1024, (24, 24), 336)
    assert round(sum(p.numel() for p in encoder.model.parameters()) / 1e6, 1) == 303.5
    with pytest.raises(WeightsError, match=r"`hf download openai/clip-vit-large-patch14-336`"):
        encoder.load_weights()
    with pytest.raises(WeightsError, match=r"config.json of 'openai/clip-vit-large-patch14-336' is not in the cache"):
        ClipEncoder(source="openai/clip-vit-large-patch14-336")


def test_what_was_given_must_agree_with_what_the_files_say(
    open_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activation and heads leave no trace in the shapes: a wrong one would load and be silently another network."""
    given = {**FIELDS, "hidden_act": "gelu"}
    with pytest.raises(ConfigError, match=r"hidden_act='gelu' was given, but the weights of .* with 'quick_gelu'"):
        ClipEncoder(source=str(open_clip_folder), config=given)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    encoder = ClipEncoder(source="org/clip", config={**FIELDS, "num_attention_heads": 2})  # nothing is here yet
    put_in_cache(monkeypatch, tmp_path / "cache", "org/clip", open_clip_folder)
    with pytest.raises(ConfigError, match="num_attention_heads=2 was given, but the weights of 'org/clip'"):
        encoder.load_weights()
    good = loaded(source="org/clip", config=FIELDS)
    assert good.fingerprint() == loaded(source=str(open_clip_folder)).fingerprint()


def test_normalization_that_arrives_with_the_weights_is_used(
    open_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    encoder = ClipEncoder(source="org/clip", config=FIELDS, layer=-1)
    put_in_cache(monkeypatch, tmp_path / "cache", "org/clip", open_clip_folder)
    encoder.load_weights()
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))


@pytest.mark.parametrize(
    ("name", "act", "repo"),
    [
        ("ViT-L-14-336/openai", "quick_gelu", "timm/vit_large_patch14_clip_336.openai"),
        ("ViT-B-16/laion2b_s34b_b88k", "gelu", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
    ],
)
def test_names_of_open_clip(name: str, act: str, repo: str) -> None:
    """OpenAI's weights were trained with quick-GELU, though the name ViT-L-14-336 stands for GELU."""
    clip = describe_clip(f"open_clip:{name}")
    assert clip.fields["hidden_act"] == act and clip.source is not None and clip.source.repo == repo


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"open_clip has no model 'ViT-B-17'; the nearest are \['ViT-B-"):
        ClipEncoder(source="open_clip:ViT-B-17/openai")
    with pytest.raises(ConfigError, match=r"'nope' of ViT-B-16 .*openai"):
        ClipEncoder(source="open_clip:ViT-B-16/nope")
    with pytest.raises(ConfigError, match=r"is incomplete; write 'open_clip:NAME/TAG'"):
        ClipEncoder(source="open_clip:ViT-B-16")
    with pytest.raises(ConfigError, match="plain ViT towers only.*OpenClipExpert"):
        ClipEncoder(source="open_clip:convnext_xxlarge/laion2b_s34b_b82k_augreg_soup")
    with pytest.raises(ConfigError, match="both name the architecture"):
        ClipEncoder(config=FIELDS, architecture="ViT-B-16")
    with pytest.raises(ConfigError, match="names its own architecture"):
        ClipEncoder(source="open_clip:ViT-B-16/openai", config=FIELDS)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"are named x, and contain no CLIP vision tower"):
        ClipEncoder(source=str(tmp_path / "x.safetensors"))
    save_file(open_clip_model().state_dict(), tmp_path / "z.safetensors")
    with pytest.raises(ConfigError, match=r"holds only weights; name their model with architecture"):
        ClipEncoder(source=str(tmp_path / "z.safetensors"))
    with pytest.raises(WeightsError, match="no weights at .*y.pt"):
        ClipEncoder(source=str(tmp_path / "y.pt"))


@pytest.mark.parametrize("size", [16, 48, 64])
def test_another_image_size_equals_interpolation_by_transformers(transformers_folder: Path, size: int) -> None:
    reference = CLIPVisionModel.from_pretrained(transformers_folder).eval()
    encoder = loaded(source=str(transformers_folder), image_size=size)
    assert encoder.grid_hw == (size // 8, size // 8)
    images_BCHW = torch.rand(2, 3, size, size)
    with torch.no_grad():
        pixels = (images_BCHW - encoder.mean) / encoder.std
        states = reference(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(encoder(images_BCHW).tokens_BTD, states[:, 1:], atol=1e-5, rtol=1e-5)
    assert encoder.plain_copy().image_size == size


def reference_at(size: int) -> Any:
    """An open_clip model at another size, filled by open_clip's own resizing of its position embeddings."""
    model = open_clip_model()
    vision = {**CFG["vision_cfg"], "image_size": size}
    fitted = CLIP(CFG["embed_dim"], vision, TEXT, quick_gelu=CFG["quick_gelu"]).eval()
    state = model.state_dict()
    resize_pos_embed(state, fitted)
    fitted.load_state_dict(state)
    return model, fitted


@pytest.mark.parametrize("size", [16, 24, 48])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_another_image_size_equals_interpolation_by_open_clip(tmp_path: Path, form: str, size: int) -> None:
    model, fitted = reference_at(size)
    set_model_preprocess_cfg(model, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]})
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    options: dict[str, Any] = {"source": str(tmp_path), "image_size": size}
    if form == "folder":
        save_config_for_hf(model, tmp_path / "open_clip_config.json", CFG)
    else:  # transformers' names for the architecture alone: the weights are open_clip's
        (tmp_path / "open_clip_model.safetensors").rename(file := tmp_path / "clip.safetensors")
        options |= {"source": str(file), "config": {**FIELDS, "hidden_act": "quick_gelu"}}
    check_against_open_clip(loaded(**options), fitted.visual, size)


def test_weights_of_another_size_are_refused_unless_one_was_asked_for(transformers_folder: Path) -> None:
    config = json.loads((transformers_folder / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["image_size"] = 48
    (transformers_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(WeightsError, match="position_embedding"):
        loaded(source=str(transformers_folder))


def test_positions__the_same_grid_is_untouched_and_a_constant_stays_one() -> None:
    positions = torch.rand(1 + 9, 5)
    assert resize_positions(positions, to_hw=(3, 3), prefix=1) is positions
    flat = torch.cat([positions[:1], torch.full((9, 5), 0.25)])
    resized = resize_positions(flat, to_hw=(6, 4), prefix=1)
    assert torch.equal(resized[0], positions[0])
    torch.testing.assert_close(resized[1:], torch.full((24, 5), 0.25))
    with pytest.raises(WeightsError, match="10 position embeddings are not 2 and a square grid"):
        resize_positions(positions, to_hw=(6, 4), prefix=2)


def test_licenses(transformers_folder: Path) -> None:
    assert ClipEncoder(source=str(transformers_folder)).license == "not stated"
    (transformers_folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert ClipEncoder(source=str(transformers_folder)).license == "mit"
    assert ClipEncoder(source=str(transformers_folder), license="MIT").license == "MIT"
    assert ClipEncoder(source="zoo:clip").license == "Apache-2.0"


def test_fields_and_tensors_used_above_are_those_of_clip() -> None:
    """The two tiny CLIPs of this file are the same network."""
    model: CLIPVisionModel = CLIPVisionModel(CLIPVisionConfig(**FIELDS))
    tower: dict[str, Tensor] = open_clip_model().visual.state_dict()
    assert sum(p.numel() for p in model.parameters()) == sum(v.numel() for k, v in tower.items() if k != "proj")

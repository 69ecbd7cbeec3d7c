"""Encoders from open_clip's files, written back as whole models and loaded by open_clip itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.vision.test_encoder_families import shaken
from visexpert.errors import ConfigError, WeightsError
from visexpert.export import check_encoder, default_format, export_encoder
from visexpert.vision import ClipEncoder, OpenClipEncoder, VisionEncoder

TEXT = {"context_length": 6, "vocab_size": 11, "width": 16, "heads": 2, "layers": 1}
PLAIN = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}
TRUNK = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": "linear"}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
WEIGHTS = "open_clip_model.safetensors"


def settings_of(kind: str) -> dict[str, Any]:
    if kind == "clip":
        return {"embed_dim": 12, "quick_gelu": True, "vision_cfg": PLAIN, "text_cfg": TEXT}
    return {"embed_dim": 12, "vision_cfg": TRUNK, "text_cfg": TEXT, "custom_text": True, "init_logit_bias": -10}


def source(kind: str, folder: Path) -> Path:
    """Write a whole model with a text tower, and a file of a tokenizer."""
    folder.mkdir(parents=True)
    settings = settings_of(kind)
    given = {name: value for name, value in settings.items() if name != "custom_text"}
    model = shaken((open_clip.CustomTextCLIP if "custom_text" in settings else open_clip.CLIP)(**given))
    save_file(model.state_dict(), folder / WEIGHTS)
    written = {"model_cfg": settings, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"of": "the source"}', encoding="utf-8")
    return folder


def encoder_of(kind: str, text: str, **options: Any) -> VisionEncoder:
    encoder: VisionEncoder = (ClipEncoder if kind == "clip" else OpenClipEncoder)(source=text, **options)
    encoder.load_weights()
    return encoder.eval()


def saved(encoder: VisionEncoder, folder: Path) -> Path:
    folder.mkdir()
    encoder.save(folder)
    return folder


def loaded(folder: Path) -> Any:
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()


@pytest.mark.parametrize("kind", ["clip", "trunk"])
def test_a_whole_model_comes_out_as_it_went_in(kind: str, tmp_path: Path) -> None:
    origin = source(kind, tmp_path / "in")
    out = saved(encoder_of(kind, str(origin)), tmp_path / "out")
    ours, theirs = load_file(out / WEIGHTS), load_file(origin / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    written = json.loads((out / "open_clip_config.json").read_text())
    assert written["model_cfg"].items() >= settings_of(kind).items()
    assert written["preprocess_cfg"].items() >= PREPROCESS.items()
    assert (out / "tokenizer.json").read_text() == '{"of": "the source"}'
    own, again = loaded(origin), loaded(out)
    pixels, words = torch.rand(2, 3, *own.visual.image_size), torch.tensor([[1, 2, 3, 10, 0, 0]])
    with torch.no_grad():
        for one, other in zip(own(pixels, words), again(pixels, words), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["clip", "trunk"])
def test_a_taught_tower_stands_beside_the_sources_text_tower(kind: str, tmp_path: Path) -> None:
    origin = source(kind, tmp_path / "in")
    encoder = encoder_of(kind, str(origin))
    for parameter in encoder.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert encoder.formats()["native"] is None
    found = export_encoder(encoder, tmp_path / "out", format="native")
    assert found.outputs.keys() == {"layer_minus_2", "layer_minus_1", "pooled"}
    assert all(entry["min_cosine"] >= 0.9999 for entry in found.outputs.values())
    (tmp_path / "name.json").write_text(json.dumps(settings_of(kind)))
    open_clip.add_model_config(tmp_path / "name.json")
    model: Any = open_clip.create_model("name", pretrained=str(tmp_path / "out" / WEIGHTS)).eval()
    words, images = torch.tensor([[1, 2, 3, 10, 0, 0]]), torch.rand(2, 3, 40, 52)
    with torch.no_grad():
        assert torch.equal(model.encode_text(words), loaded(origin).encode_text(words))
        embedded = model.encode_image(encoder.preprocess(images))
        torch.testing.assert_close(embedded, encoder.embed(images), atol=1e-5, rtol=0)
        assert not torch.allclose(embedded, loaded(origin).encode_image(encoder.preprocess(images)), atol=0.1)


def test_a_training_checkpoint_is_written_with_the_named_models_settings(tmp_path: Path) -> None:
    origin = source("clip", tmp_path / "in")
    weights = {f"module.{key}": value for key, value in load_file(origin / WEIGHTS).items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "epoch_3.pt")
    (tmp_path / "mine.json").write_text(json.dumps(settings_of("clip")))
    open_clip.add_model_config(tmp_path / "mine.json")
    encoder = encoder_of("clip", str(tmp_path / "epoch_3.pt"), architecture="mine", image_size=48)
    out = saved(encoder, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {WEIGHTS, "open_clip_config.json"}
    model, images = loaded(out), torch.rand(1, 3, 48, 48)
    assert model.visual.image_size == (48, 48)
    with torch.no_grad():
        embedded = model.encode_image(encoder.preprocess(images))
        torch.testing.assert_close(embedded, encoder.embed(images), atol=1e-5, rtol=0)
    fields = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    fields |= {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"}  # type: ignore[dict-item]
    alone = encoder_of("clip", str(tmp_path / "epoch_3.pt"), config=fields)
    with pytest.raises(ConfigError, match=r"native .*epoch_3\.pt.*architecture.*use hf"):
        check_encoder(alone, "native")
    assert default_format(alone) == "hf"


@pytest.mark.parametrize("kind", ["clip", "trunk"])
def test_an_image_tower_alone_gets_a_text_tower_that_knows_nothing(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    origin = source(kind, tmp_path / "in")
    tower = {key: value for key, value in load_file(origin / WEIGHTS).items() if key.startswith("visual.")}
    save_file(tower, origin / WEIGHTS)
    encoder = encoder_of(kind, str(origin))
    with caplog.at_level(logging.WARNING):
        model = loaded(saved(encoder, tmp_path / "out"))
    assert f"{origin}' has no text tower" in caplog.text
    assert all(torch.equal(model.state_dict()[key], value) for key, value in tower.items())
    with pytest.raises(IndexError), torch.no_grad():
        model.encode_text(torch.tensor([[1]]))


def test_a_random_tower_is_written_too(tmp_path: Path) -> None:
    (tmp_path / "random.json").write_text(json.dumps(settings_of("clip")))
    open_clip.add_model_config(tmp_path / "random.json")
    encoder = ClipEncoder(architecture="random")
    model = loaded(saved(encoder.eval(), tmp_path / "out"))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        embedded = model.encode_image(encoder.preprocess(images))
        torch.testing.assert_close(embedded, encoder.pooled(images), atol=1e-5, rtol=0)


def test_rounded_weights_round_the_text_tower_as_well(tmp_path: Path) -> None:
    encoder = encoder_of("clip", str(source("clip", tmp_path / "in")))
    (tmp_path / "out").mkdir()
    encoder.save(tmp_path / "out", {key: value.bfloat16() for key, value in encoder.model.state_dict().items()})
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


def test_what_open_clip_cannot_take_back_is_refused(tmp_path: Path) -> None:
    origin = source("trunk", tmp_path / "in")
    for options, named in (({"image_size": 64}, "160 px.*image_size=64"), ({"layer": -7}, "first block.*layer -7")):
        with pytest.raises(ConfigError, match=f"native .*{named}.*use onnx or torch_export"):
            check_encoder(encoder_of("trunk", str(origin), **options), "native")
    plain = source("clip", tmp_path / "plain")
    embeddings = encoder_of("clip", str(plain), layer=-4)
    for name in ("native", "open_clip"):
        with pytest.raises(ConfigError, match=f"{name} .*first block.*layer -4.*use hf"):
            check_encoder(embeddings, name)
    with pytest.raises(SystemExit, match="no tokens before the first block.*-4"):
        export_encoder(encoder_of("clip", str(plain)), tmp_path / "out", format="native", layers=[-4])
    encoder = encoder_of("clip", str(plain))
    plain.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"plain' cannot be read any more.*put it back"):
        saved(encoder, tmp_path / "gone")

"""The CLIP encoder against Hugging Face's own model and image processor, on tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from visexpert.errors import ConfigError, WeightsError
from visexpert.vision import ClipEncoder, MoLESettings

FIELDS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}


@pytest.fixture
def reference() -> CLIPVisionModel:
    """A tiny CLIP whose weights, biases and norms included, are far from their start."""
    model = CLIPVisionModel(CLIPVisionConfig(**FIELDS))
    model.eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def folder(reference: CLIPVisionModel, tmp_path: Path) -> Path:
    """That model as save_pretrained writes it."""
    reference.save_pretrained(tmp_path)
    return tmp_path


def images(size: int = 24) -> Tensor:
    return torch.rand(2, 3, size, size)


def loaded(folder: Path, layer: int = -2) -> ClipEncoder:
    encoder = ClipEncoder(source=str(folder), layer=layer).eval()
    encoder.load_weights()
    return encoder


@pytest.mark.parametrize("layer", [-1, -2, -3, -4])
def test_tokens_equal_the_hidden_states_of_hugging_face(reference: CLIPVisionModel, folder: Path, layer: int) -> None:
    encoder = loaded(folder, layer)
    pixels_BCHW = images()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        states = reference((pixels_BCHW - mean) / std, output_hidden_states=True).hidden_states
        tokens = encoder(pixels_BCHW)
    torch.testing.assert_close(tokens.tokens_BTD, states[layer][:, 1:], atol=1e-5, rtol=1e-5)
    assert tokens.cls_BD is not None
    torch.testing.assert_close(tokens.cls_BD, states[layer][:, 0], atol=1e-5, rtol=1e-5)
    assert tokens.grid_hw == encoder.grid_hw == (3, 3)
    assert encoder.width == 16 and encoder.image_size == 24


def test_layers_after_the_one_that_is_read_are_not_run(folder: Path) -> None:
    encoder = loaded(folder, -2)
    ran: list[int] = []
    for index, layer in enumerate(encoder.model.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder(images())
    assert ran == [0, 1]


def test_loading_is_what_fills_the_weights(reference: CLIPVisionModel, folder: Path) -> None:
    encoder = ClipEncoder(source=str(folder))
    key = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(encoder.model.state_dict()[key], reference.state_dict()[key])
    encoder.load_weights()
    assert torch.equal(encoder.model.state_dict()[key], reference.state_dict()[key])


def test_files_with_the_old_prefix_load(reference: CLIPVisionModel, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    bare = {key.removeprefix("vision_model."): value for key, value in state.items()}
    save_file({f"vision_model.{key}": value for key, value in bare.items()}, folder / "model.safetensors")
    encoder = loaded(folder)
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in encoder.model.state_dict().items())


def test_the_vision_part_of_a_full_clip_config_is_read(folder: Path) -> None:
    config = CLIPConfig(vision_config=FIELDS).to_dict()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert ClipEncoder(source=str(folder)).grid_hw == (3, 3)


def test_half_precision_files_fill_a_float32_model(folder: Path) -> None:
    state = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")  # older safetensors write where what was read is still mapped
    weight = loaded(folder).model.state_dict()["encoder.layers.1.mlp.fc2.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["encoder.layers.1.mlp.fc2.weight"].float())


def rename(state: dict[str, Tensor]) -> None:
    state["post_layernorm.offset"] = state.pop("post_layernorm.bias")


def reshape(state: dict[str, Tensor]) -> None:
    state["embeddings.class_embedding"] = torch.zeros(7)


def test_weights_that_do_not_fit_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    original = load_file(path)
    rename(renamed := dict(original))
    save_file(renamed, path)
    with pytest.raises(
        WeightsError, match=r"missing \['post_layernorm.bias'\], unexpected \['post_layernorm.offset'\]"
    ):
        loaded(folder)
    reshape(reshaped := dict(original))
    save_file(reshaped, path)
    with pytest.raises(WeightsError, match=r"of another shape \['embeddings.class_embedding \(7,\) instead of \(16,\)"):
        loaded(folder)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(WeightsError, match=r"model.safetensors is not a readable safetensors file .*; fetch it again"):
        loaded(folder)
    path.unlink()
    with pytest.raises(WeightsError, match=r"ClipEncoder: no model.safetensors, .* in .*; .*save_pretrained"):
        loaded(folder)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no config.json in .*; .*save_pretrained"):
        ClipEncoder(source=str(tmp_path))
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(WeightsError, match=r"holds a list, a JSON object is needed"):
        ClipEncoder(source=str(tmp_path))


def test_a_name_that_leaves_the_zoo_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"'zoo:../secret'.*zoo:NAME"):
        ClipEncoder(source="zoo:../secret")


@pytest.mark.parametrize("size", [24, 40, 96, 17])
def test_preprocessing_equals_the_processor_within_two_grey_levels(folder: Path, size: int) -> None:
    """The processor rounds to 8 bits after each of the two passes of resizing, we do not round: half a level each,
    and the second pass weighs the first one's errors with bicubic's negative lobes. Without resizing nothing differs.
    """
    processor = CLIPImageProcessor(size={"height": 24, "width": 24}, do_center_crop=False)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5), size=(size, size), mode="bicubic")
    pixels_BCHW = smooth.clamp(0, 1).mul(255).round().to(torch.uint8)
    expected = processor(list(pixels_BCHW), return_tensors="pt")["pixel_values"]
    encoder = loaded(folder)
    ours = encoder.preprocess(pixels_BCHW.float() / 255)
    assert ours.shape == expected.shape
    levels = (ours - expected).abs() * encoder.std * 255
    assert levels.max() <= (2.0 if size != 24 else 1e-3)
    assert levels.mean() <= 0.5


def test_a_preprocessor_file_decides_the_normalization(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]}), encoding="utf-8")
    pixels_BCHW = images()
    ours = ClipEncoder(source=str(folder)).preprocess(pixels_BCHW)
    torch.testing.assert_close(ours, (pixels_BCHW - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1))
    path.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"preprocessor_config.json lacks \['image_std'\]"):
        ClipEncoder(source=str(folder))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_the_activation_of_the_config_is_kept(act: str) -> None:
    encoder = ClipEncoder(config={**FIELDS, "hidden_act": act})
    x = torch.linspace(-3, 3, 7)
    quick = x * torch.sigmoid(1.702 * x)
    exact = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    measured = encoder.model.get_submodule("encoder.layers.0.mlp.activation_fn")(x)
    torch.testing.assert_close(measured, quick if act == "quick_gelu" else exact)
    assert (quick - exact).abs().max() > 0.01


def test_quick_gelu_is_the_default() -> None:
    assert ClipEncoder(config=FIELDS).config.hidden_act == "quick_gelu"


@pytest.mark.parametrize("layer", [0, 1, -5])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer={layer} is outside -4..-1 of an encoder with 3 layers"):
        ClipEncoder(config=FIELDS, layer=layer)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="either source .* or config"):
        ClipEncoder()
    with pytest.raises(ConfigError, match="config has no field 'hiden_size'; did you mean 'hidden_size'"):
        ClipEncoder(config={**FIELDS, "hiden_size": 3})
    with pytest.raises(ConfigError, match=r"a side of \[24, 32\] must be one number: images and patches"):
        ClipEncoder(config={**FIELDS, "image_size": [24, 32]})


def test_the_fingerprint_follows_all_that_the_tokens_depend_on() -> None:
    def fingerprint(layer: int = -2, **changes: object) -> str:
        torch.manual_seed(1)
        return ClipEncoder(config={**FIELDS, **changes}, layer=layer).fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    others = [fingerprint(layer=-1), fingerprint(num_attention_heads=4), fingerprint(hidden_act="gelu")]
    torch.manual_seed(2)
    others.append(ClipEncoder(config=FIELDS).fingerprint())
    torch.manual_seed(1)
    darker = ClipEncoder(config=FIELDS)
    darker.mean.add_(0.1)
    others.append(darker.fingerprint())
    assert len({first, *others}) == 6


def test_mole_is_put_in_and_weights_of_plain_clip_fill_the_rest(reference: CLIPVisionModel, folder: Path) -> None:
    encoder = ClipEncoder(source=str(folder), mole=MoLESettings(num_experts=2, rank=3)).eval()
    assert len(encoder.mole_layers()) == 2  # of 3 blocks, the last of which is not read
    before = {key: value.clone() for key, value in encoder.state_dict().items() if "_experts." in key}
    encoder.load_weights()
    pixels_BCHW = images()
    assert torch.equal(encoder(pixels_BCHW).tokens_BTD, loaded(folder)(pixels_BCHW).tokens_BTD)
    assert before and all(torch.equal(value, encoder.state_dict()[key]) for key, value in before.items())


def test_the_shipped_clip_takes_mole_too() -> None:
    student, plain = ClipEncoder(source="zoo:clip", mole=MoLESettings(rank=2)), ClipEncoder(source="zoo:clip")
    for encoder in (student, plain):
        encoder.load_weights()
    pixels_BCHW = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(student.eval()(pixels_BCHW).tokens_BTD, plain.eval()(pixels_BCHW).tokens_BTD)


def test_a_file_without_some_of_clip_is_refused_with_mole_too(folder: Path) -> None:
    path = folder / "model.safetensors"
    rename(state := load_file(path))
    save_file(state, path)
    with pytest.raises(WeightsError, match=r"missing \['post_layernorm.bias'\]"):
        ClipEncoder(source=str(folder), mole=MoLESettings()).load_weights()


def test_a_plain_copy_has_the_weights_and_no_mole_and_shares_nothing() -> None:
    encoder = ClipEncoder(config=FIELDS, layer=-1, mole=MoLESettings(rank=2)).eval()
    for layer in encoder.mole_layers():
        for part in layer.added_modules():
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter)
    copy = encoder.plain_copy().eval()
    assert not copy.mole_layers() and copy.layer == -1
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in copy.state_dict().items())
    pixels_BCHW = images()
    assert not torch.allclose(copy(pixels_BCHW).tokens_BTD, encoder(pixels_BCHW).tokens_BTD)
    shared = {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in encoder.parameters()}
    assert not shared


@pytest.mark.parametrize("mole", [None, MoLESettings(rank=2)])
def test_plain_modules_are_all_of_clip_that_is_read_and_nothing_of_mole(mole: MoLESettings | None) -> None:
    encoder = ClipEncoder(config=FIELDS, mole=mole)
    encoder(images()).tokens_BTD.square().sum().backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None and ".mlp.router." not in name}
    plain = {id(p) for module in encoder.plain_modules() for p in module.parameters()}
    assert {n for n, p in encoder.named_parameters() if id(p) in plain} == {n for n in reached if "_experts." not in n}

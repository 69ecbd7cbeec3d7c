"""TransformersExpert against transformers itself, on tiny folders in save_pretrained form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from tests.experts.tiny_models import CLIP_VISION, DINOV2, SAM, TEXT, randomized, saved
from tests.io.hub import put_in_cache
from visexpert.errors import ConfigError, WeightsError
from visexpert.experts import DepthExpert, SegmentationExpert, TransformersExpert

CLIP_FULL = {"model_type": "clip", "vision_config": CLIP_VISION, "text_config": TEXT}
SIGLIP_TEXT = {key: value for key, value in TEXT.items() if "token" not in key} | {"projection_size": 16}
SIGLIP_FULL = {"model_type": "siglip", "vision_config": CLIP_VISION, "text_config": SIGLIP_TEXT}
DINOV3 = {"model_type": "dinov3_vit", **CLIP_VISION, "num_register_tokens": 4}
REGISTERS = {**DINOV2, "model_type": "dinov2_with_registers", "num_register_tokens": 4}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1], "image_size": 64}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 2}

PROCESSORS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "sam_vision_model": "SamImageProcessor"}


def write(config: dict[str, Any], folder: Path) -> Any:
    """A tiny model with its processor on disk."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = randomized(AutoModel.from_config(AutoConfig.for_model(config["model_type"], **fields)))
    processor = getattr(transformers, PROCESSORS.get(config["model_type"], "BitImageProcessor"))()
    saved(model, processor, folder)
    return model


def loaded(**options: Any) -> TransformersExpert:
    expert = TransformersExpert(**options).eval()
    expert.load_weights()
    return expert


def encoder_of(model: Any) -> Any:
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize(
    ("config", "prefix", "grid", "width"),
    [
        (CLIP_FULL, 1, 4, 16),
        (SIGLIP_FULL, 0, 4, 16),
        (DINOV2, 1, 4, 16),
        (REGISTERS, 5, 4, 16),
        (DINOV3, 5, 4, 16),
        (SWIN, 0, 4, 16),
    ],
)
def test_tokens_equal_the_librarys(tmp_path: Path, config: dict[str, Any], prefix: int, grid: int, width: int) -> None:
    model = encoder_of(write(config, tmp_path))
    expert = loaded(source=str(tmp_path))
    assert (expert.grid_hw, expert.token_dim) == ((grid, grid), width)
    images_BCHW = torch.rand(2, 3, expert.image_size, expert.image_size)
    with torch.no_grad():
        pixels_BCHW = (images_BCHW - expert.mean) / expert.std
        expected_BNE = model(pixels_BCHW).last_hidden_state
        tokens_BSE = expert(images_BCHW).tokens_BSE
    torch.testing.assert_close(tokens_BSE, expected_BNE[:, prefix:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, -2, -1])
def test_a_layer_is_that_hidden_state(tmp_path: Path, layer: int) -> None:
    model = encoder_of(write(CLIP_FULL, tmp_path))
    expert = loaded(source=str(tmp_path), layer=layer)
    images_BCHW = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        states = model((images_BCHW - expert.mean) / expert.std, output_hidden_states=True).hidden_states
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, states[layer][:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer", "width", "grid"), [(None, 12, 8), (-1, 16, 8)])
def test_sam__neck_and_blocks(tmp_path: Path, layer: int | None, width: int, grid: int) -> None:
    """The neck has its channels first, the blocks have them last."""
    model = write(SAM, tmp_path)
    expert = loaded(source=str(tmp_path), layer=layer)
    assert (expert.grid_hw, expert.token_dim) == ((grid, grid), width)
    images_BCHW = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output = model((images_BCHW - expert.mean) / expert.std, output_hidden_states=True)
        tokens_BSE = expert(images_BCHW).tokens_BSE
    if layer is None:
        expected_BSE = output.last_hidden_state.flatten(2).transpose(1, 2)
    else:
        expected_BSE = output.hidden_states[layer].flatten(1, 2)
    torch.testing.assert_close(tokens_BSE, expected_BSE, atol=1e-4, rtol=1e-4)


def test_feature_maps_are_flattened_row_by_row(tmp_path: Path) -> None:
    model = write(CONVNEXT, tmp_path)
    expert = loaded(source=str(tmp_path), layer=1)
    assert (expert.grid_hw, expert.token_dim) == ((16, 16), 8)
    images_BCHW = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        states = model((images_BCHW - expert.mean) / expert.std, output_hidden_states=True).hidden_states
        tokens_BSE = expert(images_BCHW).tokens_BSE
    torch.testing.assert_close(tokens_BSE[:, 3 * 16 + 5], states[1][:, :, 3, 5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "size"), [(CLIP_FULL, 48), (SIGLIP_FULL, 64), (DINOV2, 84), (DINOV2, 28)])
def test_another_size_equals_the_librarys_interpolation(tmp_path: Path, config: dict[str, Any], size: int) -> None:
    model = encoder_of(write(config, tmp_path))
    expert = loaded(source=str(tmp_path), image_size=size)
    images_BCHW = torch.rand(1, 3, size, size)
    options = {} if config["model_type"] == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected_BNE = model((images_BCHW - expert.mean) / expert.std, **options).last_hidden_state
        tokens_BSE = expert(images_BCHW).tokens_BSE
    torch.testing.assert_close(tokens_BSE, expected_BNE[:, -tokens_BSE.shape[1] :], atol=1e-5, rtol=1e-5)


def test_sam_at_another_size(tmp_path: Path) -> None:
    """transformers refuses another size; absolute positions are interpolated, relative ones as its get_rel_pos does."""
    write(SAM, tmp_path)
    expert, own = loaded(source=str(tmp_path), image_size=128), loaded(source=str(tmp_path))
    assert expert.grid_hw == (16, 16)
    state, before = expert.network.state_dict(), own.network.state_dict()
    assert state["model.vision_encoder.pos_embed"].shape == (1, 16, 16, 16)
    assert state["model.vision_encoder.layers.1.attn.rel_pos_h"].shape == (31, 8)
    windowed = "model.vision_encoder.layers.0.attn.rel_pos_h"
    assert torch.equal(state[windowed], before[windowed])
    assert torch.isfinite(expert(torch.rand(1, 3, 128, 128)).tokens_BSE).all()


def test_the_processor_of_the_folder_decides(tmp_path: Path) -> None:
    write(DINOV2, tmp_path)
    settings = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224}
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    how = TransformersExpert(source=str(tmp_path), framing="own").preprocessing
    assert (how.image_size, how.framing, how.interpolation) == (56, "crop", "bilinear")
    assert (how.mean, how.std, how.crop_share) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        0.875,
    )


def test_building_needs_no_files_where_config_and_processor_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    given = {"config": DINOV2, "processor": {"image_processor_type": "BitImageProcessor"}}
    expert = TransformersExpert(source="org/dino", **given)  # type: ignore[arg-type]
    assert expert.grid_hw == (4, 4)
    with pytest.raises(WeightsError, match=r"config.json of 'org/dino' is not in the cache .*`hf download org/dino`"):
        expert.load_weights()
    with pytest.raises(WeightsError, match=r"config.json of 'org/dino' is not in the cache"):
        TransformersExpert(source="org/dino")
    with pytest.raises(WeightsError, match=r"preprocessor_config.json of 'org/dino' is not in the cache"):
        TransformersExpert(source="org/dino", config=DINOV2)
    write(DINOV2, tmp_path / "files")
    put_in_cache(monkeypatch, tmp_path / "cache", "org/dino", tmp_path / "files")
    expert.load_weights()
    there = loaded(source=str(tmp_path / "files"))
    assert expert.fingerprint() == there.fingerprint() == loaded(source="hf:org/dino").fingerprint()


def test_what_was_given_must_agree_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of heads leaves no trace in the shapes."""
    write(DINOV2, tmp_path / "files")
    processor = {"image_processor_type": "BitImageProcessor"}
    wrong = {**DINOV2, "num_attention_heads": 4}
    with pytest.raises(ConfigError, match="were made with num_attention_heads=2, not 4"):
        TransformersExpert(source=str(tmp_path / "files"), config=wrong)
    with pytest.raises(ConfigError, match=r"image_std of the processor of .* is .*0.2686.*, not .*0.1"):
        TransformersExpert(source=str(tmp_path / "files"), processor={**processor, "image_std": [0.1, 0.1, 0.1]})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    early = TransformersExpert(source="org/dino", config=wrong, processor=processor)
    other = TransformersExpert(source="org/dino", config=DINOV2, processor={**processor, "image_mean": [0.0, 0.0, 0.0]})
    put_in_cache(monkeypatch, tmp_path / "cache", "org/dino", tmp_path / "files")
    with pytest.raises(ConfigError, match="were made with num_attention_heads=2, not 4"):
        early.load_weights()
    with pytest.raises(ConfigError, match="image_mean of the processor of 'org/dino'"):
        other.load_weights()


def test_a_random_network_needs_no_processor_and_keeps_its_weights() -> None:
    expert = TransformersExpert(config=DINOV2).eval()
    before = expert.fingerprint()
    expert.load_weights()
    assert expert.fingerprint() == before and expert.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert expert(torch.rand(2, 3, 30, 40)).tokens_BSE.shape == (2, 16, 16)


def test_the_license_is_that_of_the_card(tmp_path: Path) -> None:
    write(DINOV2, tmp_path)
    assert TransformersExpert(source=str(tmp_path)).license == "not stated"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    assert TransformersExpert(source=str(tmp_path)).license == "apache-2.0"
    assert TransformersExpert(source=str(tmp_path), license="mine").license == "mine"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "dinov9"}, r"model_type 'dinov9'.*'dinov2'"),
        ({**DINOV2, "hiden_size": 3}, r"Dinov2Config .*'hiden_size'.*'hidden_size'"),
        ({"model_type": "clip", "vision_config": {"widht": 3}}, "CLIPVisionConfig has no field 'widht'"),
        ({"model_type": "bert"}, r"'bert' .*text \(BertModel\)"),
        ({"model_type": "wav2vec2"}, "model_type 'wav2vec2' reads sound"),
        ({**CLIP_VISION, "model_type": "clip_vision_model", "patch_size": 64}, "TransformersExpert: .* 32 px"),
    ],
)
def test_impossible_configs_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformersExpert(config=config)


def test_split_and_torch_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(DINOV2, tmp_path / "whole")
    expected = loaded(source=str(tmp_path / "whole")).fingerprint()
    write(DINOV2, tmp_path / "split")
    (tmp_path / "split" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "split", max_shard_size="10KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    put_in_cache(monkeypatch, tmp_path / "cache", "org/split", tmp_path / "split")
    assert loaded(source="org/split").fingerprint() == expected
    (tmp_path / "whole" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "whole" / "pytorch_model.bin")
    assert loaded(source=str(tmp_path / "whole")).fingerprint() == expected
    torch.save({"x": Path("runs code when it is unpickled")}, tmp_path / "whole" / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pytorch_model.bin cannot be read"):
        loaded(source=str(tmp_path / "whole"))


def test_missing_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TransformersExpert .*source .*config"):
        TransformersExpert()
    model = write(DINOV2, tmp_path)
    path = tmp_path / "model.safetensors"
    state: dict[str, Tensor] = model.state_dict()
    state.pop("embeddings.cls_token")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"model.safetensors .* lacks \['embeddings.cls_token'\]"):
        loaded(source=str(tmp_path))
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(WeightsError, match="cannot be read .*; fetch it again"):
        loaded(source=str(tmp_path))
    path.unlink()
    with pytest.raises(WeightsError, match="no model.safetensors, .* in "):
        loaded(source=str(tmp_path))


@pytest.mark.parametrize("expert", [TransformersExpert, DepthExpert, SegmentationExpert])
def test_the_folder_of_a_language_model_is_refused_as_what_it_is(tmp_path: Path, expert: type[Any]) -> None:
    """It has no image processor either, which is not what is wrong with it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model_type 'llama' .*language model.*image"):
        expert(source=str(tmp_path))


@pytest.mark.parametrize(("config", "size"), [(SAM, 64), (SAM, 128), (SWIN, 32), (SWIN, 64), (DINOV2, 28)])
def test_a_network_is_built_once(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], size: int) -> None:
    """SAM's positions are of one size of image, so its network is one for the size asked for from the beginning."""
    built: list[str] = []
    own = PreTrainedModel.__init__

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if not torch.empty(0).is_meta:  # there it costs nothing
            built.append(type(self).__name__)

    monkeypatch.setattr(PreTrainedModel, "__init__", count)
    TransformersExpert(config=config, image_size=size)
    assert built and len(built) == len(set(built))

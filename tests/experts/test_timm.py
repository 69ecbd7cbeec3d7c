"""TimmExpert against timm itself, on tiny random weights in the formats that timm publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.experts.tiny_models import TIMM, TIMM_ARGUMENTS, randomized
from tests.io.hub import put_in_cache
from visexpert.errors import ConfigError, WeightsError
from visexpert.experts import TimmExpert


def published(folder: Path, suffix: str = ".safetensors", **arguments: Any) -> Any:
    """A tiny model of timm, head included, and its weights as timm puts them on the Hugging Face Hub."""
    model: Any = randomized(timm.create_model(TIMM, pretrained=False, **TIMM_ARGUMENTS, **arguments))
    name = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}[suffix]
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), folder / name)
    return model


def loaded(**options: Any) -> TimmExpert:
    expert = TimmExpert(**{"model": TIMM, "arguments": TIMM_ARGUMENTS, **options}).eval()
    expert.load_weights()
    return expert


def images(size: int) -> Tensor:
    return torch.rand(2, 3, size, size)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_tokens_equal_timms_without_the_class_token(tmp_path: Path, suffix: str) -> None:
    model = published(tmp_path, suffix)
    expert = loaded(weights=str(tmp_path))
    assert (expert.image_size, expert.token_dim, expert.grid_hw) == (224, 24, (14, 14))
    assert expert.license == "apache-2.0" and not any("head" in key for key in expert.state_dict())
    images_BCHW = images(224)
    with torch.no_grad():
        expected = model.forward_features((images_BCHW - 0.5) / 0.5)[:, 1:]
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, -2, -1])
def test_a_layer_is_that_block_without_the_final_norm(tmp_path: Path, layer: int) -> None:
    model = published(tmp_path)
    expert = loaded(weights=str(tmp_path), layer=layer)
    seen: list[Tensor] = []
    model.blocks[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    ran: list[int] = []
    for index, block in enumerate(expert.network.get_submodule("model.blocks").children()):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    images_BCHW = images(224)
    with torch.no_grad():
        model((images_BCHW - 0.5) / 0.5)
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, seen[0][:, 1:], atol=1e-5, rtol=1e-5)
    assert ran == list(range(layer % 3 + 1))  # later blocks are not run


@pytest.mark.parametrize("size", [96, 320])
def test_another_size_equals_timms_own_interpolation(tmp_path: Path, size: int) -> None:
    """timm can also interpolate while it runs (``dynamic_img_size``)."""
    dynamic = published(tmp_path, dynamic_img_size=True)
    expert = loaded(weights=str(tmp_path), image_size=size)
    assert expert.grid_hw == (size // 16, size // 16)
    images_BCHW = images(size)
    with torch.no_grad():
        expected = dynamic.forward_features((images_BCHW - 0.5) / 0.5)[:, 1:]
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, expected, atol=1e-4, rtol=1e-4)


def test_registers_are_dropped_and_maps_flattened() -> None:
    registers = {**TIMM_ARGUMENTS, "reg_tokens": 4}
    expert = TimmExpert(model=TIMM, weights="random", arguments=registers, image_size=64).eval()
    assert expert(images(64)).tokens_BSE.shape == (2, 16, 24)
    convolutions = TimmExpert(model="resnet18.tv_in1k", weights="random", image_size=64, layer=1).eval()
    pixels_BCHW = convolutions.preprocess(images(64))
    assert (convolutions.token_dim, convolutions.grid_hw) == (64, (16, 16))
    tokens_BSE, map_BEHW = convolutions.encode(pixels_BCHW), convolutions.network(pixels_BCHW)
    torch.testing.assert_close(tokens_BSE[:, 3 * 16 + 5], map_BEHW[:, :, 3, 5])


def test_maps_with_the_channels_last() -> None:
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    expert = TimmExpert(model="swin_tiny_patch4_window7_224.ms_in1k", weights="random", arguments=small)
    assert (expert.token_dim, expert.grid_hw) == (16, (28, 28))


def test_weights_from_the_cache_are_the_tags_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files := tmp_path / "files").mkdir()
    published(files)
    put_in_cache(monkeypatch, tmp_path / "cache", f"timm/{TIMM}", files)
    assert loaded().fingerprint() == loaded(weights=str(files)).fingerprint()


def test_weights_without_a_head(tmp_path: Path) -> None:
    """As a feature extractor was saved: nothing but the head may be missing."""
    published(tmp_path)
    whole = loaded(weights=str(tmp_path))
    path = tmp_path / "model.safetensors"
    bare = {key: value for key, value in load_file(path).items() if not key.startswith("head.")}
    save_file(bare, tmp_path / "bare.safetensors")
    assert loaded(weights=str(tmp_path / "bare.safetensors")).fingerprint() == whole.fingerprint()
    del bare["blocks.1.norm1.weight"]
    save_file(bare, tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match="cut.safetensors do not fit vit_tiny"):
        loaded(weights=str(tmp_path / "cut.safetensors"))


def test_a_folder_says_model_sizes_and_preprocessing(tmp_path: Path) -> None:
    """As timm's own loader of folders reads it."""
    sizes: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    timm.models.save_for_hf(timm.create_model(TIMM, **sizes), str(tmp_path), model_args=sizes, safe_serialization=True)
    expert = TimmExpert(weights=str(tmp_path)).eval()
    expert.load_weights()
    assert (expert.image_size, expert.token_dim, expert.grid_hw) == (48, 32, (6, 6))
    theirs: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images_BCHW = images(48)
    with torch.no_grad():
        expected = theirs.forward_features((images_BCHW - 0.5) / 0.5)[:, 1:]
        torch.testing.assert_close(expert(images_BCHW).tokens_BSE, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=TIMM.partition(".")[0]):
        TimmExpert(model="convnext_tiny", weights=str(tmp_path))
    with pytest.raises(ConfigError, match="model"):
        TimmExpert(weights="random")


def test_weights_that_are_nowhere_end_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=rf"'timm/{TIMM}' is not in the cache .*`hf download timm/{TIMM}`"):
        loaded()


def test_the_fingerprint_follows_size_layer_and_weights(tmp_path: Path) -> None:
    def fingerprint(seed: int = 0, **options: Any) -> str:
        torch.manual_seed(seed)
        return TimmExpert(model=TIMM, weights="random", arguments=TIMM_ARGUMENTS, **options).fingerprint()

    assert fingerprint() == fingerprint()
    changed = [{"layer": -1}, {"layer": -2}, {"framing": "crop"}, {"interpolation": "bilinear"}, {"seed": 1}]
    assert len({fingerprint(), *(fingerprint(**options) for options in changed)}) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "vit_tinny_patch16_224"},
            r"no settings of 'vit_tinny_patch16_224'; did you mean one of \['vit_tiny",
        ),
        ({"model": "resnet18.nope"}, r"no settings of 'resnet18.nope'; did you mean one of .*resnet18.tv_in1k"),
        ({"arguments": {"dept": 3}}, "does not take {'dept': 3}"),
        ({"layer": 3}, " 224 px .*image_size or layer"),
        (
            {"model": "visformer_tiny.in1k", "arguments": None, "layer": 0, "framing": "zoom"},
            "framing='zoom' is unknown",
        ),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TimmExpert(**{"model": TIMM, "weights": "random", "arguments": TIMM_ARGUMENTS, **options})


def test_a_model_that_would_hold_logits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r" 512 px .*1024, 1024\)"):
        TimmExpert(
            model="samvit_base_patch16.sa1b",
            weights="random",
            image_size=512,
            arguments={"embed_dim": 16, "depth": 3, "num_heads": 2, "global_attn_indexes": (2,)},
        )


TINY: dict[str, tuple[str, int, dict[str, Any], int, int]] = {
    "coat": ("coat_lite_tiny.in1k", 224, {"embed_dims": [16] * 4, "serial_depths": [1] * 4}, 1, 7),
    "xcit": ("xcit_nano_12_p16_224.fb_in1k", 64, {"embed_dim": 16, "depth": 1, "num_heads": 2}, 1, 4),
    "levit": ("levit_128s.fb_dist_in1k", 224, {"embed_dim": (16,) * 3, "num_heads": (1,) * 3, "depth": (1,) * 3}, 0, 4),
    "resnest": ("resnest14d.gluon_in1k", 64, {"layers": [1, 1, 1, 1]}, 0, 2),
    "skresnet": ("skresnet18.ra_in1k", 64, {"layers": [1, 1, 1, 1]}, 0, 2),
    "rexnet": ("rexnet_100.nav_in1k", 64, {"width_mult": 0.5}, 0, 2),
    "davit": (
        "davit_tiny.msft_in1k",
        224,
        {"embed_dims": (8, 8, 16, 16), "depths": (1,) * 4, "num_heads": (1,) * 4},
        0,
        7,
    ),
}
"""Name, side of the images, arguments that make it small, tokens before the grid, side of the grid."""


@pytest.mark.parametrize("family", list(TINY))
def test_families_give_timms_own_features(tmp_path: Path, family: str) -> None:
    name, size, arguments, prefix, grid = TINY[family]
    model: Any = randomized(timm.create_model(name, pretrained=False, **arguments))
    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    expert = loaded(model=name, weights=str(tmp_path), arguments=arguments, image_size=size)
    assert expert.grid_hw == (grid, grid)
    images_BCHW = images(size)
    with torch.no_grad():
        features = model.forward_features((images_BCHW - expert.mean) / expert.std)
        tokens_BSE = expert(images_BCHW).tokens_BSE
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    scale = features.abs().amax()  # without a head's norm they grow from stage to stage
    torch.testing.assert_close(tokens_BSE / scale, features[:, prefix:] / scale, atol=1e-5, rtol=1e-5)


def test_several_maps_at_once_are_refused_with_what_to_give() -> None:
    with torch.device("meta"):
        with pytest.raises(ConfigError, match="layer.*-1"):
            TimmExpert(model="efficientvim_m1", weights="random")
        assert TimmExpert(model="efficientvim_m1", weights="random", layer=-1).grid_hw == (4, 4)

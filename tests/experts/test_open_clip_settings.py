"""Which settings OpenClipExpert takes: of a tag, a lone file, a folder, a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from tests.experts.test_open_clip import VIT, loaded, published, tiny_models
from tests.experts.tiny_models import as_pil, smooth_images
from tests.io.hub import put_in_cache
from visexpert.errors import ConfigError, WeightsError
from visexpert.experts import OpenClipExpert
from visexpert.networks.open_clip import STUB_TEXT
from visexpert.vision import ClipEncoder

__all__ = ["tiny_models"]

OWN: dict[str, Any] = {
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}
LAION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
APPLE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def repository(folder: Path, **settings: Any) -> Path:
    """A folder as open_clip publishes it, with QuickGELU and a preparation of its own."""
    folder.mkdir()
    published(folder / "open_clip_model.safetensors", VIT)
    model_cfg = {**VIT, "text_cfg": STUB_TEXT, "quick_gelu": True, **settings}
    written = {"model_cfg": model_cfg, "preprocess_cfg": OWN}
    (folder / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
    return folder


def activation(expert: OpenClipExpert) -> str:
    return type(expert.network.get_submodule("visual.transformer.resblocks.0.mlp.gelu")).__name__


def prepared(expert: OpenClipExpert) -> tuple[Any, ...]:
    preprocessing = expert.preprocessing
    return list(preprocessing.mean), list(preprocessing.std), preprocessing.interpolation, preprocessing.framing


@pytest.mark.parametrize(
    ("model", "own", "framing"),
    [
        ("PE-Core-T-16-384", LAION, "squash"),
        ("PE-Core-B-16", LAION, "squash"),
        ("MobileCLIP2-S0", APPLE, "crop"),
        ("MobileCLIP-B", APPLE, "crop"),
    ],
)
def test_a_file_is_prepared_as_all_published_weights_of_its_model(model: str, own: Any, framing: str) -> None:
    """Values by hand, from the models' own cards; OpenAI's would be 0.48... and bicubic."""
    with torch.device("meta"):
        expert = OpenClipExpert(model=model, weights="downloaded/weights.safetensors", framing="own")
    assert prepared(expert) == (list(own["mean"]), list(own["std"]), "bilinear", framing)


def test_a_file_whose_preparation_nothing_tells_is_refused() -> None:
    """Of ViT-L-14, one of LAION's weights wants 0.5 as mean, all others OpenAI's."""
    with torch.device("meta"):
        with pytest.raises(ConfigError, match=r"ViT-L-14 .*several values of mean .*0.4814.*0.5, 0.5.*tag"):
            OpenClipExpert(model="ViT-L-14", weights="downloaded/x.pt")
        with pytest.raises(ConfigError, match=r"ViT-L-14 .*several values of mean"):
            ClipEncoder(source="downloaded/x.pt", architecture="ViT-L-14")
        with pytest.raises(ConfigError, match=r"ViT-H-14 .*several values of resize_mode .*shortest.*squash"):
            OpenClipExpert(model="ViT-H-14", weights="downloaded/x.pt")
        tagged = OpenClipExpert(model="ViT-L-14", weights="laion2b_s32b_b82k")
        assert OpenClipExpert(model="ViT-L-14", weights="random").preprocessing.mean == pytest.approx(
            [0.4815, 0.4578, 0.4082], abs=1e-4
        )
    assert list(tagged.preprocessing.mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("where", ["folder", "file", "relative folder", "relative file"])
def test_its_own_configuration_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Also beside the file itself, where that is called as open_clip publishes it; a name is also a path."""
    folder = repository(tmp_path / "mine")
    relative = "relative" in where
    monkeypatch.chdir((folder if "file" in where else tmp_path) if relative else tmp_path)
    source = folder / "open_clip_model.safetensors" if "file" in where else folder
    expert = loaded(model="tiny-vit", weights=source.name if relative else str(source), framing="own")
    assert prepared(expert) == (*OWN.values(),)
    assert activation(expert) == "QuickGELU"


def test_the_repository_of_a_clip_encoder_is_read_beside_its_file(tmp_path: Path) -> None:
    folder = repository(tmp_path / "mine")
    encoder = ClipEncoder(source=str(folder / "open_clip_model.safetensors"))
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor(OWN["mean"]))
    assert encoder.model.config.hidden_act == "quick_gelu"


def test_an_id_of_the_hub_brings_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers held against open_clip's own loading of the same folder and its own preparation."""
    folder = repository(tmp_path / "files")
    put_in_cache(monkeypatch, tmp_path / "cache", "org/clip", folder)
    expert = loaded(model="ViT-B-32", weights="hf-hub:org/clip", framing="own")
    assert prepared(expert) == (*OWN.values(),) and activation(expert) == "QuickGELU"
    assert expert.weights_from == "hf-hub:org/clip"
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    image_CHW = smooth_images(1, 40, 50)[0]
    pixels_BCHW = transform(as_pil(image_CHW))[None]
    torch.testing.assert_close(expert.preprocess(image_CHW[None] / 255), pixels_BCHW, atol=0.02, rtol=0)
    visual: Any = model.eval().visual
    visual.output_tokens = True
    with torch.no_grad():
        _, reference = visual(pixels_BCHW)
        torch.testing.assert_close(expert.encode(pixels_BCHW), reference, atol=1e-4, rtol=1e-4)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mean": ({}, {"mean": [0.4, 0.4, 0.4]}),
    "std": ({}, {"std": [0.4, 0.4, 0.4]}),
    "interpolation": ({}, {"interpolation": "bilinear"}),
    "resize_mode": ({}, {"resize_mode": "squash"}),
    "activation": ({"quick_gelu": True}, {}),
    "heads": ({"vision_cfg": {**VIT["vision_cfg"], "head_width": 12}}, {}),
}


@pytest.mark.parametrize("name", [*CHANGES, "nothing"])
def test_what_arrives_with_the_weights_must_be_what_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing of these leaves a trace in the shapes of weights."""
    settings, preparation = CHANGES.get(name, ({}, {}))
    folder = repository(tmp_path / "files", **{"quick_gelu": False, **settings})
    path = folder / "open_clip_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**written, "preprocess_cfg": preparation}), encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    early = OpenClipExpert(model="tiny-vit", weights="org/clip", framing="own")
    with pytest.raises(WeightsError, match="'org/clip' is not in the cache"):
        early.load_weights()
    put_in_cache(monkeypatch, tmp_path / "cache", "org/clip", folder)
    if name == "nothing":
        early.load_weights()
        assert early.fingerprint() == loaded(model="tiny-vit", weights="org/clip", framing="own").fingerprint()
        return
    with pytest.raises(ConfigError, match=r"'org/clip'.*open_clip_config\.json"):
        early.load_weights()
    loaded(model="tiny-vit", weights="org/clip", framing="own")


@pytest.mark.parametrize("second", [0.1, 0.2])
def test_a_repository_that_says_nothing_is_as_a_lone_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: float
) -> None:
    tags = {tag: {"mean": (value,) * 3, "std": (1.0,) * 3} for tag, value in (("a", 0.1), ("b", second))}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", tags)
    folder = repository(tmp_path / "files")
    (folder / "open_clip_config.json").unlink()
    put_in_cache(monkeypatch, tmp_path / "cache", "org/clip", folder)
    expert = OpenClipExpert(model="tiny-vit", weights="org/clip")
    if second == 0.1:
        expert.load_weights()
        assert expert.mean.flatten().tolist() == pytest.approx([0.1] * 3)
        return
    with pytest.raises(ConfigError, match=r"tiny-vit have several values of mean .*0\.1.*0\.2"):
        expert.load_weights()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_images_are_framed_as_its_own_configuration_says(tmp_path: Path, mode: str, shape: tuple[int, int]) -> None:
    """By default; pixels held against open_clip's own transform of the same folder."""
    folder = repository(tmp_path / "mine")
    write_preparation(folder, {**OWN, "resize_mode": mode})
    expert = loaded(model="tiny-vit", weights=str(folder))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    (image_CHW,) = smooth_images(1, *shape)
    pixels_BCHW = transform(as_pil(image_CHW))[None]
    torch.testing.assert_close(expert.preprocess(image_CHW[None] / 255), pixels_BCHW, atol=0.02, rtol=0)
    squashed = OpenClipExpert(model="tiny-vit", weights=str(folder), framing="squash")
    assert squashed.preprocessing.framing == "squash"


def write_preparation(folder: Path, preparation: dict[str, Any]) -> None:
    path = folder / "open_clip_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**written, "preprocess_cfg": preparation}), encoding="utf-8")


def test_a_framing_that_cannot_be_done_or_is_none_is_told(tmp_path: Path) -> None:
    folder = repository(tmp_path / "mine")
    write_preparation(folder, {**OWN, "resize_mode": "longest"})
    with pytest.warns(UserWarning, match="squash, crop or pad"):
        assert OpenClipExpert(model="tiny-vit", weights=str(folder)).preprocessing.framing == "squash"
    with pytest.raises(ConfigError, match="squash, crop or pad"):
        OpenClipExpert(model="tiny-vit", weights=str(folder), framing="own")
    write_preparation(folder, {**OWN, "resize_mode": "diagonal"})
    for framing in (None, "own", "squash"):
        with pytest.raises(ConfigError, match=r"resize_mode='diagonal' .*\['longest', 'shortest', 'squash'\]"):
            OpenClipExpert(model="tiny-vit", weights=str(folder), framing=framing)

"""Images are prepared as the libraries' own processors do, up to their rounding to 8 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import get_pretrained_cfg
from torch import Tensor

from tests.experts.tiny_models import as_pil, smooth_images
from visexpert.errors import ConfigError
from visexpert.networks.open_clip import framing_of
from visexpert.networks.preprocessing import Framing, Preprocessing, preprocessing_of, settings_of
from visexpert.networks.timm import own_preprocessing, published_settings

SHAPES = [(300, 200), (150, 260), (64, 64), (40, 30)]
"""Portrait, landscape, square, and smaller than any model's input."""

LEVELS = 2.0
"""Gray levels of 255 that a pixel may differ by. The processors round to 8 bits after each of the two passes of
resizing, we do not round: half a level each, and the second pass weighs the errors of the first with bicubic's
negative lobes."""


def prepared(preprocessing: Preprocessing, image_CHW: Tensor) -> Tensor:
    mean, std = (torch.tensor(list(values)).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return preprocessing.prepare(image_CHW[None].float() / 255, mean, std)[0]


def check(preprocessing: Preprocessing, image_CHW: Tensor, expected_CHW: Tensor) -> None:
    ours_CHW = prepared(preprocessing, image_CHW)
    assert ours_CHW.shape == expected_CHW.shape == (3, preprocessing.image_size, preprocessing.image_size)
    levels = (ours_CHW - expected_CHW).abs() * torch.tensor(list(preprocessing.std)).view(3, 1, 1) * 255
    assert levels.max() <= LEVELS
    assert levels.mean() <= 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224.augreg2_in21k_ft_in1k",  # crop_pct 0.9
        "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",  # squash
        "convnext_xxlarge.clip_laion2b_soup",
        "swin_tiny_patch4_window7_224.ms_in1k",
        "resnet18.tv_in1k",  # bilinear, crop_pct 0.875
    ],
)
def test_timm(name: str, shape: tuple[int, int]) -> None:
    found = get_pretrained_cfg(name)
    assert found is not None
    transform: Any = create_transform(**resolve_data_config(pretrained_cfg=found.to_dict()))  # type: ignore[no-untyped-call]
    (image_CHW,) = smooth_images(1, *shape)
    check(
        own_preprocessing(published_settings(name, owner="test"), None, owner="test"),
        image_CHW,
        transform(as_pil(image_CHW)),
    )


PROCESSORS: list[dict[str, Any]] = [
    {"image_processor_type": "CLIPImageProcessor"},
    {"image_processor_type": "CLIPImageProcessor", "size": 336, "crop_size": 336},
    {"image_processor_type": "SiglipImageProcessor"},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224},  # DINOv2
    {"image_processor_type": "ViTImageProcessor"},
    {"image_processor_type": "SegformerImageProcessor"},
    {"image_processor_type": "SamImageProcessor"},
    {"image_processor_type": "DPTImageProcessor", "size": {"height": 384, "width": 384}},
    {"image_processor_type": "CLIPImageProcessor", "do_normalize": False},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda entry: "-".join(str(value) for value in entry.values()))
def test_transformers(processor: dict[str, Any], shape: tuple[int, int]) -> None:
    (image_CHW,) = smooth_images(1, *shape)
    reference = getattr(transformers, processor["image_processor_type"])(**processor)
    expected_CHW = reference([image_CHW], return_tensors="pt")["pixel_values"][0]
    preprocessing = preprocessing_of(owner="Test", source=None, processor=processor, size=None, interpolation=None)
    check(preprocessing, image_CHW, expected_CHW)


def test_depth_anything_on_a_square() -> None:
    """Its processor keeps the ratio of sides, which gives each image its own grid; on a square they agree."""
    processor: dict[str, Any] = {
        "image_processor_type": "DPTImageProcessor",
        "keep_aspect_ratio": True,
        "ensure_multiple_of": 14,
    }
    processor |= {"size": {"height": 518, "width": 518}}
    preprocessing = preprocessing_of(owner="Test", source=None, processor=processor, size=None, interpolation=None)
    assert preprocessing.framing == "own"
    squashed = preprocessing.adapted(owner="Test", image_size=None, framing="squash", interpolation=None)
    (image_CHW,) = smooth_images(1, 200, 200)
    reference = transformers.DPTImageProcessor(**{k: v for k, v in processor.items() if k != "image_processor_type"})
    check(squashed, image_CHW, reference([image_CHW], return_tensors="pt")["pixel_values"][0])
    with pytest.raises(ConfigError, match="framing.*squash, crop or pad"):
        preprocessing.adapted(owner="Test", image_size=None, framing="own", interpolation=None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_open_clip(mode: str, shape: tuple[int, int]) -> None:
    settings = PreprocessCfg(size=96, resize_mode=mode)
    transform: Any = image_transform_v2(settings, is_train=False)
    preprocessing = Preprocessing(96, settings.mean, settings.std, "bicubic", framing_of(vars(settings), owner="test"))
    (image_CHW,) = smooth_images(1, *shape)
    check(preprocessing, image_CHW, transform(as_pil(image_CHW)))


@pytest.mark.parametrize("shape", SHAPES)
def test_squash_shows_all_of_the_image_and_crop_does_not(shape: tuple[int, int]) -> None:
    image_CHW = torch.zeros(3, *shape, dtype=torch.uint8)
    image_CHW[:, : shape[0] // 8, : shape[1] // 8] = 255  # a mark in the first corner
    assert prepared(Preprocessing(32, framing="squash"), image_CHW)[:, 0, 0].min() > 0.9
    corner = prepared(Preprocessing(32, framing="crop", crop_share=0.5), image_CHW)[:, 0, 0]
    assert corner.max() == -1.0
    padded = prepared(Preprocessing(32, framing="pad"), image_CHW)
    empty = padded[:, :, -1] if shape[0] > shape[1] else padded[:, -1]
    assert (empty == (0.0 if shape[0] != shape[1] else -1.0)).all()


def test_the_size_asked_for_keeps_the_share_of_the_crop() -> None:
    own = Preprocessing(224, framing="crop", crop_share=224 / 256)
    asked = own.adapted(owner="Test", image_size=448, framing="own", interpolation="bilinear")
    assert asked == Preprocessing(448, framing="crop", crop_share=224 / 256, interpolation="bilinear")
    assert own.adapted(owner="Test", image_size=None, framing="squash", interpolation=None).framing == "squash"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"framing": "stretch"}, r"framing='stretch' is unknown; use one of \['squash', 'crop', 'pad', 'own'\]"),
        ({"interpolation": "nearest"}, r"interpolation='nearest' is unknown; use one of \['bilinear', 'bicubic'\]"),
        ({"image_size": 0}, "image_size.*1 px.*got 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    framing: Framing = "squash"
    with pytest.raises(ConfigError, match=message):
        Preprocessing(8).adapted(
            owner="Test", **{"image_size": 8, "framing": framing, "interpolation": None, **options}
        )


def test_processors_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_processor_type 'SegImageProcessor'.*'SamImage"):
        settings_of({"image_processor_type": "SegImageProcessor"}, owner="Test")
    with pytest.raises(ConfigError, match=r"image_processor_type.*\['size'\]"):
        settings_of({"size": 224}, owner="Test")
    lanczos = {"image_processor_type": "ViTImageProcessor", "resample": 1}
    with pytest.raises(ConfigError, match="filter 1,.*interpolation.*bicubic"):
        preprocessing_of(owner="Test", source=None, processor=lanczos, size=None, interpolation=None)
    assert (
        preprocessing_of(owner="Test", source=None, processor=lanczos, size=64, interpolation="bicubic").image_size
        == 64
    )
    with pytest.raises(ConfigError, match="Test: .*image_size"):
        preprocessing_of(owner="Test", source=None, processor=None, size=None, interpolation=None)

"""Edges where there are edges, and DexiNed's input as its weights were trained on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts import KorniaEdges
from visexpert.experts.edges import dexined


def square(side: int = 48) -> Tensor:
    """A white square on black, (1, 3, side, side)."""
    images_BCHW = torch.zeros(1, 3, side, side)
    images_BCHW[..., side // 4 : -side // 4, side // 4 : -side // 4] = 1.0
    return images_BCHW


def edges(image: Tensor, **options: Any) -> Tensor:
    expert = KorniaEdges(image_size=image.shape[-1], **options).eval()
    expert.load_weights()
    tokens = expert(image)
    assert (expert.token_dim, expert.tokens, expert.license) == (1, "prediction", "none needed")
    map_HW: Tensor = tokens.tokens_BSE.view(*tokens.grid_hw)
    return map_HW


@pytest.mark.parametrize("method", ["sobel", "canny"])
def test_edges_are_on_the_outline_and_nowhere_else(method: Any) -> None:
    found = edges(square(), method=method)
    assert found.min() >= 0 and found.max() <= 1
    assert found[12:36, 10:14].amax(1).min() > 0.4  # along the left side
    assert found[20:28, 20:28].max() < 0.01 and found[:8].max() < 0.01  # inside and outside


def test_sobel_is_half_the_step_on_both_sides_of_it() -> None:
    """Sobel's normalized kernel gives 1/2 on the two columns beside a step of height 1."""
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1.0
    found = edges(image, method="sobel")
    torch.testing.assert_close(found[:, 7:9], torch.full((16, 2), 0.5), atol=1e-3, rtol=0)
    assert found[:, :6].max() < 2e-3


def test_canny_is_thin_and_follows_its_thresholds() -> None:
    found = edges(square(), method="canny")
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert (found[24] > 0).sum() <= 4  # two sides, at most two pixels each
    faint = square() * 0.02
    assert edges(faint, method="canny").sum() == 0 < edges(faint, method="canny", low=0.001, high=0.002).sum()


def test_a_smaller_map_is_the_mean_of_its_cells() -> None:
    whole, small = edges(square(), method="sobel"), edges(square(), method="sobel", map_size=12)
    torch.testing.assert_close(small, whole.view(12, 4, 12, 4).mean((1, 3)), atol=1e-5, rtol=1e-5)


def test_dexined_reads_bgr_and_its_weights_file(tmp_path: Path) -> None:
    model: Any = dexined().eval()
    torch.save(model.state_dict(), tmp_path / "DexiNed_BIPED_10.pth")
    expert = KorniaEdges(method="dexined", image_size=32, weights=str(tmp_path)).eval()
    expert.load_weights()
    image = torch.rand(1, 3, 32, 32)
    bgr = torch.stack([image[:, 2] * 255 - 103.939, image[:, 1] * 255 - 116.779, image[:, 0] * 255 - 123.68], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(expert(image).tokens_BSE.view(32, 32), model(bgr)[0, 0].sigmoid())
    assert expert.license == "not stated"


def test_dexineds_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with torch.device("meta"):
        expert = KorniaEdges(method="dexined", image_size=64)
    with pytest.raises(WeightsError, match=r"DexiNed_BIPED_10.pth of 'kornia/dexined' .*`hf download kornia/dexined`"):
        expert.load_weights()


def test_the_fingerprint_follows_the_method() -> None:
    options: list[dict[str, Any]] = [{"method": "sobel"}, {"method": "canny"}, {"low": 0.05}, {"map_size": 24}]
    assert len({KorniaEdges(image_size=48, **entry).fingerprint() for entry in options}) == 4


def test_impossible_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"method='hed' is unknown; use one of sobel, canny, dexined"):
        KorniaEdges(method="hed")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="low=0.3 and high=0.2"):
        KorniaEdges(low=0.3)
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ConfigError, match=r"need kornia; install it with: pip install 'kornia>=0.8'"):
        KorniaEdges()


def test_dexined_is_found_where_older_releases_of_kornia_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(torch.nn.Identity):
        def __init__(self, *, pretrained: bool) -> None:
            super().__init__()
            assert not pretrained  # which would download

    older: Any = ModuleType("kornia.filters.dexined")
    older.DexiNed = Older
    monkeypatch.setitem(sys.modules, "kornia.models.dexined", None)
    monkeypatch.setitem(sys.modules, "kornia.filters.dexined", older)
    assert isinstance(dexined(), Older)

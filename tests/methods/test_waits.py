"""No method makes the host wait for the device more than twice a step, and images are scaled once, if at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.waits import waits_per_step
from tests.methods.helpers import merging_of, noise_batch, shake, tiny_tove
from tests.methods.movekd.helpers import PAPER, tiny_movekd
from tests.methods.test_views import mixed, model_of
from visexpert.data import pack
from visexpert.methods import Method
from visexpert.tabletop import TabletopData
from visexpert.types import IGNORE_INDEX, IMAGE_TOKEN, Batch

MOST = 2


def marked() -> Batch:
    """Two images, one of which stands for none, with a chat template's texts."""
    return replace(mixed(), text=pack([[([5, IMAGE_TOKEN, 6, 7, 8], 3)], [([9, 10, 11], 1)]], 0))


def in_tiles() -> Batch:
    batch = noise_batch(size=32)
    there_B = torch.tensor([True, False])
    return replace(batch, original_hw_B2=torch.tensor([[32, 64], [64, 32]]), has_image_B=there_B)


def merging(**options: Any) -> Method:
    return merging_of(teacher=shake(tiny_tove()), lm_weight=0.5, **options)


CASES: dict[str, tuple[Callable[[], Method], Callable[[], Batch]]] = {
    "tove": (tiny_tove, noise_batch),
    "tove, noisy top-2 gate": (lambda: tiny_tove(noise="fixed", top_k=2, balance_form="switch"), mixed),
    "tove, marked": (lambda: model_of("tove"), marked),
    "tove, tiles": (lambda: model_of("tove", tiles=True), in_tiles),
    "movekd": (tiny_movekd, noise_batch),
    "movekd, paper": (lambda: tiny_movekd(**PAPER), mixed),
    "movekd, marked, fixed": (lambda: model_of("movekd"), marked),
    "movekd, tiles": (lambda: model_of("movekd", tiles=True), in_tiles),
    "merging": (merging, noise_batch),
    "merging, marked": (lambda: model_of("merging"), marked),
    "merging, tiles": (lambda: model_of("merging", tiles=True), in_tiles),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_more_than_twice(case: str, tmp_path: Path) -> None:
    """The first one, which looks at what may raise an alarm, and the last, whose row is written, included."""
    make_model, make_batch = CASES[case]
    steps = waits_per_step(make_model(), [make_batch()] * 3, folder=tmp_path)
    assert len(steps) == 3
    for waits in steps:
        assert 0 < len(waits) <= MOST, "\n".join(map(str, waits))  # one is the look at whether all is finite


def count_scaled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each batch whose bytes are scaled; a store is filled from floats."""
    scaled: list[int] = []

    def scale(images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        scaled.append(len(images))
        return images.float() / 255

    monkeypatch.setattr("visexpert.types._scaled", scale)
    return scaled


@pytest.mark.parametrize("method", ["tove", "movekd", "merging"])
def test_no_step_waits_more_often_for_what_is_stored(
    method: str, tmp_path: Path, data: Callable[..., TabletopData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is an image scaled, where no encoder looks at it, or more than once, where one does."""
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path))
    scaled = count_scaled(monkeypatch)
    cached: dict[str, Any] = {"folder": str(tmp_path / "store")}
    make: dict[str, Callable[[], Method]] = {
        "tove": lambda: tiny_tove(**cached),
        "movekd": lambda: tiny_movekd(**cached),
        "merging": lambda: merging(targets="store"),
    }
    steps = waits_per_step(make[method](), data(), folder=tmp_path)
    for waits in steps:
        assert 0 < len(waits) <= MOST, "\n".join(map(str, waits))
    assert len(scaled) == (0 if method == "tove" else 3)  # the student's own look


def test_images_are_scaled_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = count_scaled(monkeypatch)
    models: list[Method] = [tiny_tove(), tiny_movekd(), merging()]
    for model in models:
        scaled.clear()
        model.step(noise_batch())
        assert len(scaled) == 1


def test_what_the_host_needs_is_counted_before_a_batch_moves() -> None:
    """``meta`` has no values: whatever is read of a batch there was known before."""
    moved = replace(marked(), original_hw_B2=torch.tensor([[32, 64], [64, 32]])).to("meta")
    assert moved.text is not None and moved.images_BCHW.is_meta and moved.text.ids_BN.is_meta
    assert moved.text.facts.places_M.is_meta
    assert moved.counts() == {"token": 4, "image": 1}
    facts = moved.text.facts
    assert facts.longest == 5 and facts.has_markers and not facts.opens_supervised
    assert facts.lengths_BI.tolist() == [[5], [3]] and facts.markers_BI.tolist() == [[1], [0]]
    host = {name: getattr(moved, name) for name in moved.of_host}
    assert sorted(host) == ["has_image_B", "index_B", "original_hw_B2"]
    assert not any(tensor.is_meta for tensor in host.values())


def test_texts_that_are_changed_are_counted_anew() -> None:
    text = marked().text
    assert text is not None and text.facts.num_supervised == 4
    fewer = replace(text, labels_BN=torch.where(text.labels_BN == 7, IGNORE_INDEX, text.labels_BN)).to("cpu")
    assert fewer.facts.num_supervised == 3 and fewer.facts.places_M.tolist() == [4, 6, 7]

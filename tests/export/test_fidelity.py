"""The comparison against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from visexpert.errors import WeightsError
from visexpert.export.fidelity import check_inputs, check_levels, compare, difference, equal_ids, levels


def test_a_difference_by_hand() -> None:
    reference = torch.tensor([[3.0, 4.0], [6.0, 8.0]])  # root mean square: sqrt(125 / 4)
    found = difference(torch.tensor([[4.0, 3.0], [6.0, 8.0]]), reference)
    assert found.max_abs == 1.0 and found.mean_abs == 0.5
    assert found.relative == pytest.approx(1 / math.sqrt(125 / 4))
    assert found.min_cosine == pytest.approx(24 / 25) and found.mean_cosine == pytest.approx(49 / 50)


def test_what_is_not_close_is_refused() -> None:
    reference = {"pooled": torch.ones(2, 3)}
    assert compare({"pooled": torch.ones(2, 3)}, reference, tolerance=1e-9, what="hf")["pooled"]["relative"] == 0
    for bad in (torch.full((2, 3), 1.01), torch.full((2, 3), float("nan"))):
        with pytest.raises(WeightsError, match=r"hf export differs .* error of pooled is (0.01|nan) .*tolerance"):
            compare({"pooled": bad}, reference, tolerance=1e-3, what="hf")
    with pytest.raises(WeightsError, match=r"gave \(1, 3\) for pooled instead of \(2, 3\)"):
        compare({"pooled": torch.ones(1, 3)}, reference, tolerance=1e-3, what="hf")
    with pytest.raises(WeightsError, match=r"gave nothing for pooled"):
        compare({}, reference, tolerance=1e-3, what="hf")


def test_a_reference_of_zeros_allows_zeros_only() -> None:
    assert difference(torch.zeros(1, 2), torch.zeros(1, 2)).relative == 0
    assert difference(torch.full((1, 2), 1e-9), torch.zeros(1, 2)).relative == math.inf


def test_preprocessing_is_judged_in_levels() -> None:
    std = torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1)
    image = torch.zeros(1, 3, 2, 2)
    assert levels(image + 2 / 255 / 0.5, image, std) == pytest.approx(2.0, rel=1e-4)
    assert levels(image[..., :1], image, std) == math.inf
    check_levels({"photo_larger": 1.9, "photo_noise": 30.0}, what="hf")
    with pytest.raises(WeightsError, match=r"differs by 2.1 of 255 levels on photo_larger"):
        check_levels({"photo_larger": 2.1}, what="hf")


def test_other_token_ids_are_refused() -> None:
    equal_ids(torch.tensor([[4, 1]]), torch.tensor([[4, 1]]), what="llava")
    with pytest.raises(WeightsError, match=r"gives the last token ids \[4, 2\]"):
        equal_ids(torch.tensor([[4, 2]]), torch.tensor([[4, 1]]), what="llava")


def test_inputs_are_fixed_and_unlike_one_another() -> None:
    one, two = check_inputs(32), check_inputs(32)
    assert torch.equal(one.images_BCHW, two.images_BCHW) and one.images_BCHW.shape == (8, 3, 32, 32)
    assert 0 <= float(one.images_BCHW.min()) and float(one.images_BCHW.max()) <= 1
    distances = torch.cdist(one.images_BCHW.flatten(1), one.images_BCHW.flatten(1)) + 9 * torch.eye(8)
    assert float(distances.min()) > 1
    assert {photo.dtype for photo in one.photos.values()} == {torch.uint8}

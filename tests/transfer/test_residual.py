"""Both ways of adding expert knowledge, by hand."""

from __future__ import annotations

import pytest
import torch

from visexpert.errors import ConfigError
from visexpert.transfer import ResidualTransfer

CLIP = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
ADAPTED = {"a": torch.tensor([[[10.0, 0.0], [10.0, 0.0]]]), "c": torch.tensor([[[0.0, 100.0], [100.0, 0.0]]])}
GATES = torch.tensor([[[0.5, 0.9, 0.25], [0.0, 0.9, 1.0]]])
"""Columns a, b, c; b is detached (not in ADAPTED), so that its column must not matter."""


def test_residual_adds_to_clip() -> None:
    fused = ResidualTransfer()(CLIP, ADAPTED, GATES, ["a", "b", "c"])
    assert fused.tolist() == [[[1 + 5, 2 + 25], [3 + 100, 4]]]


def test_replacement_leaves_clip_out() -> None:
    fused = ResidualTransfer(mode="replacement")(CLIP, ADAPTED, GATES, ["a", "b", "c"])
    assert fused.tolist() == [[[5, 25], [100, 0]]]


def test_columns_go_by_name_not_by_the_order_of_the_mapping() -> None:
    swapped = {"c": ADAPTED["c"], "a": ADAPTED["a"]}
    names = ["a", "b", "c"]
    assert torch.equal(ResidualTransfer()(CLIP, swapped, GATES, names), ResidualTransfer()(CLIP, ADAPTED, GATES, names))


def test_nothing_attached_hands_clip_on_untouched() -> None:
    assert ResidualTransfer()(CLIP, {}, GATES, ["a", "b", "c"]) is CLIP


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode='sum' is unknown; use 'residual' or 'replacement'"):
        ResidualTransfer(mode="sum")  # type: ignore[arg-type]

"""Packed items equal one item per row, and see neither one another nor the future."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.language.helpers import KINDS, VOCAB, item, language_model, vision
from visexpert.data import pack
from visexpert.errors import DataError
from visexpert.language import item_mask, supervised
from visexpert.types import IGNORE_INDEX, TextBatch, VisionTokens


def test_supervised_positions_by_hand() -> None:
    text = pack([[([1, 5, 6, 2], 2), ([1, 7, 2], 1)], [([1, 8, 9, 4, 2], 4)]], 0)
    targets_M, predicting_M = supervised(text)
    assert targets_M.tolist() == [6, 2, 7, 2, 2]
    assert predicting_M.tolist() == [1, 2, 4, 5, 7 + 3]  # rows of 7


def test_a_label_on_the_first_token_is_refused() -> None:
    text = pack([[([1, 5, 2], 0)]], 0)
    with pytest.raises(DataError, match="the first token of a row has a label"):
        supervised(text)


def test_the_mask_by_hand() -> None:
    text = pack([[([1, 5], 1), ([1, 6], 1)], [([1, 7, 2], 1)]], 0)
    assert item_mask(text).long()[:, 0].tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]],  # the last one is padding
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_items_give_the_logits_of_one_item_per_row(kind: str) -> None:
    side, images = language_model(kind), vision(2)
    rows = [[item(5, 2), item(9, 4), item(4, 1)], [item(7, 3)]]
    packed_MV = side(images, pack(rows, 0)).logits_MV
    owner = [image for image, items in enumerate(rows) for _ in items]
    apart = VisionTokens(images.tokens_BTD[owner], images.grid_hw)
    single_MV = side(apart, pack([[one] for items in rows for one in items], 0)).logits_MV
    assert packed_MV.shape == (3 + 5 + 3 + 4, VOCAB)
    torch.testing.assert_close(packed_MV, single_MV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_reaches_what_follows_in_its_own_item_and_nothing_else(kind: str) -> None:
    side, images = language_model(kind), vision(1)
    text = pack([[item(5, 1), item(6, 1), item(5, 1)]], 0)
    before_MV = side(images, text).logits_MV
    # Supervised tokens: 0-3 of item 1, 4-8 of item 2, 9-12 of item 3. Token 2 of item 2 (column 5 + 2) predicts
    # that item's token 3, which is the seventh supervised one, number 6.
    changed = text.ids_BN.clone()
    changed[0, 7] = (changed[0, 7] + 1) % VOCAB
    after_MV = side(images, replace(text, ids_BN=changed)).logits_MV
    moved = (after_MV - before_MV).abs().amax(-1)
    assert moved[6:9].min() > 1e-3
    torch.testing.assert_close(after_MV[:6], before_MV[:6], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(after_MV[9:], before_MV[9:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_read(kind: str) -> None:
    side, images = language_model(kind), vision(2)
    text = pack([[item(9, 1)], [item(4, 1)]], 0)
    filled = torch.where(text.segments_BN > 0, text.ids_BN, torch.full_like(text.ids_BN, 17))
    assert not torch.equal(filled, text.ids_BN)
    torch.testing.assert_close(side(images, replace(text, ids_BN=filled)).logits_MV, side(images, text).logits_MV)


@pytest.mark.parametrize("kind", KINDS)
def test_every_item_reads_its_own_image(kind: str) -> None:
    side, images = language_model(kind), vision(2)
    text = pack([[item(4, 1), item(5, 1)], [item(6, 1)]], 0)
    before_MV = side(images, text).logits_MV
    tokens_BTD = images.tokens_BTD.clone()
    tokens_BTD[0, 3] = torch.randn(16)
    moved = (side(VisionTokens(tokens_BTD, images.grid_hw), text).logits_MV - before_MV).abs().amax(-1)
    assert moved[:7].min() > 1e-4
    assert moved[7:].max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_of_the_tokens_matters(kind: str) -> None:
    """The language model knows where a token lies: the same tokens on a grid turned by 90 degrees read otherwise."""
    side, images = language_model(kind), vision(1)
    text = pack([[item(5, 1)]], 0)
    turned = VisionTokens(images.tokens_BTD, (images.grid_hw[1], images.grid_hw[0]))
    assert (side(images, text).logits_MV - side(turned, text).logits_MV).abs().max() > 1e-3


def test_too_long_an_item_is_refused_though_a_long_row_is_fine() -> None:
    side, images = language_model("cross"), vision(1)
    side(images, pack([[item(24, 1), item(24, 1)]], 0))
    with pytest.raises(DataError, match=r"item of 25 tokens is longer than max_tokens=24; shorten it or raise"):
        side(images, pack([[item(25, 1)]], 0))


def test_too_long_an_item_behind_a_prefix_is_refused() -> None:
    side, images = language_model("prefix"), vision(1)
    side(images, pack([[item(58, 1), item(58, 1)]], 0))  # 6 image tokens and 58 are the 64 positions
    with pytest.raises(DataError, match=r"text item with its image takes 65 tokens, more than the 64 positions"):
        side(images, pack([[item(59, 1)]], 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_supervised_tokens_has_no_logits(kind: str) -> None:
    text = pack([[([1, 5], 2)]], 0)
    empty = TextBatch(text.ids_BN, torch.full_like(text.ids_BN, IGNORE_INDEX), text.segments_BN, text.positions_BN)
    assert [part.shape for part in language_model(kind)(vision(1), empty)] == [(0, VOCAB), (0,)]

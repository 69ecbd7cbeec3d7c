"""Images in the middle of packed conversations: equal to one item per row, counts checked, labels on every turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.language.helpers import KINDS, language_model, vision
from tests.language.llava_models import words
from visexpert.data import pack
from visexpert.errors import DataError
from visexpert.language.splice import lay_out
from visexpert.types import IGNORE_INDEX, IMAGE_TOKEN, TextBatch, VisionTokens


def test_places_positions_and_masks_by_hand() -> None:
    """Two items of one image of 3 tokens, the second sample of text alone."""
    text = pack([[([1, IMAGE_TOKEN, 5], 2), ([1, 6, IMAGE_TOKEN, 7, 8], 3)], [([1, 9], 1)]], 0)
    see = VisionTokens(torch.zeros(2, 3, 4), (1, 3), lengths=(3, 0))
    reading = lay_out(see, text)
    assert reading.source_BL[0].tolist() == [0, 8, 9, 10, 2, 3, 4, 8, 9, 10, 6, 7]
    assert reading.positions_BL[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert reading.positions_BL[1, :2].tolist() == [0, 1]
    assert reading.predicting_M.tolist() == [3, 9, 10, 12 + 0]  # the second row begins at 12
    assert reading.targets_M.tolist() == [5, 7, 8, 9] and reading.longest == 7
    mask_LL = reading.mask_BLL[0].long()
    assert mask_LL[4].tolist() == [1] * 5 + [0] * 7  # the first item's end sees its image and itself
    assert mask_LL[6].tolist() == [0] * 5 + [1] * 2 + [0] * 5  # the second item does not see its image yet
    assert mask_LL[11].tolist() == [0] * 5 + [1] * 7


def conversation(lengths: list[int]) -> tuple[list[int], list[int]]:
    """<bos>, the image, then questions and answers of 2 tokens and of these lengths; labels stand on the answers."""
    ids, labels = [1, IMAGE_TOKEN], [IGNORE_INDEX] * 2
    for length in lengths:
        question, answer = words(2), words(length)
        ids += question + answer
        labels += [IGNORE_INDEX] * 2 + answer
    return ids, labels


def packed(rows: list[list[tuple[list[int], list[int]]]]) -> TextBatch:
    text = pack([[(ids, len(ids)) for ids, _ in row] for row in rows], 0)
    labels_BN = text.labels_BN.clone()
    for index, row in enumerate(rows):
        flat = [label for _, labels in row for label in labels]
        labels_BN[index, : len(flat)] = torch.tensor(flat)
    return replace(text, labels_BN=labels_BN)


def test_packed_conversations_give_the_logits_of_one_per_row() -> None:
    side, images = language_model("prefix"), vision(2)
    rows = [[conversation([3, 2]), conversation([1, 4, 2])], [conversation([5])]]
    together_MV = side(images, packed(rows)).logits_MV
    owner = [image for image, items in enumerate(rows) for _ in items]
    apart = VisionTokens(images.tokens_BTD[owner], images.grid_hw)
    single_MV = side(apart, packed([[one] for items in rows for one in items])).logits_MV
    assert len(together_MV) == 3 + 2 + 1 + 4 + 2 + 5
    torch.testing.assert_close(together_MV, single_MV, atol=1e-5, rtol=1e-5)


def test_an_answer_in_mid_conversation_depends_on_what_was_before_it_only() -> None:
    side, images = language_model("prefix"), vision(1)
    ids, labels = conversation([3, 2])
    before_MV = side(images, packed([[(ids, labels)]])).logits_MV
    changed = [*ids[:-1], ids[-1] % 30 + 3]
    torch.testing.assert_close(side(images, packed([[(changed, labels)]])).logits_MV, before_MV, atol=1e-6, rtol=1e-6)
    changed = [*ids[:4], ids[4] % 30 + 3, *ids[5:]]  # the first word of the first answer
    after_MV = side(images, packed([[(changed, labels)]])).logits_MV
    torch.testing.assert_close(after_MV[0], before_MV[0], atol=1e-6, rtol=1e-6)
    assert float((after_MV - before_MV)[1:].detach().abs().amax(-1).min()) > 1e-3


def test_an_image_first_equals_an_image_in_front() -> None:
    """The marker as the first token after <bos> differs from the prefix by the place of <bos> alone."""
    side, images = language_model("prefix"), vision(1)
    body = words(6)
    marked = pack([[([IMAGE_TOKEN, *body], 3)]], 0)
    torch.testing.assert_close(
        side(images, marked).logits_MV, side(images, pack([[(body, 2)]], 0)).logits_MV, atol=1e-5, rtol=1e-5
    )


def test_text_alone_reads_no_image() -> None:
    side, images = language_model("prefix"), vision(2)
    ids, labels = conversation([3])
    alone = [1, *words(4)]
    there = replace(images, lengths=(6, 0))
    mixed = packed([[(ids, labels)], [(alone, [IGNORE_INDEX, *alone[1:]])]])
    expected = language_model_logits(side, alone)
    torch.testing.assert_close(side(there, mixed).logits_MV[3:], expected, atol=1e-5, rtol=1e-5)
    only = pack([[(alone, 1)]], 0)
    absent = VisionTokens(images.tokens_BTD[:1], images.grid_hw, lengths=(0,))
    torch.testing.assert_close(side(absent, only).logits_MV, expected, atol=1e-5, rtol=1e-5)
    assert side.generate(absent, [alone], eos_id=0, max_new_tokens=3) == [written_alone(side, alone)]


def language_model_logits(side: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = side.model(input_ids=torch.tensor([ids])).logits[0, :-1]  # type: ignore[operator]
    return logits


def written_alone(side: torch.nn.Module, ids: list[int]) -> list[int]:
    out = side.model.generate(  # type: ignore[union-attr, operator]
        input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=0, pad_token_id=0
    )
    return [token for token in out[0, len(ids) :].tolist() if token]


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_and_no_nan_from_an_absent_image(kind: str) -> None:
    side = language_model(kind)
    tokens_BTD = vision(2).tokens_BTD.requires_grad_()
    see = VisionTokens(tokens_BTD, (2, 3), lengths=(4, 0))
    logits_MV = side(see, pack([[([1, *words(4)], 1)]] * 2, 0)).logits_MV
    assert bool(logits_MV.isfinite().all())
    logits_MV.square().sum().backward()
    assert tokens_BTD.grad is not None and bool(tokens_BTD.grad.isfinite().all())
    moved_BT = tokens_BTD.grad.abs().amax(-1) > 0
    assert moved_BT.tolist() == [[True] * 4 + [False] * 2, [False] * 6]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_an_image_is_never_read(kind: str) -> None:
    side, images = language_model(kind), vision(1)
    short = VisionTokens(images.tokens_BTD[:, :4], (2, 2))
    side.position_scale = 0.0  # type: ignore[assignment]
    padded = replace(images, lengths=(4,))
    text = pack([[([1, *words(5)], 2)]], 0)
    torch.testing.assert_close(side(padded, text).logits_MV, side(short, text).logits_MV, atol=1e-5, rtol=1e-5)


def test_counts_of_markers_are_checked() -> None:
    side, images = language_model("prefix"), vision(2)
    fine, twice, none = [1, IMAGE_TOKEN, 5], [1, IMAGE_TOKEN, IMAGE_TOKEN, 5], [1, 5, 6]
    with pytest.raises(DataError, match=r"Text item 2 of sample 0 .* has 2 image tokens .* the sample has 1 image;"):
        side(images, pack([[(fine, 2), (twice, 3)], [(fine, 2)]], 0))
    with pytest.raises(DataError, match=r"Text item 1 of sample 1 .* has 0 image tokens .* the sample has 1 image;"):
        side(images, pack([[(fine, 2)], [(none, 2)]], 0))
    absent = replace(images, lengths=(6, 0))
    with pytest.raises(DataError, match=r"Text item 1 of sample 1 .* has 1 image tokens .* the sample has 0 image;"):
        side(absent, pack([[(fine, 2)], [(fine, 2)]], 0))
    with pytest.raises(DataError, match="A prompt has 2 image tokens .* its sample has 1 image"):
        side.generate(images, [fine, twice], eos_id=0)


def test_a_side_that_reads_images_beside_the_text_refuses_markers() -> None:
    with pytest.raises(DataError, match="CrossAttentionDecoder reads images beside the text"):
        language_model("cross")(vision(1), pack([[([1, IMAGE_TOKEN, 5], 2)]], 0))
    with pytest.raises(DataError, match="CrossAttentionDecoder reads images beside the text"):
        language_model("cross").generate(vision(1), [[1, IMAGE_TOKEN]], eos_id=0)

"""Images and prompts to logits and text: equal to transformers' LLaVA-1.5 and LLaVA-NeXT on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaNextImageProcessor

from tests.language.helpers import item
from tests.language.llava_models import CLIP, SIDE, Parts, llava_15, llava_next, parts_of, widened, words
from visexpert.data import pack
from visexpert.errors import ConfigError
from visexpert.language import PrefixLM
from visexpert.types import IMAGE_TOKEN, Batch, VisionTokens
from visexpert.vision import ClipEncoder
from visexpert.vision.anyres import TiledClipEncoder

NEVER = 0
PINPOINTS = [[1, 2], [2, 1], [2, 2]]


def prompts() -> list[list[int]]:
    """Of two lengths, with unlike places for the image."""
    return [[1, *words(3), IMAGE_TOKEN, *words(4)], [1, IMAGE_TOKEN, *words(9)]]


def test_logits_equal_llava_15() -> None:
    model = llava_15()
    ours = parts_of(model, ClipEncoder(config=CLIP, layer=-2))
    images, rows = torch.rand(2, 3, SIDE, SIDE), prompts()
    for row, image in zip(rows, images, strict=True):
        pixels = ours.clip.preprocess(image[None])
        wanted = model(input_ids=torch.tensor([widened(row, 16)]), pixel_values=pixels).logits[0]
        after = row.index(IMAGE_TOKEN) + 16  # of the words behind the image; each is predicted one before
        found = ours.language(ours.see(image[None]), pack([[(row, row.index(IMAGE_TOKEN) + 1)]], 0)).logits_MV
        torch.testing.assert_close(found, wanted[after - 1 : -1], atol=1e-4, rtol=1e-4)


def test_a_batch_writes_what_llava_15_writes_alone() -> None:
    """Prompts of unlike lengths are padded on the left."""
    model = llava_15()
    ours = parts_of(model, ClipEncoder(config=CLIP, layer=-2))
    images, rows = torch.rand(2, 3, SIDE, SIDE), prompts()
    written = ours.language.generate(ours.see(images), rows, eos_id=NEVER, max_new_tokens=5)
    for row, image, text in zip(rows, images, written, strict=True):
        wanted = model.generate(
            input_ids=torch.tensor([widened(row, 16)]),
            pixel_values=ours.clip.preprocess(image[None]),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=NEVER,
            pad_token_id=NEVER,
        )[0, len(row) + 15 :]
        assert text == [token for token in wanted.tolist() if token != NEVER]


def next_parts() -> tuple[Parts, Any]:
    model = llava_next(PINPOINTS)
    return parts_of(model, TiledClipEncoder(config=CLIP, layer=-2, pinpoints=PINPOINTS)), model


def next_tokens(ours: Parts, batch: Batch) -> VisionTokens:
    views = ours.clip.views_of(batch)
    return views.join(ours.see(views.batch.images_01()))


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (64, 64), (33, 57), (20, 30), (31, 100)])
def test_logits_equal_llava_next(size: tuple[int, int]) -> None:
    """From the pixels on, tiles, order, unpadding, newlines and all, by transformers' own image processor."""
    ours, model = next_parts()
    image = 0.3 + 0.4 * torch.rand(3, *size)  # no overshoot of bicubic filters to clip
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        do_rescale=False,
        image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for rows, columns in PINPOINTS],
    )
    theirs = processor(image, return_tensors="pt")
    vision = next_tokens(ours, Batch(image[None], torch.arange(1), "test"))
    assert vision.lengths is not None
    row = prompts()[0]
    ids = torch.tensor([widened(row, vision.lengths[0])])
    wanted: Tensor = model(input_ids=ids, **theirs).logits[0]
    found = ours.language(vision, pack([[(row, row.index(IMAGE_TOKEN) + 1)]], 0)).logits_MV
    torch.testing.assert_close(found, wanted[-len(found) - 1 : -1], atol=2e-4, rtol=2e-4)


def test_images_of_unlike_tiles_share_a_batch() -> None:
    """Each alone gives what it gives beside another with more tokens, in logits and in text."""
    ours, _ = next_parts()
    sizes = torch.tensor([[40, 90], [64, 64]])
    batch = Batch(torch.rand(2, 3, 80, 80), torch.arange(2), "test", original_hw_B2=sizes)
    alone = [
        next_tokens(ours, Batch(batch.images_BCHW[i : i + 1], torch.arange(1), "test", original_hw_B2=sizes[i : i + 1]))
        for i in range(2)
    ]
    both, rows = next_tokens(ours, batch), prompts()
    text = pack([[(row, row.index(IMAGE_TOKEN) + 1)] for row in rows], 0)
    singles = [pack([[(row, row.index(IMAGE_TOKEN) + 1)]], 0) for row in rows]
    expected = torch.cat([ours.language(see, one).logits_MV for see, one in zip(alone, singles, strict=True)])
    torch.testing.assert_close(ours.language(both, text).logits_MV, expected, atol=1e-4, rtol=1e-4)
    written = ours.language.generate(both, rows, eos_id=NEVER, max_new_tokens=4)
    for see, row, wanted in zip(alone, rows, written, strict=True):
        assert ours.language.generate(see, [row], eos_id=NEVER, max_new_tokens=4) == [wanted]
    # The same with the image in front of packed items.
    plain = pack([[item(4, 1), item(5, 2)], [item(6, 2)]], 0)
    parts = [
        pack([[(plain.ids_BN[0, :4].tolist(), 1), (plain.ids_BN[0, 4:9].tolist(), 2)]], 0),
        pack([[(plain.ids_BN[1, :6].tolist(), 2)]], 0),
    ]
    expected = torch.cat([ours.language(see, one).logits_MV for see, one in zip(alone, parts, strict=True)])
    torch.testing.assert_close(ours.language(both, plain).logits_MV, expected, atol=1e-4, rtol=1e-4)


def test_tiles_need_a_newline_and_no_position_code() -> None:
    ours, _ = next_parts()
    vision = next_tokens(ours, Batch(torch.rand(1, 3, 40, 80), torch.arange(1), "test"))
    text = pack([[item(4, 1)]], 0)
    fields = ours.language.settings.to_dict()
    with pytest.raises(ConfigError, match="come in tiles.*image_newline"):
        PrefixLM(config=fields)(vision, text)
    with pytest.raises(ConfigError, match="position_scale encodes a single grid, but the images come in tiles"):
        PrefixLM(config=fields, image_newline=True, position_scale=0.5)(vision, text)


def test_the_newline_learns_in_the_place_of_the_last_column() -> None:
    ours, _ = next_parts()
    vision = next_tokens(ours, Batch(torch.rand(1, 3, 40, 80), torch.arange(1), "test"))
    ours.language(vision, pack([[item(4, 1)]], 0)).logits_MV.sum().backward()
    assert ours.language.image_newline is not None
    gradient = ours.language.image_newline.weight.grad
    assert gradient is not None and float(gradient.abs().max()) > 0

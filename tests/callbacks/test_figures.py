"""Regions of tokens, from masks drawn by hand."""

from __future__ import annotations

import numpy as np
import torch

from visexpert.callbacks.figures import token_regions


def test_regions_of_a_mask_drawn_by_hand() -> None:
    # 4x4 tokens of 4x4 pixels: object 1 fills the first token, half of the second; object 2 half of the third.
    instance_BHW = torch.zeros(1, 16, 16, dtype=torch.long)
    instance_BHW[0, :4, :6] = 1
    instance_BHW[0, :4, 10:12] = 2
    regions = token_regions(instance_BHW, (4, 4))
    assert regions["object"][0, 0].tolist() == [True, False, False, False]
    assert regions["boundary"][0, 0].tolist() == [False, True, True, False]
    assert regions["background"][0, 1:].all()


def test_a_token_half_one_half_another_object_is_boundary() -> None:
    instance_BHW = torch.ones(1, 4, 4, dtype=torch.long)
    instance_BHW[0, :, 2:] = 2
    regions = token_regions(instance_BHW, (1, 1))
    assert regions["boundary"].all() and not regions["object"].any()


def test_regions_cover_each_token_once() -> None:
    generator = torch.Generator().manual_seed(0)
    instance_BHW = torch.randint(0, 3, (5, 24, 24), generator=generator)
    regions = token_regions(instance_BHW, (8, 8))
    counts = np.stack([mask.astype(int) for mask in regions.values()]).sum(axis=0)
    assert (counts == 1).all()


def test_an_empty_scene_is_background() -> None:
    regions = token_regions(torch.zeros(2, 8, 8, dtype=torch.long), (4, 4))
    assert regions["background"].all()

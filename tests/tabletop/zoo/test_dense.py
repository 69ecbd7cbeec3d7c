"""Augmentation moves an image and its class maps alike."""

from __future__ import annotations

import torch

from visexpert.tabletop.zoo.dense import SpatialAugment


def test_identity() -> None:
    images, classes = torch.rand(2, 3, 16, 16), torch.randint(-1, 3, (2, 16, 16))
    moved, targets = SpatialAugment(scale=(1.0, 1.0), shift=0.0, flip=0.0)(images, {"colour_BHW": classes})
    torch.testing.assert_close(moved, images, rtol=0, atol=1e-5)
    assert torch.equal(targets["colour_BHW"], classes)


def test_flip() -> None:
    images, classes = torch.rand(2, 3, 16, 16), torch.randint(-1, 3, (2, 16, 16))
    moved, targets = SpatialAugment(scale=(1.0, 1.0), shift=0.0, flip=1.0)(images, {"colour_BHW": classes})
    torch.testing.assert_close(moved, images.flip(-1), rtol=0, atol=1e-5)
    assert torch.equal(targets["colour_BHW"], classes.flip(-1))


def test_image_and_classes_stay_together() -> None:
    classes = torch.full((8, 48, 48), -1)
    classes[:, 16:32, 12:30] = 2
    images = (classes == 2).float()[:, None].expand(8, 3, 48, 48)
    moved, targets = SpatialAugment()(images, {"colour_BHW": classes})
    inside = (targets["colour_BHW"] == 2).float()
    # Bilinear and nearest sampling differ within one pixel of the outline, hence the allowance.
    assert ((moved[:, 0] > 0.5).float() - inside).abs().mean() < 0.02
    assert inside.flatten(1).sum(1).unique().numel() > 1

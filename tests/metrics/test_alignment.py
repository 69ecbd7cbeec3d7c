"""Retrieval and zero-shot scores by hand, and against torchmetrics."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.retrieval import retrieval_hit_rate

from visexpert.errors import DataError
from visexpert.metrics.alignment import matching_texts, retrieval_recall, zero_shot_accuracy


def test_recall_by_hand() -> None:
    # Angles in degrees: images at 11, 53 and 174, texts at 50, 42 and 180.
    images = torch.tensor([[1.0, 0.2], [0.6, 0.8], [-1.0, 0.1]])
    texts = torch.tensor([[0.5, 0.6], [1.0, 0.9], [-2.0, 0.0]])
    scores = retrieval_recall(images, texts, torch.eye(3, dtype=torch.bool))
    assert scores["image_to_text/R@1"] == pytest.approx(1 / 3)  # 11 takes 42, 53 takes 50; only 174 takes its own
    assert scores["text_to_image/R@1"] == pytest.approx(2 / 3)  # 50 takes 53; 42 and 180 take their own
    assert scores["image_to_text/R@5"] == scores["text_to_image/R@10"] == 1.0


def test_recall_equals_torchmetrics_with_several_captions_of_an_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(12, 5, generator=generator), torch.randn(30, 5, generator=generator)
    matches = torch.rand(12, 30, generator=generator) < 0.1
    matches[torch.arange(12), torch.arange(12)] = True
    found = retrieval_recall(images, texts, matches)
    cosines = F.cosine_similarity(images[:, None], texts[None], dim=-1)
    for k in (1, 5, 10):
        forward = [retrieval_hit_rate(cosines[i], matches[i], top_k=k) for i in range(12)]
        asked = [j for j in range(30) if matches[:, j].any()]
        backward = [retrieval_hit_rate(cosines[:, j], matches[:, j], top_k=k) for j in asked]
        assert found[f"image_to_text/R@{k}"] == pytest.approx(float(torch.stack(forward).mean()))
        assert found[f"text_to_image/R@{k}"] == pytest.approx(float(torch.stack(backward).mean()))


def test_a_collapsed_encoder_finds_nothing() -> None:
    images = torch.ones(12, 4)
    scores = retrieval_recall(images, torch.randn(12, 4), torch.eye(12, dtype=torch.bool))
    assert scores["text_to_image/R@10"] == 0.0
    assert zero_shot_accuracy(images, torch.ones(3, 4), torch.zeros(12, dtype=torch.long)) == 0.0


def test_equal_captions_match_the_images_of_both() -> None:
    distinct, matches = matching_texts([["a cube"], ["a cube", "a ball"], ["a cone"]])
    assert distinct == ["a cube", "a ball", "a cone"]
    assert matches.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_zero_shot_by_hand() -> None:
    classes = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[3.0, 1.0], [1.0, 3.0], [0.1, 0.2], [5.0, 0.0]])
    assert zero_shot_accuracy(images, classes, torch.tensor([0, 1, 0, 0])) == 0.75


def test_what_is_not_finite_is_refused() -> None:
    images = torch.full((2, 2), torch.nan)
    with pytest.raises(DataError, match="finite"):
        retrieval_recall(images, torch.eye(2), torch.eye(2, dtype=torch.bool))
    with pytest.raises(DataError, match=r"\(2, 3\)"):
        retrieval_recall(torch.eye(2), torch.eye(2), torch.ones(2, 3, dtype=torch.bool))

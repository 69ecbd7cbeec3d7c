"""The vote of nearest neighbors, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from visexpert.metrics.neighbors import knn_accuracy


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors at these angles."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_the_nearest_by_cosine_decides_whatever_the_length() -> None:
    train, labels = at(0, 90) * torch.tensor([[1.0], [100.0]]), ["a", "b"]
    asked = at(10, 80, 40) * 5
    assert knn_accuracy(asked, ["a", "b", "a"], train_MD=train, train_labels=labels, neighbors=1) == 1.0
    assert knn_accuracy(asked, ["b", "b", "c"], train_MD=train, train_labels=labels, neighbors=1) == pytest.approx(
        1 / 3
    )


@pytest.mark.parametrize(("neighbors", "won"), [(1, "a"), (2, "a"), (3, "b")])
def test_votes_weigh_by_their_closeness(neighbors: int, won: str) -> None:
    """One "a" at 5 degrees against "b" at 15 and 17: exp((cos - 1) / 0.07) is 0.947 against 0.615 + 0.536."""
    train = at(5, 15, -17)
    assert knn_accuracy(at(0), [won], train_MD=train, train_labels=["a", "b", "b"], neighbors=neighbors) == 1.0


def test_chunks_and_few_images_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    train, asked = torch.randn(30, 8, generator=generator), torch.randn(1500, 8, generator=generator)
    labels = [str(number % 3) for number in range(30)]
    cosines = torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    votes = torch.zeros(1500, 3)
    for image in range(1500):
        for place in cosines[image].argsort(descending=True)[:20].tolist():
            votes[image, place % 3] += math.exp(float(cosines[image, place]) / 0.07)
    expected = (votes.argmax(1) == torch.arange(1500) % 3).double().mean().item()
    true = [str(number % 3) for number in range(1500)]
    assert knn_accuracy(asked, true, train_MD=train, train_labels=labels) == pytest.approx(expected)
    assert knn_accuracy(train, labels, train_MD=train, train_labels=labels, neighbors=1) == 1.0

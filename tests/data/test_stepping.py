"""What training batches say of their optimizer step, and how far ahead they are read."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch

from visexpert.data import StepLoader, pack
from visexpert.types import Batch


def batch_of(tokens: int, images: int) -> Batch:
    """Two samples: so many supervised tokens on the first, so many images among them."""
    there_B = torch.arange(2) < images
    text = pack([[(range(5, 6 + tokens), 1)] if tokens else [], []], 0)
    return Batch(torch.zeros(2, 3, 4, 4), torch.arange(2), "train", text=text, has_image_B=there_B)


class Source:
    """Batches with 1, 2, ... tokens; counts how many were read."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.length):
            self.read += 1
            yield batch_of(number + 1, number % 3)

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}


def trainer_at(done: int, *, of: float, accumulated: int) -> L.Trainer:
    """A trainer that has done so many batches of an epoch."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=done))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    made = SimpleNamespace(fit_loop=loops, num_training_batches=of, accumulate_grad_batches=accumulated)
    return cast(L.Trainer, made)


def steps(loader: StepLoader) -> list[tuple[int, int, int]]:
    """Place, and tokens and images of the step, of each batch."""
    told = []
    for batch in loader:
        assert batch.step is not None and batch.step.batch == batch.counts()
        told.append((batch.step.place, batch.step.step["token"], batch.step.step["image"]))
    return told


def test_batches_know_the_counts_of_their_whole_step() -> None:
    """Tokens 1 to 5, images 0, 1, 2, 0, 1: a step of three and one of two."""
    loader = StepLoader(Source(5), trainer=trainer_at(0, of=5, accumulated=3))
    assert steps(loader) == [(0, 6, 3), (1, 6, 3), (2, 6, 3), (0, 9, 1), (1, 9, 1)]


@pytest.mark.parametrize("length", [4.0, float("inf")])
def test_an_epoch_ends_where_the_trainer_ends_it(length: float) -> None:
    source = Source(4 if length == float("inf") else 9)
    assert [tokens for _, tokens, _ in steps(StepLoader(source, trainer=trainer_at(0, of=length, accumulated=3)))] == [
        6,
        6,
        6,
        4,
    ]
    assert source.read == 4


def test_an_epoch_goes_on_where_steps_begin() -> None:
    loader = StepLoader(Source(5), trainer=trainer_at(2, of=7, accumulated=2))
    assert [place for place, _, _ in steps(loader)] == [0, 1, 0, 1, 0]
    late = StepLoader(Source(4), trainer=trainer_at(3, of=7, accumulated=2))  # inside a step: what is left of it
    assert steps(late)[:2] == [(0, 1, 0), (0, 5, 3)]


@pytest.mark.parametrize("accumulated", [1, 4])
def test_batches_are_read_a_step_ahead_and_one_at_a_time(accumulated: int) -> None:
    source = Source(20)
    given = 0
    for _ in StepLoader(source, trainer=trainer_at(0, of=20, accumulated=accumulated)):
        given += 1
        assert source.read == min(20, given + accumulated - 1)


def test_all_else_is_the_loaders_own() -> None:
    loader = StepLoader(Source(3), trainer=None)
    assert len(loader) == 3 and loader.state_dict() == {"read": 0}
    assert [batch.step for batch in loader] == [None] * 3
    assert not hasattr(loader, "load_state_dict")

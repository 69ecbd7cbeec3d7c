"""What a training step logs where some batches have nothing to say of a part."""

from __future__ import annotations

import torch

from visexpert.methods.step import LossTerm, StepOutput, parts_over_processes

NAN = float("nan")


def output(**watched: float) -> StepOutput:
    terms = {"text_loss": LossTerm(torch.tensor(2.0), "token"), "kd_loss": LossTerm(torch.tensor(0.0), "image")}
    return StepOutput(terms, 3, {name: torch.tensor(value) for name, value in watched.items()})


def test_a_batch_without_an_image_says_nothing_of_images() -> None:
    """Its distillation loss is 0 for want of images, and entropies of nothing are NaN: neither is a figure."""
    found = parts_over_processes(output(entropy=NAN, variance=NAN), {"token": 5, "image": 0}, together=False)
    assert found == {"text_loss": 2.0}


def test_one_image_has_no_variance_but_an_entropy() -> None:
    found = parts_over_processes(output(entropy=0.5, variance=NAN), {"token": 5, "image": 1}, together=False)
    assert found == {"text_loss": 2.0, "kd_loss": 0.0, "entropy": 0.5}

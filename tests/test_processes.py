"""Sums over processes: values and gradients of one process that has all, whatever each of two has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.two_processes import in_two_processes
from visexpert.losses import gate_balance, rescaled, teacher_weights
from visexpert.processes import one_batch, summed, together
from visexpert.transfer import Standardize
from visexpert.transfer.standardize import PhiS

IMAGES, TOKENS, WIDTH, EXPERTS = 5, 4, 6, 3
PARTS = {"uneven": (2, 3), "one has none": (5, 0), "one has one": (1, 4)}
"""How many of the images each process has."""

Work = Callable[[Tensor], Tensor]


def images() -> Tensor:
    """Tokens far from zero; the first image's are larger than all others."""
    tokens_BTD = torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)) + 3.0
    tokens_BTD[0] *= 3.0
    return tokens_BTD


def gate() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(WIDTH, EXPERTS)


def balance(form: str, *, smooth: bool) -> Callable[[Tensor, nn.Linear], Tensor]:
    def loss(tokens_BTD: Tensor, linear: nn.Linear) -> Tensor:
        logits_BTK = linear(tokens_BTD)
        load_K = logits_BTK.sigmoid().sum((0, 1)) if smooth else None
        all_K = torch.ones(EXPERTS, dtype=torch.bool)
        return gate_balance(logits_BTK.softmax(-1), all_K, form, load_K=load_K)  # type: ignore[arg-type]

    return loss


def dropped(tokens_BTD: Tensor, linear: nn.Linear) -> Tensor:
    """A mean over images, whose weights depend on all of them."""
    weights_BK = linear(tokens_BTD).mean(1).softmax(-1)
    kept_BK = torch.zeros_like(weights_BK).scatter(1, weights_BK.argmax(1, keepdim=True), 1.0)
    return rescaled(weights_BK, kept_BK).square().sum() / max(len(weights_BK), 1)


LOSSES = {
    "cv": balance("cv", smooth=False),
    "cv, smooth load": balance("cv", smooth=True),
    "switch": balance("switch", smooth=False),
    "dropped teachers": dropped,
}


def weights(tokens_BTD: Tensor) -> Tensor:
    """Those of the released rule: a teacher that dominates the first image does not dominate all of them."""
    targets = {"one": tokens_BTD - 3.0, "other": torch.zeros_like(tokens_BTD)}
    return teacher_weights(torch.ones_like(tokens_BTD[:, 0]), targets, convention="released")


def standardized(tokens_BTD: Tensor) -> Tensor:
    standardize = Standardize(WIDTH).train()
    standardize(tokens_BTD)
    out_BTD: Tensor = standardize(tokens_BTD * 2.0)
    return out_BTD


def rotated(tokens_BTD: Tensor) -> Tensor:
    head = PhiS(4).train()
    head(torch.full((1, 1, 4), torch.nan))
    out_BTD: Tensor = head(tokens_BTD[..., :4])
    return out_BTD


OUTPUTS: dict[str, Work] = {"released weights": weights, "channels": standardized, "phi_s": rotated}


def own(rank: int, parts: tuple[int, int]) -> Tensor:
    first = parts[0] * rank
    return images()[first : first + parts[rank]]


def gradient(loss: Tensor, linear: nn.Linear) -> Tensor:
    loss.backward()
    assert linear.weight.grad is not None
    return linear.weight.grad


def work(rank: int) -> dict[str, Tensor]:
    """Losses with their gradients, each weighted by the share of images, and outputs of the images of this process."""
    found: dict[str, Tensor] = {}
    for place, parts in PARTS.items():
        tokens_BTD = own(rank, parts)
        with one_batch(together=True):
            for name, loss in LOSSES.items():
                linear = gate()
                value = loss(tokens_BTD, linear) * len(tokens_BTD) / IMAGES
                found[f"{name}, {place}"] = value.detach()
                found[f"gradient of {name}, {place}"] = gradient(value, linear)
            for name, output in OUTPUTS.items():
                found[f"{name}, {place}"] = output(tokens_BTD)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Tensor]]:
    return in_two_processes(work)


@pytest.mark.parametrize("place", PARTS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_a_whole_batch_is_that_of_one_process(found: list[dict[str, Tensor]], name: str, place: str) -> None:
    linear = gate()
    value = LOSSES[name](images(), linear)
    first, second = found
    torch.testing.assert_close(first[f"{name}, {place}"] + second[f"{name}, {place}"], value.detach())
    of_both = first[f"gradient of {name}, {place}"] + second[f"gradient of {name}, {place}"]
    torch.testing.assert_close(of_both, gradient(value, linear))


@pytest.mark.parametrize("place", PARTS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_statistics_of_a_whole_batch_are_those_of_one_process(
    found: list[dict[str, Tensor]], name: str, place: str
) -> None:
    joined = torch.cat([each[f"{name}, {place}"] for each in found])
    torch.testing.assert_close(joined, OUTPUTS[name](images()), atol=1e-5, rtol=1e-5)


def test_one_process_adds_nothing() -> None:
    values = torch.ones(2)
    with one_batch(together=False):
        assert summed(values) is values and not together()
    with one_batch(together=True):
        assert together()
    assert summed(values) is values

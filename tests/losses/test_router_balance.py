"""The routers' balance loss against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.losses import router_balance
from visexpert.losses.terms import RouterBalanceForm

FORMS: tuple[RouterBalanceForm, ...] = ("pooled", "per_layer")


def one_hot(choice_LBN: Tensor, experts: int = 3) -> Tensor:
    return F.one_hot(choice_LBN, experts).float()


@pytest.mark.parametrize("form", FORMS)
def test_balance_gives_one_over_e_and_collapse_one(form: RouterBalanceForm) -> None:
    even = torch.arange(6).remainder(3).expand(4, 2, 6)
    assert float(router_balance(one_hot(even), even, form)) == pytest.approx(1 / 3)
    uniform_but_one_wins = router_balance(torch.full((4, 2, 6, 3), 1 / 3), torch.zeros_like(even), form)
    assert float(uniform_but_one_wins) == pytest.approx(1 / 3)
    all_on_one = torch.full((4, 2, 6), 2)
    assert float(router_balance(one_hot(all_on_one), all_on_one, form)) == pytest.approx(1.0)


def test_the_value_of_two_layers_by_hand() -> None:
    # One image, two layers, two tokens, two experts. Layer 0 chooses (0, 0), layer 1 chooses (0, 1).
    probs_LBNE = torch.tensor([[[[0.9, 0.1], [0.7, 0.3]]], [[[0.6, 0.4], [0.2, 0.8]]]])
    choice_LBN = probs_LBNE.argmax(-1)
    pooled = 3 / 4 * (0.9 + 0.7 + 0.6 + 0.2) / 4 + 1 / 4 * (0.1 + 0.3 + 0.4 + 0.8) / 4
    assert float(router_balance(probs_LBNE, choice_LBN)) == pytest.approx(pooled)
    first, second = 1.0 * 0.8 + 0.0, 0.5 * 0.4 + 0.5 * 0.6
    assert float(router_balance(probs_LBNE, choice_LBN, "per_layer")) == pytest.approx((first + second) / 2)


def test_only_per_layer_sees_that_each_layer_fell_onto_an_expert_of_its_own() -> None:
    choice_LBN = torch.arange(3).view(3, 1, 1).expand(3, 2, 5)
    assert float(router_balance(one_hot(choice_LBN), choice_LBN, "pooled")) == pytest.approx(1 / 3)
    assert float(router_balance(one_hot(choice_LBN), choice_LBN, "per_layer")) == pytest.approx(1.0)


@pytest.mark.parametrize("form", FORMS)
def test_images_are_balanced_one_by_one(form: RouterBalanceForm) -> None:
    """Each image on one expert of its own: balanced over the batch, collapsed for every image."""
    choice_LBN = torch.arange(3).view(1, 3, 1).expand(2, 3, 5)
    assert float(router_balance(one_hot(choice_LBN), choice_LBN, form)) == pytest.approx(1.0)


@pytest.mark.parametrize("form", FORMS)
def test_samples_without_an_image_take_no_part(form: RouterBalanceForm) -> None:
    logits = torch.randn(2, 3, 5, 4, requires_grad=True)
    probs_LBNE = logits.softmax(-1)
    choice_LBN, mask = probs_LBNE.argmax(-1), torch.tensor([True, False, True])
    loss = router_balance(probs_LBNE, choice_LBN, form, has_image_B=mask)
    torch.testing.assert_close(loss, router_balance(probs_LBNE[:, mask], choice_LBN[:, mask], form))
    loss.backward()
    assert logits.grad is not None and logits.grad[:, mask].abs().max() > 0 and not logits.grad[:, 1].any()
    none = router_balance(logits.softmax(-1), choice_LBN, form, has_image_B=torch.zeros(3, dtype=torch.bool))
    assert float(none.detach()) == 0 and none.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_descending_it_spreads_the_tokens(form: RouterBalanceForm) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(2, 4, 30, 3) + torch.tensor([2.0, 0.0, 0.0])).requires_grad_()
    losses = []
    for _ in range(60):
        probs_LBNE = logits.softmax(-1)
        loss = router_balance(probs_LBNE, probs_LBNE.argmax(-1), form)
        (gradient,) = torch.autograd.grad(loss, logits)
        losses.append(float(loss.detach()))
        logits = (logits - 20 * gradient).detach().requires_grad_()
    assert losses[0] > 0.6 and losses[-1] < 0.4


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="form='global' is unknown; use .*pooled.*per_layer"):
        router_balance(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, dtype=torch.int64), "global")  # type: ignore[arg-type]

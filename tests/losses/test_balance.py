"""The gate's balance loss against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.losses import gate_balance
from visexpert.losses.terms import GateBalanceForm
from visexpert.transfer import GateSettings, TokenGate

ALL_4 = torch.ones(4, dtype=torch.bool)


def balanced() -> Tensor:
    """Two images of two tokens; each of the four tokens prefers another expert by as much."""
    return torch.full((4, 4), 0.1).fill_diagonal_(0.7).view(2, 2, 4)


def collapsed() -> Tensor:
    """Every token gives all its weight to expert 2."""
    return torch.nn.functional.one_hot(torch.full((2, 2), 2), 4).float()


# Collapsed onto one of K: the sums are (N, 0, ..., 0), variance N^2 (K - 1) / K^2, mean N / K, hence CV^2 = K - 1,
# once for importance and once for load; switch is K * 1 * 1.
@pytest.mark.parametrize(
    ("gates_BTK", "form", "expected"),
    [(balanced(), "cv", 0.0), (balanced(), "switch", 1.0), (collapsed(), "cv", 6.0), (collapsed(), "switch", 4.0)],
)
def test_balanced_and_collapsed(gates_BTK: Tensor, form: GateBalanceForm, expected: float) -> None:
    assert gate_balance(gates_BTK, ALL_4, form).item() == pytest.approx(expected, abs=1e-6)


def test_a_case_in_between() -> None:
    gates_BTK = torch.tensor([[[0.8, 0.2], [0.6, 0.4]]])
    both = torch.ones(2, dtype=torch.bool)
    # Importance (1.4, 0.6): mean 1, variance 0.16. Load (2, 0): mean 1, variance 1.
    assert gate_balance(gates_BTK, both, "cv").item() == pytest.approx(0.16 + 1.0)
    # f = (1, 0), P = (0.7, 0.3).
    assert gate_balance(gates_BTK, both, "switch").item() == pytest.approx(2 * 0.7)
    # A given load of (3, 1) has mean 2 and variance 1, in place of the counted one.
    assert gate_balance(gates_BTK, both, "cv", load_K=torch.tensor([3.0, 1.0])).item() == pytest.approx(0.16 + 0.25)


@pytest.mark.parametrize("form", ["cv", "switch"])
def test_detached_experts_take_no_part(form: GateBalanceForm) -> None:
    gates_BT2 = torch.tensor([[[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]])
    load_2 = torch.tensor([1.5, 1.2])
    attached_K = torch.tensor([False, True, False, True])
    gates_BTK = torch.full((1, 3, 4), 9.0)
    gates_BTK[..., attached_K] = gates_BT2
    load_K = torch.full((4,), 9.0)
    load_K[attached_K] = load_2
    both = torch.ones(2, dtype=torch.bool)
    assert torch.equal(gate_balance(gates_BTK, attached_K, form), gate_balance(gates_BT2, both, form))
    assert torch.equal(
        gate_balance(gates_BTK, attached_K, form, load_K=load_K), gate_balance(gates_BT2, both, form, load_K=load_2)
    )


def test_one_or_no_expert_is_balanced() -> None:
    gates_BTK = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    only = torch.tensor([False, True])
    assert gate_balance(gates_BTK, only, "cv").item() == 0.0
    assert gate_balance(gates_BTK, only, "switch").item() == 1.0
    assert gate_balance(gates_BTK, torch.zeros(2, dtype=torch.bool)).item() == 0.0


def test_descent_from_a_skewed_gate_evens_it_out() -> None:
    logits_K = torch.tensor([2.0, 0.0, 0.0], requires_grad=True)
    loss = gate_balance(logits_K.softmax(-1).expand(1, 5, 3), torch.ones(3, dtype=torch.bool), "cv")
    (gradient_K,) = torch.autograd.grad(loss, logits_K)
    assert gradient_K[0] > 0 > gradient_K[1]
    assert gradient_K[1].item() == pytest.approx(gradient_K[2].item())


def test_gradient_flows_through_the_smooth_load() -> None:
    """With balanced importance only the load can push: expert 0 wins more tokens though its gates sum to the same."""
    gates_BTK = torch.full((1, 6, 2), 0.5)
    clean_K = torch.zeros(2, requires_grad=True)
    load_K = torch.stack(
        [torch.special.ndtr(clean_K[0] - clean_K[1] + 0.5), torch.special.ndtr(clean_K[1] - clean_K[0])]
    )
    gate_balance(gates_BTK, torch.ones(2, dtype=torch.bool), "cv", load_K=6 * load_K).backward()
    assert clean_K.grad is not None and clean_K.grad[0] > 0 > clean_K.grad[1]


def test_gradient_of_the_whole_loss_reaches_the_noise_width() -> None:
    """The learned width of the noise has a gradient, and a finite one, though one expert is detached."""
    gate = TokenGate(dim=8, num_experts=3, settings=GateSettings(noise="learned")).train()
    attached_K = torch.tensor([True, False, True])
    output = gate(torch.randn(2, 5, 8), attached_K.tolist())
    assert output.load_BK is not None
    gate_balance(output.gates_BTK, attached_K, load_K=output.load_BK.sum(0)).backward()
    assert gate.noise_width is not None and gate.noise_width.weight.grad is not None
    widths_KD = gate.noise_width.weight.grad
    assert widths_KD.isfinite().all() and widths_KD[0].abs().sum() > 0 and widths_KD[2].abs().sum() > 0


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="'entropy' is unknown; use .*cv.*switch"):
        gate_balance(balanced(), ALL_4, "entropy")  # type: ignore[arg-type]


def test_the_scale_of_the_batch_does_not_matter() -> None:
    gates_BTK = torch.randn(2, 3, 4).softmax(-1)
    once, twice = gate_balance(gates_BTK, ALL_4), gate_balance(torch.cat([gates_BTK, gates_BTK]), ALL_4)
    assert math.isclose(once.item(), twice.item(), rel_tol=1e-5)


def test_experts_that_win_together_count_together() -> None:
    """The two largest gates of each token: expert 0 wins 3 tokens, 1 wins 2, 2 wins 1 of 3."""
    gates_BTK = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.25, 0.35]]])
    all_3 = torch.ones(3, dtype=torch.bool)
    # Importance (1.5, .85, .65): mean 1, variance .1316667. Load (3, 2, 1): mean 2, variance 2 / 3.
    assert gate_balance(gates_BTK, all_3, "cv", top_k=2).item() == pytest.approx(0.1316667 + 1 / 6)
    # f = (3, 2, 1) / 6, P = (1.5, .85, .65) / 3.
    assert gate_balance(gates_BTK, all_3, "switch", top_k=2).item() == pytest.approx(3 * (4.5 + 1.7 + 0.65) / 18)
    assert gate_balance(gates_BTK, all_3, "cv", top_k=3).item() == pytest.approx(0.1316667)


@pytest.mark.parametrize("form", ["cv", "switch"])
def test_half_precision_counts_as_float32_does(form: GateBalanceForm) -> None:
    """bfloat16 has no 257: counts and sums over many tokens need float32."""
    gates_BTK = torch.tensor([0.25, 0.75], dtype=torch.bfloat16).repeat(1, 999, 1)
    gates_BTK[:, :499] = gates_BTK[:, :499].flip(-1)
    both = torch.ones(2, dtype=torch.bool)
    found = gate_balance(gates_BTK, both, form, load_K=None)
    assert found.dtype == torch.float32
    assert torch.equal(found, gate_balance(gates_BTK.float(), both, form))
    load_K = torch.tensor([499.0, 500.0], dtype=torch.bfloat16)
    assert gate_balance(gates_BTK, both, "cv", load_K=load_K).dtype == torch.float32

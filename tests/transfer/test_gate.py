"""The token-aware gate: a softmax over what is attached, and Shazeer's load against a simulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.transfer import GateSettings, TokenGate, smooth_load
from visexpert.transfer.gate import NoiseKind

ATTACHED = torch.tensor([True, False, True, True])
ALL = torch.ones(4, dtype=torch.bool)


def clip_tokens(num_tokens: int = 6) -> Tensor:
    return torch.randn(2, num_tokens, 8)


def gate_with_wide_logits(**options: object) -> TokenGate:
    gate = TokenGate(dim=8, num_experts=4, settings=GateSettings(**options))  # type: ignore[arg-type]
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("noise", ["none", "fixed", "learned"])
@pytest.mark.parametrize("training", [False, True])
def test_rows_sum_to_one_over_what_is_attached(hidden: int | None, noise: NoiseKind, training: bool) -> None:
    gate = gate_with_wide_logits(hidden=hidden, noise=noise).train(training)
    gates_BTK = gate(clip_tokens(), ATTACHED.tolist()).gates_BTK
    assert gates_BTK.shape == (2, 6, 4)
    assert torch.count_nonzero(gates_BTK[..., 1]) == 0
    assert (gates_BTK[..., ATTACHED] > 0).all()
    torch.testing.assert_close(gates_BTK.sum(-1), torch.ones(2, 6))


def test_detaching_renormalizes_the_rest() -> None:
    gate = gate_with_wide_logits().eval()
    tokens_BTD = clip_tokens()
    everything = gate(tokens_BTD, ALL.tolist()).gates_BTK
    without = gate(tokens_BTD, ATTACHED.tolist()).gates_BTK
    kept = everything * ATTACHED
    torch.testing.assert_close(without, kept / kept.sum(-1, keepdim=True))


def test_each_token_has_its_own_gate() -> None:
    gate = gate_with_wide_logits().eval()
    tokens_BTD = clip_tokens()
    gates_BTK = gate(tokens_BTD, ALL.tolist()).gates_BTK
    shuffled = gate(tokens_BTD.flip(1), ALL.tolist()).gates_BTK
    torch.testing.assert_close(shuffled, gates_BTK.flip(1))
    assert gates_BTK.std(dim=1).max() > 0.05


def test_top_k_keeps_the_largest_and_renormalizes() -> None:
    gate = gate_with_wide_logits(top_k=2).eval()
    tokens_BTD = clip_tokens()
    gates_BTK = gate(tokens_BTD, ATTACHED.tolist()).gates_BTK
    gate.top_k = None
    soft_BTK = gate(tokens_BTD, ATTACHED.tolist()).gates_BTK
    for row, soft in zip(gates_BTK.flatten(0, 1), soft_BTK.flatten(0, 1), strict=True):
        best = soft.argsort(descending=True)[:2]
        expected = torch.zeros(4)
        expected[best] = soft[best] / soft[best].sum()
        torch.testing.assert_close(row, expected)


def test_top_1_is_one_hot_and_top_k_beyond_what_is_attached_keeps_all() -> None:
    tokens_BTD = clip_tokens()
    one_hot = gate_with_wide_logits(top_k=1).eval()(tokens_BTD, ATTACHED).gates_BTK
    assert sorted(one_hot.unique().tolist()) == [0.0, 1.0]
    gate = gate_with_wide_logits(top_k=3).eval()
    two = torch.tensor([True, False, True, False])
    wide = gate(tokens_BTD, two.tolist()).gates_BTK
    gate.top_k = None
    torch.testing.assert_close(wide, gate(tokens_BTD, two.tolist()).gates_BTK)


def test_uniform_is_the_average_of_what_is_attached() -> None:
    gate = TokenGate(dim=8, num_experts=4, settings=GateSettings(kind="uniform")).train()
    output = gate(clip_tokens(), ATTACHED.tolist())
    torch.testing.assert_close(output.gates_BTK, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]).expand(2, 6, 4))
    assert output.load_BK is None
    assert not list(gate.parameters())


@pytest.mark.parametrize("noise", ["fixed", "learned"])
def test_noise_in_training_only(noise: NoiseKind) -> None:
    gate = gate_with_wide_logits(noise=noise)
    tokens_BTD = clip_tokens()
    gate.eval()
    first, second = gate(tokens_BTD, ALL.tolist()), gate(tokens_BTD, ALL.tolist())
    assert torch.equal(first.gates_BTK, second.gates_BTK)
    assert first.load_BK is None
    gate.train()
    first, second = gate(tokens_BTD, ALL.tolist()), gate(tokens_BTD, ALL.tolist())
    assert not torch.equal(first.gates_BTK, second.gates_BTK)
    assert first.load_BK is not None


def test_fixed_noise_has_the_width_that_was_asked_for() -> None:
    """log(g_j / g_k) is the difference of two noisy logits; its variance is twice that of the noise."""
    gate = TokenGate(dim=8, num_experts=2, settings=GateSettings(noise="fixed", noise_std=0.7)).train()
    gates_BTK = gate(torch.zeros(1, 20_000, 8), [True] * 2).gates_BTK
    spread = (gates_BTK[..., 0].log() - gates_BTK[..., 1].log()).std().item()
    assert spread == pytest.approx(0.7 * 2**0.5, rel=0.03)


@pytest.mark.parametrize("top_k", [1, 2])
def test_smooth_load_equals_a_simulation(top_k: int) -> None:
    """P(x, i) is the share of fresh draws of i's own noise that leave it among the k largest noisy logits."""
    clean_BTK = torch.randn(2, 3, 4).masked_fill(~ATTACHED, -torch.inf)
    std_BTK = torch.rand(2, 3, 4) + 0.5
    noisy_BTK = clean_BTK + torch.randn(2, 3, 4) * std_BTK
    wins_BK = torch.zeros(2, 4)
    for expert in range(4):
        redrawn = noisy_BTK.expand(40_000, -1, -1, -1).clone()
        redrawn[..., expert] = clean_BTK[..., expert] + torch.randn(40_000, 2, 3) * std_BTK[..., expert]
        chosen = redrawn.topk(top_k, dim=-1).indices == expert
        wins_BK[:, expert] = chosen.any(-1).float().mean(0).sum(-1)
    load_BK = smooth_load(clean_BTK, noisy_BTK, std_BTK, ATTACHED, top_k=top_k)
    assert not load_BK[:, 1].any()
    torch.testing.assert_close(load_BK, wins_BK, atol=0.02, rtol=0)  # three standard errors of 40,000 draws, thrice


@pytest.mark.parametrize("top_k", [2, 3])
def test_where_all_win_the_load_is_the_number_of_tokens(top_k: int) -> None:
    two = torch.tensor([True, False, True, False])
    output = gate_with_wide_logits(noise="fixed", top_k=top_k).train()(clip_tokens(), two)
    assert output.load_BK is not None and output.load_BK.tolist() == [[6.0, 0.0, 6.0, 0.0]] * 2


def test_a_gate_estimates_the_load_of_as_many_experts_as_it_keeps() -> None:
    """Over all noise the chances of winning add up to k per token."""
    tokens_BTD = torch.randn(1, 1, 8).expand(1, 20_000, 8)
    for top_k in (None, 1, 2):
        output = gate_with_wide_logits(noise="fixed", noise_std=2.0, top_k=top_k).train()(tokens_BTD, ATTACHED)
        assert output.load_BK is not None
        assert output.load_BK.sum().item() == pytest.approx((top_k or 1) * 20_000, rel=0.02)


def test_the_load_is_float32_whatever_the_gate_is() -> None:
    gate = gate_with_wide_logits(noise="fixed", noise_std=2.0).to(torch.bfloat16).train()
    load_BK = gate(torch.randn(2, 999, 8, dtype=torch.bfloat16), ATTACHED.tolist()).load_BK
    assert load_BK.dtype == torch.float32
    assert load_BK.sum().item() == pytest.approx(2 * 999, rel=0.1)


def test_smooth_loads_sum_to_the_number_of_tokens_on_average() -> None:
    """Over all noise the chances of winning add up to one per token."""
    clean_BTK = torch.randn(1, 1, 4).masked_fill(~ATTACHED, -torch.inf).expand(1, 40_000, 4)
    std_BTK = torch.full_like(clean_BTK, 0.8)
    noisy_BTK = clean_BTK + torch.randn(1, 40_000, 4) * std_BTK
    load_BK = smooth_load(clean_BTK, noisy_BTK, std_BTK, ATTACHED)
    assert load_BK.sum().item() == pytest.approx(40_000, rel=0.01)


def test_smooth_load_counts_the_winners_when_noise_vanishes() -> None:
    clean_BTK = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 1.0], [0.0, 0.5, 2.0]]])
    std_BTK = torch.full_like(clean_BTK, 1e-4)
    load_BK = smooth_load(clean_BTK, clean_BTK, std_BTK, torch.ones(3, dtype=torch.bool))
    assert load_BK.tolist() == [[1.0, 0.0, 2.0]]


def test_the_only_expert_wins_every_token() -> None:
    only = torch.tensor([False, False, True, False])
    output = gate_with_wide_logits(noise="fixed").train()(clip_tokens(), only)
    assert output.load_BK is not None and output.load_BK.tolist() == [[0.0, 0.0, 6.0, 0.0]] * 2
    assert torch.equal(output.gates_BTK, only.float().expand(2, 6, 4))


def test_no_expert_is_refused() -> None:
    with pytest.raises(ConfigError, match="no expert is attached"):
        TokenGate(dim=8, num_experts=4)(clip_tokens(), torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hard"}, "kind='hard' is unknown; use one of token, uniform"),
        ({"noise": "pink"}, "noise='pink' is unknown"),
        ({"noise": "fixed", "noise_std": 0.0}, "noise_std=0 must be above 0.*noise to none"),
        ({"top_k": 0}, "top_k is 0, .*at least 1"),
        ({"top_k": 5}, r"top_k=5 is outside 1..4"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenGate(dim=8, num_experts=4, settings=GateSettings(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"hidden": 5}, {"kind": "uniform"}, {"noise": "learned"}, {"top_k": 3}])
def test_keeping_columns_equals_detaching_the_others(options: dict[str, object]) -> None:
    tokens_BTD = clip_tokens()
    gate = gate_with_wide_logits(**options).eval()
    whole = gate(tokens_BTD, ATTACHED.tolist()).gates_BTK[..., ATTACHED]
    parameters = sum(p.numel() for p in gate.parameters())
    gate.keep([0, 2, 3])
    assert torch.allclose(gate(tokens_BTD, [True] * 3).gates_BTK, whole, atol=1e-6)
    assert sum(p.numel() for p in gate.parameters()) < parameters or options.get("kind") == "uniform"
    gate.keep([1])
    assert gate.num_experts == 1 and gate.top_k in (None, 1)


@pytest.mark.parametrize("columns", [[], [4], [-1]])
def test_columns_that_are_not_there_cannot_be_kept(columns: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"give columns within 0\.\.3"):
        gate_with_wide_logits().keep(columns)

"""Relations, summaries, dropping and balancing of teachers, against values by hand and plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.losses import (
    feature_errors,
    feature_kd,
    kept_teachers,
    loss_shares,
    relation_errors,
    rescaled,
    summary_errors,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def by_loop(ours_TX: Tensor, theirs_TX: Tensor, form: str) -> float:
    pairs = [(i, j) for i in range(len(ours_TX)) for j in range(i + 1, len(ours_TX))]
    gaps = [(cosine(ours_TX[i], ours_TX[j]), cosine(theirs_TX[i], theirs_TX[j])) for i, j in pairs]
    if form == "symmetric":
        return statistics.fmean((s - t) ** 2 for s, t in gaps)
    median = statistics.median_low(t for _, t in gaps)
    return statistics.fmean(max(0.0, t - s if t > median else s - t) ** 2 for s, t in gaps)


@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
def test_relations_equal_a_loop_over_pairs(form: str) -> None:
    ours, theirs = noise(3, 6, 5), noise(3, 6, 8, seed=1)  # widths need not match
    expected = [by_loop(one, two, form) for one, two in zip(ours, theirs, strict=True)]
    found = relation_errors(ours, theirs, form)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_relations_by_hand() -> None:
    """Teacher: tokens 0 and 1 equal, 2 orthogonal. Student: all equal: pairs (0, 2) and (1, 2) are off by 1."""
    theirs = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]])
    ours = torch.ones(1, 3, 4)
    assert float(relation_errors(ours, theirs)) == pytest.approx(2 / 3)
    assert float(relation_errors(theirs * 5, theirs)) == pytest.approx(0.0, abs=1e-6)


def test_asymmetric_relations_let_a_clearer_student_pass() -> None:
    theirs = torch.tensor([[[1.0, 0.0], [1.0, 0.2], [0.3, 1.0]]])
    clearer = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])  # nearer where near, farther where far
    blurred = torch.ones(1, 3, 2)
    assert float(relation_errors(clearer, theirs, "asymmetric")) == pytest.approx(0.0, abs=1e-9)
    assert float(relation_errors(clearer, theirs)) > 0.1
    assert float(relation_errors(blurred, theirs, "asymmetric")) > 0.1


def test_relations_pull_on_the_student_alone() -> None:
    ours, theirs = noise(2, 4, 3).requires_grad_(), noise(2, 4, 3, seed=1).requires_grad_()
    relation_errors(ours, theirs).sum().backward()
    assert theirs.grad is None
    assert ours.grad is not None and float(ours.grad.abs().sum()) > 0


def test_relations_of_a_single_token_are_0_and_unknown_forms_are_refused() -> None:
    assert relation_errors(noise(2, 1, 3), noise(2, 1, 3)).tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match="'one-sided'.*symmetric.*asymmetric"):
        relation_errors(noise(1, 2, 3), noise(1, 2, 3), "one-sided")  # type: ignore[arg-type]


def test_summary_errors_are_one_minus_the_cosine() -> None:
    ours, theirs = (
        torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]),
        torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]),
    )
    torch.testing.assert_close(summary_errors(ours, theirs), torch.tensor([0.0, 1 - 2**-0.5, 2.0]))


def test_errors_by_teacher_sum_to_the_loss() -> None:
    student, targets = noise(4, 3, 5), {"a": noise(4, 3, 5, seed=1), "b": noise(4, 3, 5, seed=2)}
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(3))
    by_hand = torch.stack([((student - target) ** 2).mean((1, 2)) for target in targets.values()], dim=1)
    torch.testing.assert_close(feature_errors(student, targets), by_hand)
    torch.testing.assert_close(feature_kd(student, targets, weights), (by_hand * weights).sum(1).mean())


def test_the_worst_teacher_of_each_image_always_stays() -> None:
    losses = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.1, 0.2]])
    assert kept_teachers(losses, 1.0).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert kept_teachers(losses, 0.0).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_the_others_are_dropped_at_the_rate() -> None:
    losses = torch.tensor([[1.0, 3.0, 2.0]]).expand(20_000, 3)
    kept = kept_teachers(losses, 0.3, generator=torch.Generator().manual_seed(0)).mean(0)
    torch.testing.assert_close(kept, torch.tensor([0.7, 1.0, 0.7]), atol=0.015, rtol=0)


def test_dropping_with_even_weights_is_unics_mean_over_what_stays() -> None:
    losses = noise(6, 3).square()
    kept = kept_teachers(losses, 0.5, generator=torch.Generator().manual_seed(1))
    assert 6 <= float(kept.sum()) < 18
    unic = (kept * losses).sum() / kept.sum()  # coefficients over their sum over the batch
    ours = (rescaled(torch.full((6, 3), 1 / 3), kept) * losses).sum(1).mean()
    torch.testing.assert_close(ours, unic)


def test_shares_make_weighted_losses_equal_and_keep_their_sum() -> None:
    means, weights = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([0.2, 0.4, 0.4])
    shares = loss_shares(means, weights)
    balanced = shares * means
    torch.testing.assert_close(balanced, balanced[:1].expand(3))
    torch.testing.assert_close((weights * balanced).sum(), torch.tensor(0.2 * 4 + 0.4 + 0.1))
    torch.testing.assert_close(loss_shares(torch.full((3,), 0.7), weights), torch.ones(3))

"""Ridge probes against closed forms."""

from __future__ import annotations

import pytest
import torch

from visexpert.metrics import fit_ridge, ridge_accuracy, ridge_r2


def _data(count: int = 400, width: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features_NE = torch.randn(count, width, generator=generator, dtype=torch.float64) * 3 + 5
    fit_N = torch.arange(count) < count // 2
    return features_NE, fit_N, ~fit_N


def test_linear_targets_are_read_perfectly() -> None:
    features_NE, fit_N, evaluate_N = _data()
    targets_NM = features_NE @ torch.randn(6, 2, dtype=torch.float64) + 7
    assert ridge_r2(features_NE, targets_NM, fit_N=fit_N, evaluate_N=evaluate_N) == pytest.approx(1, abs=1e-6)
    # float16 tokens are lifted to float64 before anything is summed
    assert ridge_r2(features_NE.half(), targets_NM, fit_N=fit_N, evaluate_N=evaluate_N) == pytest.approx(1, abs=1e-4)


def test_unrelated_targets_are_not_read() -> None:
    features_NE, fit_N, evaluate_N = _data(2000)
    noise_N = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    assert abs(ridge_r2(features_NE, noise_N, fit_N=fit_N, evaluate_N=evaluate_N)) < 0.03


def test_known_share_of_variance() -> None:
    """Target = feature + noise of a third of its variance: R2 = 3/4."""
    features_NE, fit_N, evaluate_N = _data(20000, 3)
    signal_N = (features_NE[:, 0] - 5) / 3
    target_N = signal_N + torch.randn(20000, generator=torch.Generator().manual_seed(2)) / 3**0.5
    assert ridge_r2(features_NE, target_N, fit_N=fit_N, evaluate_N=evaluate_N) == pytest.approx(0.75, abs=0.02)


def test_labels() -> None:
    features_NE, fit_N, evaluate_N = _data()
    labels_N = (features_NE[:, 0] > 5).long() + 2 * (features_NE[:, 1] > 5).long()
    accuracy = ridge_accuracy(features_NE, labels_N, fit_N=fit_N, evaluate_N=evaluate_N)
    assert 0.85 < accuracy <= 1
    separable_NE = torch.nn.functional.one_hot(labels_N, 4).double()
    assert ridge_accuracy(separable_NE, labels_N, fit_N=fit_N.nonzero()[:, 0], evaluate_N=evaluate_N) == 1


def test_solution_equals_normal_equations() -> None:
    features_NE, *_ = _data(80, 5)
    targets_NM = torch.randn(80, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe = fit_ridge(features_NE, targets_NM, penalties=[0.1])
    x_NE = (features_NE - features_NE.mean(0)) / features_NE.std(0, correction=0)
    y_NM = targets_NM - targets_NM.mean(0)
    weight_EM = torch.linalg.solve(x_NE.T @ x_NE / 80 + 0.1 * torch.eye(5, dtype=torch.float64), x_NE.T @ y_NM / 80)
    torch.testing.assert_close(probe.weight_EM, weight_EM)
    torch.testing.assert_close(probe.predict(features_NE), x_NE @ weight_EM + targets_NM.mean(0))


def test_penalty_is_chosen_on_the_fit_rows_alone() -> None:
    features_NE, fit_N, evaluate_N = _data(60, 40)
    targets_N = features_NE[:, 0] + 5 * torch.randn(60, generator=torch.Generator().manual_seed(4))
    # Few rows, many features, much noise: a large penalty wins. Without noise a small one does.
    assert fit_ridge(features_NE[fit_N], targets_N[fit_N, None]).penalty >= 0.1
    assert fit_ridge(features_NE, features_NE[:, :1]).penalty == 1e-6
    # What the evaluation rows hold cannot change the fit.
    changed_NE = features_NE.clone()
    changed_NE[evaluate_N] = 99.0
    torch.testing.assert_close(
        fit_ridge(features_NE[fit_N], targets_N[fit_N, None]).weight_EM,
        fit_ridge(changed_NE[fit_N], targets_N[fit_N, None]).weight_EM,
    )


def test_scale_and_constant_features_do_not_matter() -> None:
    features_NE, fit_N, evaluate_N = _data()
    target_N = features_NE[:, 0] ** 2
    plain = ridge_r2(features_NE, target_N, fit_N=fit_N, evaluate_N=evaluate_N)
    scaled_NE = torch.cat([features_NE * torch.tensor([1e-4, 1, 10, 1e5, 1, 1]), torch.full((400, 1), 0.1)], 1)
    assert ridge_r2(scaled_NE, target_N, fit_N=fit_N, evaluate_N=evaluate_N) == pytest.approx(plain, abs=1e-6)


def test_splits_must_be_apart_and_large_enough() -> None:
    features_NE, fit_N, evaluate_N = _data()
    target_N = features_NE[:, 0]
    with pytest.raises(ValueError, match="overlap"):
        ridge_r2(features_NE, target_N, fit_N=fit_N, evaluate_N=torch.tensor([0, 399]))
    with pytest.raises(ValueError, match="too few"):
        ridge_r2(features_NE, target_N, fit_N=torch.tensor([0, 1]), evaluate_N=evaluate_N)
    with pytest.raises(ValueError, match="at least one evaluation row"):
        ridge_r2(features_NE, target_N, fit_N=fit_N, evaluate_N=torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="constant on the evaluation rows"):
        ridge_r2(features_NE, torch.ones(400), fit_N=fit_N, evaluate_N=evaluate_N)
    with pytest.raises(ValueError, match="above 0"):
        fit_ridge(features_NE, target_N[:, None], penalties=[0.0])

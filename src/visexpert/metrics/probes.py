"""Linear (ridge) probes: how much of a property a linear map can read off tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-6, 4))
"""Penalties tried by default, as a share of the variance of a standardized feature."""


@dataclass(frozen=True)
class RidgeProbe:
    """A fitted linear map from E features to M values (float64).

    Args:
        mean_E: Mean of the features on the fit rows.
        scale_E: Their standard deviation there (1 where a feature is constant).
        weight_EM: Map from standardized features.
        bias_M: Mean of the targets on the fit rows.
        penalty: Penalty that scored best on the validation rows.
    """

    mean_E: Tensor
    scale_E: Tensor
    weight_EM: Tensor
    bias_M: Tensor
    penalty: float

    def predict(self, features_NE: Tensor) -> Tensor:
        """Map (N, E) features to (N, M) values, float64."""
        return (features_NE.double() - self.mean_E) / self.scale_E @ self.weight_EM + self.bias_M


def ridge_r2(
    features_NE: Tensor,
    targets_NM: Tensor,
    *,
    fit_N: Tensor,
    evaluate_N: Tensor,
    penalties: Sequence[float] = PENALTIES,
    validation_share: float = 0.2,
) -> float:
    """Return the share of the targets' variance that a ridge probe explains on held-out rows (mean R2 over columns).

    1 is perfect, 0 no better than the evaluation rows' own mean, negative worse.

    Args:
        features_NE: Tokens, one per row.
        targets_NM: Values to read off, shape (N, M) or (N,).
        fit_N: Rows to fit on: bool mask or int64 indices, ordered so that rows of one image are adjacent.
        evaluate_N: Rows to score, from other images.
        penalties: See :func:`fit_ridge`.
        validation_share: See :func:`fit_ridge`.

    Raises:
        ValueError: The splits overlap or are too small, or a target is constant on the evaluation rows.
    """
    fit_N, evaluate_N = _split(len(features_NE), fit_N, evaluate_N)
    targets_NM = targets_NM.double().reshape(len(features_NE), -1)
    probe = fit_ridge(features_NE[fit_N], targets_NM[fit_N], penalties=penalties, validation_share=validation_share)
    truth_NM = targets_NM[evaluate_N]
    total_M = (truth_NM - truth_NM.mean(0)).square().sum(0)
    if bool((total_M == 0).any()):
        raise ValueError("a target is constant on the evaluation rows, so R2 is undefined")
    error_M = (truth_NM - probe.predict(features_NE[evaluate_N])).square().sum(0)
    return float((1 - error_M / total_M).mean())


def ridge_accuracy(
    features_NE: Tensor,
    labels_N: Tensor,
    *,
    fit_N: Tensor,
    evaluate_N: Tensor,
    penalties: Sequence[float] = PENALTIES,
    validation_share: float = 0.2,
) -> float:
    """Return the held-out accuracy of a ridge probe fitted to one-hot labels (least-squares classifier, argmax).

    Args:
        features_NE: Tokens, one per row.
        labels_N: int64 class of each row, starting at 0.
        fit_N: Rows to fit on: bool mask or int64 indices, ordered so that rows of one image are adjacent.
        evaluate_N: Rows to score, from other images.
        penalties: See :func:`fit_ridge`.
        validation_share: See :func:`fit_ridge`.

    Raises:
        ValueError: The splits overlap or are too small.
    """
    fit_N, evaluate_N = _split(len(features_NE), fit_N, evaluate_N)
    one_hot_NM = torch.nn.functional.one_hot(labels_N).double()
    probe = fit_ridge(features_NE[fit_N], one_hot_NM[fit_N], penalties=penalties, validation_share=validation_share)
    guess_N = probe.predict(features_NE[evaluate_N]).argmax(1)
    return float((guess_N == labels_N[evaluate_N]).double().mean())


def fit_ridge(
    features_NE: Tensor,
    targets_NM: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    validation_share: float = 0.2,
) -> RidgeProbe:
    """Fit a ridge probe in closed form (float64), with the penalty that scores best on a validation part of the rows.

    Minimizes ``|Y - X W|^2 / N + penalty |W|^2`` for standardized X and centered Y, so that a penalty means the same
    for every N. The last ``validation_share`` of the rows choose the penalty (consecutive rows keep the tokens of one
    image together; a random part would share images with the rest); then the probe is fitted on all rows.

    Args:
        features_NE: Tokens.
        targets_NM: Values, shape (N, M).
        penalties: Penalties to try, each > 0; the first of equally good ones wins.
        validation_share: Share of the rows that choose the penalty, in (0, 1).

    Raises:
        ValueError: Fewer than two rows are left for fitting or one for validation, or a penalty is not above 0.
    """
    held_out = int(len(features_NE) * validation_share)
    first = len(features_NE) - held_out
    if held_out < 1 or first < 2:
        raise ValueError(f"{len(features_NE)} rows with validation_share {validation_share} are too few for a probe")
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"each ridge penalty must be above 0, got {tuple(penalties)}")
    candidates = _solve(features_NE[:first], targets_NM[:first], penalties)
    errors = [
        float((probe.predict(features_NE[first:]) - targets_NM[first:].double()).square().mean())
        for probe in candidates
    ]
    best = candidates[errors.index(min(errors))].penalty
    return _solve(features_NE, targets_NM, [best])[0]


def _solve(features_NE: Tensor, targets_NM: Tensor, penalties: Sequence[float]) -> list[RidgeProbe]:
    """Solve the normal equations for every penalty with one eigendecomposition of the feature covariance."""
    x_NE, y_NM = features_NE.double(), targets_NM.double()
    mean_E, bias_M = x_NE.mean(0), y_NM.mean(0)
    scale_E = x_NE.std(0, correction=0)
    # The deviation of a constant feature is rounding error; dividing by it would amplify noise.
    constant_E = scale_E <= 1e-12 * (1 + mean_E.abs())
    scale_E = torch.where(constant_E, torch.ones_like(scale_E), scale_E)
    x_NE = (x_NE - mean_E) / scale_E
    values_E, vectors_EE = torch.linalg.eigh(x_NE.T @ x_NE / len(x_NE))
    projected_EM = vectors_EE.T @ (x_NE.T @ (y_NM - bias_M)) / len(x_NE)
    return [
        RidgeProbe(
            mean_E=mean_E,
            scale_E=scale_E,
            weight_EM=vectors_EE @ (projected_EM / (values_E.clamp(min=0) + penalty)[:, None]),
            bias_M=bias_M,
            penalty=penalty,
        )
        for penalty in penalties
    ]


def _split(count: int, fit_N: Tensor, evaluate_N: Tensor) -> tuple[Tensor, Tensor]:
    """Turn masks into indices and reject rows that are in both splits."""
    every_N = torch.arange(count, device=fit_N.device)
    fit_N, evaluate_N = every_N[fit_N], every_N[evaluate_N]
    if bool(torch.isin(evaluate_N, fit_N).any()):
        raise ValueError("the fit and evaluation rows of a probe overlap")
    if len(evaluate_N) == 0:
        raise ValueError("a probe needs at least one evaluation row")
    return fit_N, evaluate_N

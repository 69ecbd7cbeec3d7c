"""What tokens hold, measured by linear (ridge) probes, and how far they are from those of another encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from visexpert.metrics.records import Key, first_of_all, gather_anywhere, key_of
from visexpert.typed import typed

PENALTIES = tuple(10.0**power for power in range(-6, 4))
"""Penalties tried by default, as a share of the variance of a standardized feature."""
OBJECT_SHARE = 0.5
"""Least share of a token's pixels that objects must cover for it to count as an object token."""
FEWEST_TOKENS = 20
"""Least number of tokens to fit and to score a probe on; with fewer its score is meaningless and left out."""
CLASS_TARGETS = ("colour", "shape", "size", "material")


class TokenProbes:
    """Ridge probes on tokens of one split: fitted on the first half of its images, scored on the second.

    Scores, R2 or accuracy in [0, 1]: ``depth`` and ``normals`` over all tokens, ``object_depth``, ``colour``,
    ``shape``, ``size``, ``material`` over tokens that lie on an object.

    Images of all processes count, in row order, so the scores equal those of a single process.

    Args:
        max_images: Most images to keep; later ones are ignored.
    """

    def __init__(self, *, max_images: int = 600) -> None:
        self.max_images = max_images
        self._seen: dict[Key, tuple[Tensor, dict[str, Tensor]]] = {}

    def update(
        self,
        tokens_BTD: Tensor,
        grid_hw: tuple[int, int],
        targets: Mapping[str, Tensor],
        *,
        split: str = "",
        rows: Sequence[int] | None = None,
    ) -> None:
        """Add images.

        Args:
            tokens_BTD: Their tokens, row-major.
            grid_hw: Their grid.
            targets: ``depth_BHW``, ``normals_B3HW`` and class maps ``<name>_BHW`` (-1 = background).
            split: Split that the images belong to.
            rows: Their rows in the split; None numbers them in order of arrival.
        """
        keep = min(len(tokens_BTD), self.max_images - len(self._seen))
        if keep <= 0:
            return
        tokens_BTD = tokens_BTD[:keep].detach().float().cpu()
        cells = cell_targets({name: t[:keep] for name, t in targets.items()}, grid_hw)
        first = len(self._seen)
        for image, row in enumerate(range(first, first + keep) if rows is None else rows[:keep]):
            own = {name: values[image].clone() for name, values in cells.items()}
            self._seen[key_of(self._seen, split, row)] = tokens_BTD[image].clone(), own

    def compute(self) -> dict[str, float]:
        """Return scores by name, leaving out those based on too few tokens; empty until four images have been seen."""
        images = first_of_all(self._seen, self.max_images)
        if len(images) < 4:
            return {}
        tokens_BTD = torch.stack([tokens_TD for tokens_TD, _ in images])
        targets = {name: torch.cat([cells[name] for _, cells in images]) for name in images[0][1]}
        image_N = torch.arange(len(images)).repeat_interleave(tokens_BTD.shape[1])
        first_N, features_NE = image_N < len(images) // 2, tokens_BTD.flatten(0, 1)
        everywhere_N, object_N = torch.ones_like(first_N), targets["object"]
        scores: dict[str, float] = {}
        for name, target, where_N in (
            ("depth", "depth", everywhere_N),
            ("normals", "normals", everywhere_N),
            ("object_depth", "depth", object_N),
        ):
            fit_N, evaluate_N = first_N & where_N, ~first_N & where_N
            if _enough(fit_N, evaluate_N):
                scores[name] = ridge_r2(features_NE, targets[target], fit_N=fit_N, evaluate_N=evaluate_N)
        fit_N, evaluate_N = first_N & object_N, ~first_N & object_N
        for name in CLASS_TARGETS:
            if _enough(fit_N, evaluate_N):
                scores[name] = ridge_accuracy(features_NE, targets[name], fit_N=fit_N, evaluate_N=evaluate_N)
        return scores


class TokenError(Metric):
    """Errors of tokens against a reference, over all tokens of all batches.

    ``compute`` gives ``nmse`` (squared error over the variance of the reference about its mean token: 0 is exact, 1 is
    as good as the best constant), ``relative`` (root mean square of the error over that of the reference),
    ``mean_cosine``, ``min_cosine`` and ``num_images``.
    """

    full_state_update = False
    error: Tensor
    square: Tensor
    cosine: Tensor
    tokens: Tensor
    images: Tensor
    sum_D: Tensor
    least: Tensor

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gather_anywhere)
        for name in ("error", "square", "cosine", "tokens", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum_D", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("least", torch.tensor(torch.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.set_dtype(torch.float64)

    def update(self, tokens_BTD: Tensor, reference_BTD: Tensor) -> None:
        """Add one batch."""
        ours_ND, theirs_ND = tokens_BTD.double().flatten(0, 1), reference_BTD.double().flatten(0, 1)
        cosine_N = F.cosine_similarity(ours_ND, theirs_ND, dim=-1)
        self.error = self.error + (ours_ND - theirs_ND).square().sum()
        self.square = self.square + theirs_ND.square().sum()
        self.sum_D = self.sum_D + theirs_ND.sum(0)
        self.cosine = self.cosine + cosine_N.sum()
        self.least = self.least.minimum(cosine_N.min())
        self.tokens = self.tokens + len(ours_ND)
        self.images = self.images + len(tokens_BTD)

    def compute(self) -> dict[str, float]:
        """Return the errors."""
        variance = self.square - self.sum_D.square().sum() / self.tokens
        tiny = torch.finfo(torch.float64).tiny
        return {
            "nmse": float(self.error / variance.clamp_min(tiny)),
            "relative": float((self.error / self.square.clamp_min(tiny)).sqrt()),
            "mean_cosine": float(self.cosine / self.tokens),
            "min_cosine": float(self.least),
            "num_images": int(self.images),
        }


def cell_targets(targets: Mapping[str, Tensor], grid_hw: tuple[int, int]) -> dict[str, Tensor]:
    """Return the dense truth per token.

    Returns:
        ``depth`` (B, T, 1) mean log distance, ``normals`` (B, T, 3) mean normal, ``object`` (B, T) bool, and each
        class (B, T) int64: the most frequent class among the cell's object pixels.
    """
    cells = {
        "depth": _pooled(targets["depth_BHW"].float().log().unsqueeze(1), grid_hw),
        "normals": _pooled(targets["normals_B3HW"].float(), grid_hw),
    }
    for name in CLASS_TARGETS:
        labels_BHW = targets[f"{name}_BHW"].long()
        classes = max(2, int(labels_BHW.max()) + 2)  # even an empty scene needs a class: one that gets no votes
        votes_BTC = _pooled(F.one_hot(labels_BHW + 1, classes).movedim(-1, 1).float(), grid_hw)[..., 1:]
        cells[name] = votes_BTC.argmax(-1)
        cells["object"] = votes_BTC.sum(-1) >= OBJECT_SHARE
    return cells


@typed
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


def _pooled(maps_BCHW: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(maps_BCHW, grid_hw).flatten(2).transpose(1, 2).cpu()


def _enough(fit_N: Tensor, evaluate_N: Tensor) -> bool:
    """Return whether both halves have enough tokens."""
    return min(int(fit_N.sum()), int(evaluate_N.sum())) >= FEWEST_TOKENS

"""Linear probes of tokens against dense ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.metrics.gather import Key, first_of_all, key_of
from visexpert.metrics.probes import ridge_accuracy, ridge_r2

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


def _pooled(maps_BCHW: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(maps_BCHW, grid_hw).flatten(2).transpose(1, 2).cpu()


def _enough(fit_N: Tensor, evaluate_N: Tensor) -> bool:
    """Return whether both halves have enough tokens."""
    return min(int(fit_N.sum()), int(evaluate_N.sum())) >= FEWEST_TOKENS

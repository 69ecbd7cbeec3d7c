"""Distance between the tokens of two encoders, over any number of batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from visexpert.metrics.records import gather_anywhere


class TokenError(Metric):
    """Errors of tokens against a reference, over all tokens of all batches.

    ``compute`` gives ``nmse`` (squared error over the variance of the reference about its mean token: 0 is exact, 1 is
    the best constant), ``relative`` (root mean square of the error over that of the reference), ``mean_cosine``,
    ``min_cosine`` and ``num_images``.
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

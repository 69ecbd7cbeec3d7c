"""Parts of distillation heads: MoVE-KD's adapter, a per-token map, standardization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.precision import like_weights
from visexpert.types import imaged

AdapterKind = Literal["released", "linear", "mlp"]


class ReleasedAdapter(nn.Module):
    """MoVE-KD's encoder adapter: linear over channels, exact GELU, linear over the token axis.

    It is tied to the teacher's grid; the second layer must learn the spatial layout.

    Args:
        in_dim: Width E of the teacher's tokens.
        in_tokens: Their number S.
        out_dim: Width D of the student's tokens.
        out_tokens: Their number T.
    """

    def __init__(self, *, in_dim: int, in_tokens: int, out_dim: int, out_tokens: int) -> None:
        super().__init__()
        self.channels = nn.Linear(in_dim, out_dim)
        self.tokens = nn.Linear(in_tokens, out_tokens)

    def forward(self, tokens_BSE: Tensor) -> Tensor:
        """Map tokens (B, S, E) to (B, T, D)."""
        mapped_BDT: Tensor = self.tokens(F.gelu(self.channels(like_weights(tokens_BSE, self)).transpose(1, 2)))
        return mapped_BDT.transpose(1, 2)


def token_map(kind: str, in_dim: int, out_dim: int, hidden_dim: int | None) -> nn.Module:
    """Build a per-token map: ``linear``, or LayerNorm and two layers (hidden width ``out_dim`` by default)."""
    if kind == "linear":
        return nn.Linear(in_dim, out_dim)
    hidden = hidden_dim or out_dim
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, out_dim))


class Standardize(nn.Module):
    """Standardizes tokens to zero mean and unit variance per channel, with statistics over all tokens seen in training.

    Statistics are cumulative (each batch counts equally) instead of per batch or per token, so that an image's target
    does not depend on its batch and settles with time. They are saved in the checkpoint; DDP uses those of rank 0.
    Before any training, the statistics of the batch are used.

    Args:
        dim: Number of channels.
    """

    keeps_statistics = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(dim, affine=False, momentum=None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Standardize:
        """Move and cast like any module, but keep the statistics in float32, which a mean over many batches needs."""
        before = [self.statistics.running_mean, self.statistics.running_var]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in zip(("running_mean", "running_var"), before, strict=True):
            new = getattr(self.statistics, name)
            if new is not None and old is not None and torch.finfo(new.dtype).bits < 32:
                setattr(self.statistics, name, old.to(device=new.device, dtype=torch.float32))
        return self

    def forward(self, tokens_BTE: Tensor, has_image_B: Tensor | None = None) -> Tensor:
        """Standardize (B, T, E); in training, first update the statistics from samples with an image. No graph."""
        statistics = self.statistics
        assert statistics.running_mean is not None and statistics.running_var is not None
        tokens_BTE = tokens_BTE.detach().to(statistics.running_mean.dtype)
        seen_BTE = imaged(tokens_BTE, has_image_B)
        if seen_BTE.numel() == 0:
            return torch.zeros_like(tokens_BTE)
        if self.training:
            self._learn(seen_BTE.flatten(0, 1))
        mean_E, var_E = statistics.running_mean, statistics.running_var
        if not self.training and not statistics.num_batches_tracked:
            var_E, mean_E = torch.var_mean(seen_BTE, dim=(0, 1))
        return F.batch_norm(tokens_BTE.flatten(0, 1), mean_E, var_E, eps=statistics.eps).view_as(tokens_BTE)

    def _learn(self, tokens_ME: Tensor) -> None:
        """Update as BatchNorm1d does, but skip a batch that is not finite. The host does not wait for the device."""
        statistics, seen = self.statistics, tokens_ME.new_zeros(2, tokens_ME.shape[1])
        assert statistics.running_mean is not None and statistics.running_var is not None
        tracked = statistics.num_batches_tracked
        assert tracked is not None
        F.batch_norm(tokens_ME, seen[0], seen[1], training=True, momentum=1.0)  # the batch's mean and variance, fast
        fine = seen.isfinite().all()
        tracked.add_(fine.to(tracked.dtype))
        share = torch.where(fine, 1.0 / tracked.clamp_min(1), torch.zeros_like(seen[0, 0]))
        for own_E, seen_E in zip((statistics.running_mean, statistics.running_var), seen, strict=True):
            own_E.mul_(1.0 - share).add_(share * torch.where(fine, seen_E, torch.zeros_like(seen_E)))

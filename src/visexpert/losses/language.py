"""The language loss, L_text."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def token_nll(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Return the negative log-likelihood of each supervised token.

    Args:
        logits_MV: Logits of the M supervised positions.
        targets_M: int64 token ids.

    Returns:
        (M,), nats, always float32.
    """
    return F.cross_entropy(logits_MV.float(), targets_M, reduction="none")


def text_loss(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per supervised token; zero (with a graph) if nothing is supervised."""
    if targets_M.numel() == 0:
        return logits_MV.float().sum()
    return token_nll(logits_MV, targets_M).mean()

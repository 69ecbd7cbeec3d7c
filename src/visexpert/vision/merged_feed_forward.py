"""MoLE for inference: one plain MLP per expert, applied to the tokens routed to it.

Letters beside those of types.py: E low-rank experts, N tokens with [CLS], H hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ExpertWeights:
    """A plain MLP for each expert.

    Args:
        fc1_EHD: Weights of the first layers.
        fc1_bias_EH: Their biases.
        fc2_EDH: Weights of the second layers.
        fc2_bias_ED: Their biases.
    """

    fc1_EHD: Tensor
    fc1_bias_EH: Tensor
    fc2_EDH: Tensor
    fc2_bias_ED: Tensor


class MergedFeedForward(nn.Module):
    """Top-1 MoLE for inference: each expert's plain MLP runs on the tokens routed to it.

    ``torch.export`` and ONNX can trace it: the number of tokens per expert stays dynamic in the graph.

    Args:
        weights: The MLP of each expert.
        router: Chooses an expert for each token.
        activation_fn: Activation between the two layers.
    """

    def __init__(self, weights: ExpertWeights, router: nn.Module, activation_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.activation_fn = router, activation_fn
        self.fc1_EHD = nn.Parameter(weights.fc1_EHD, requires_grad=False)
        self.fc1_bias_EH = nn.Parameter(weights.fc1_bias_EH, requires_grad=False)
        self.fc2_EDH = nn.Parameter(weights.fc2_EDH, requires_grad=False)
        self.fc2_bias_ED = nn.Parameter(weights.fc2_bias_ED, requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        choice_N = self.router(hidden_states).choice_BN.flatten()
        x_ND = hidden_states.flatten(0, -2)
        out_ND = torch.zeros_like(x_ND)
        for expert in range(len(self.fc1_EHD)):
            rows = (choice_N == expert).nonzero()[:, 0]
            out_ND = out_ND.index_copy(0, rows, self._mlp(x_ND[rows], expert).to(out_ND.dtype))
        return out_ND.view(hidden_states.shape)

    def _mlp(self, x_ND: Tensor, expert: int) -> Tensor:
        hidden_NH = self.activation_fn(F.linear(x_ND, self.fc1_EHD[expert], self.fc1_bias_EH[expert]))
        return F.linear(hidden_NH, self.fc2_EDH[expert], self.fc2_bias_ED[expert])

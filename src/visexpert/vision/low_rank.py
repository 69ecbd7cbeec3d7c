"""Low-rank experts beside one linear layer, evaluated together in rank space.

Letters beside those of types.py: E low-rank experts, N tokens, I inputs, O outputs, Q all ranks stacked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.vision.mole_settings import MoLEInit


class LowRankExperts(nn.Module):
    """Low-rank updates of one linear layer, computed in two products: ranks are stacked, biases become gate columns.

    Biases are flat vectors, which optimizers exclude from weight decay.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, num_experts: int, rank: int, scale: float, dropout: float, init: MoLEInit
    ) -> None:
        super().__init__()
        self.num_experts, self.rank, self.scale = num_experts, rank, scale
        self.A_weight = nn.Parameter(torch.empty(num_experts, rank, in_dim))
        self.A_bias = nn.Parameter(torch.zeros(num_experts * rank))
        self.B_weight = nn.Parameter(torch.zeros(num_experts, rank, out_dim))
        self.B_bias = nn.Parameter(torch.zeros(num_experts * out_dim))
        self.dropout = nn.Dropout(dropout)
        # Kaiming-uniform with gain sqrt(2) over each expert's inputs; the stacking hides their number from torch.
        nn.init.uniform_(self.A_weight, -math.sqrt(6 / in_dim), math.sqrt(6 / in_dim))
        if init == "released":
            nn.init.uniform_(self.B_weight, -math.sqrt(6 / rank), math.sqrt(6 / rank))

    def forward(self, x_NI: Tensor, gates_NE: Tensor, *, base_NO: Tensor) -> Tensor:
        """``base_NO`` + scale x sum over e of the gate times B_e (A_e x + a_e) + b_e."""
        ranks_NQ = F.linear(self.dropout(x_NI), self.A_weight.flatten(0, 1), self.A_bias)
        gates_NE = self.scale * gates_NE.to(ranks_NQ.dtype)
        gated_NQ = (ranks_NQ.unflatten(1, (self.num_experts, self.rank)) * gates_NE[:, :, None]).flatten(1)
        stacked_QO = torch.cat([self.B_weight.flatten(0, 1), self.B_bias.view(self.num_experts, -1)])
        return torch.addmm(base_NO, torch.cat([gated_NQ, gates_NE], dim=1), stacked_QO)

    def merged(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return weights (E, out, in) and biases (E, out) of ``linear`` with each expert added."""
        update_EOI = torch.einsum("ero,eri->eoi", self.B_weight, self.A_weight)
        shift_EO = torch.einsum("ero,er->eo", self.B_weight, self.A_bias.view(self.num_experts, self.rank))
        shift_EO = shift_EO + self.B_bias.view(self.num_experts, -1)
        return linear.weight + self.scale * update_EOI, _bias(linear) + self.scale * shift_EO

    def folded(self, linear: nn.Linear, gates_E: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight (out, in) and bias (out,) of ``linear`` with the experts added, each times its gate."""
        weighed_ERO = self.B_weight * gates_E[:, None, None]
        update_OI = torch.einsum("ero,eri->oi", weighed_ERO, self.A_weight)
        shift_O = torch.einsum("ero,er->o", weighed_ERO, self.A_bias.view(self.num_experts, self.rank))
        shift_O = shift_O + gates_E @ self.B_bias.view(self.num_experts, -1)
        return linear.weight + self.scale * update_OI, _bias(linear) + self.scale * shift_O


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias

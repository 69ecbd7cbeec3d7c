"""MoLE for inference: one MLP per expert, applied to the tokens routed to it.

Letters beside those of types.py: E low-rank experts, N tokens with [CLS], I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.vision.mole_forward import MLPForm, parts_of, through
from visexpert.vision.mole_host import is_plain_cpu, permuted, segments_of


class MergedLinear(nn.Module):
    """A linear layer for each expert.

    Args:
        weight_EOI: Their weights.
        bias_EO: Their biases; None where the layer has none.
    """

    def __init__(self, weight_EOI: Tensor, bias_EO: Tensor | None) -> None:
        super().__init__()
        self.weight_EOI = nn.Parameter(weight_EOI, requires_grad=False)
        self.bias_EO = None if bias_EO is None else nn.Parameter(bias_EO, requires_grad=False)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Map (..., in) to (..., out) by the layer of one expert."""
        return F.linear(x, self.weight_EOI[expert], None if self.bias_EO is None else self.bias_EO[expert])


class MergedFeedForward(nn.Module):
    """Top-1 MoLE for inference: each expert's MLP runs on the tokens routed to it.

    ``torch.export`` and ONNX can trace it: the number of tokens per expert stays dynamic in the graph.

    Args:
        form: How tokens go through the MLP.
        router: Chooses an expert for each token.
        linears: The linear layers by their names in the MLP.
        others: Its other children: activation, norm, dropout.
    """

    def __init__(
        self,
        form: MLPForm,
        router: nn.Module,
        linears: Mapping[str, MergedLinear],
        others: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.form, self.router = form, router
        self.num_experts = len(next(iter(linears.values())).weight_EOI)
        self.children_by_name = nn.ModuleDict({**linears, **others})

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens (..., D) to (..., D)."""
        choice_N = self.router(hidden_states).choice_BN.flatten()
        x_ND = hidden_states.flatten(0, -2)
        if is_plain_cpu([x_ND]):
            return self._on_the_host(x_ND, choice_N).view(hidden_states.shape)
        out_ND = torch.zeros_like(x_ND)
        for expert in range(self.num_experts):
            rows = (choice_N == expert).nonzero()[:, 0]
            of_expert = partial(self._linear, expert)
            made_ND = through(self.form, x_ND[rows], child=self.children_by_name.__getitem__, linear=of_expert)
            out_ND = out_ND.index_copy(0, rows, made_ND.to(out_ND.dtype))
        return out_ND.view(hidden_states.shape)

    def _on_the_host(self, x_ND: Tensor, choice_N: Tensor) -> Tensor:
        """Return the output with tokens sorted by expert once, and each expert on a slice of them."""
        segments, order_N, inverse_N = segments_of(choice_N, self.num_experts)
        x_ND = permuted(x_ND, order_N, inverse_N)
        child = self.children_by_name.__getitem__
        made = [
            through(self.form, x_ND[segment.rows], child=child, linear=partial(self._linear, segment.experts.start))
            for segment in segments
        ]
        return permuted(torch.cat(made), inverse_N, order_N) if made else torch.zeros_like(x_ND)

    def _linear(self, expert: int, name: str, x: Tensor) -> Sequence[Tensor]:
        return parts_of(self.children_by_name[name](x, expert), self.form.roles[name])

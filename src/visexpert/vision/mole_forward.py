"""How tokens go through the MLP of a vision transformer, with low-rank experts beside its linear layers or without.

All that a training step runs of MoLE is in this file. Letters beside those of types.py: E low-rank experts, N tokens
with [CLS], I inputs and O outputs of a linear layer, Q all ranks stacked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.vision.mole_host import (
    LinearWithUpdates,
    Segment,
    Updates,
    are_bare,
    draw_dropped,
    is_plain_cpu,
    permuted,
    segments_of,
)

HOST_FROM = 1 << 17
"""Least size of a MLP's input at which a CPU uses functions of its own: below, their calls cost more than they save."""

Routing = Literal["top1", "dense"]
RouterKind = Literal["released", "scaled", "straight_through"]
MoLEInit = Literal["identity", "released"]
Role = Literal["fc1", "fc2", "gate", "up", "down"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}
"""Activations that an MLP may compute without a child for them."""


@dataclass(frozen=True)
class MLPForm:
    """Order of the children of an MLP, and what each linear layer computes.

    A plain MLP is after(fc2(between(act(fc1 x)))), a gated one after(down(between(act(gate x) * up x))).

    Args:
        roles: What the linear layers compute, by their names in the order of the calls; the last one narrows. A layer
            that computes two things holds them one after the other (a packed SwiGLU: ``gate`` and ``up``).
        activation: Name in :data:`FUNCTIONS` of an activation that is no child; None where it is one.
        on_gate: Names of the children that only the gate goes through: its activation.
        between: Names of the children between the first linear layers and the last: activation, dropout, norm.
        after: Names of the children behind the last linear layer.
    """

    roles: Mapping[str, tuple[Role, ...]]
    activation: str | None = None
    on_gate: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def all_roles(self) -> tuple[Role, ...]:
        """``fc1``, ``fc2`` or ``gate``, ``up``, ``down``, whatever the layers are called and in whatever order."""
        gated = any("gate" in roles for roles in self.roles.values())
        return ("gate", "up", "down") if gated else ("fc1", "fc2")


def through(
    form: MLPForm,
    x: Tensor,
    *,
    child: Callable[[str], nn.Module],
    linear: Callable[[str, Tensor], Sequence[Tensor]],
) -> Tensor:
    """Return what an MLP of a form makes of tokens (..., D).

    Args:
        form: The form.
        x: The tokens.
        child: Returns a child by its name, apart from linear layers.
        linear: Maps the name of a linear layer and its input to one output for each of its roles.
    """
    *inner, outer = form.roles
    values: dict[Role, Tensor] = {}
    for name in inner:
        values |= zip(form.roles[name], linear(name, x), strict=True)
    hidden = values["gate"] if "gate" in values else values["fc1"]
    if form.activation is not None:
        hidden = FUNCTIONS[form.activation](hidden)
    for name in form.on_gate:
        hidden = child(name)(hidden)
    if "up" in values:
        hidden = hidden * values["up"]
    for name in form.between:
        hidden = child(name)(hidden)
    (hidden,) = linear(outer, hidden)
    for name in form.after:
        hidden = child(name)(hidden)
    return hidden


def parts_of(output: Tensor, roles: Sequence[Role], *, dim: int = -1) -> tuple[Tensor, ...]:
    """Return the part of a linear layer's output, weight or bias that belongs to each of its roles."""
    return (output,) if len(roles) == 1 else output.chunk(len(roles), dim)


class LowRankExperts(nn.Module):
    """Low-rank updates of one linear layer, computed in two products: ranks are stacked, biases become gate columns.

    Biases are flat vectors, which optimizers exclude from weight decay. Beside a layer without a bias experts have
    none, so that they can be folded into it.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        num_experts: int,
        rank: int,
        scale: float,
        dropout: float,
        init: MoLEInit,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts, self.rank, self.scale = num_experts, rank, scale
        self.A_weight = nn.Parameter(torch.empty(num_experts, rank, in_dim))
        self.A_bias = nn.Parameter(torch.zeros(num_experts * rank)) if bias else None
        self.B_weight = nn.Parameter(torch.zeros(num_experts, rank, out_dim))
        self.B_bias = nn.Parameter(torch.zeros(num_experts * out_dim)) if bias else None
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
        stacked_QO = self.B_weight.flatten(0, 1)
        if self.B_bias is None:
            return torch.addmm(base_NO, gated_NQ, stacked_QO)
        stacked_QO = torch.cat([stacked_QO, self.B_bias.view(self.num_experts, -1)])
        return torch.addmm(base_NO, torch.cat([gated_NQ, gates_NE], dim=1), stacked_QO)

    def beside(self, linear: nn.Linear, x_NI: Tensor, segments: tuple[Segment, ...], gates_NG: Tensor | None) -> Tensor:
        """Return a linear layer's output with the experts', as :meth:`forward` does, on tokens in segments."""
        share = self.dropout.p if self.dropout.training else 0.0
        how, dropped = Updates(segments, self.scale, 1 - share), draw_dropped(x_NI.numel(), share)
        own = (self.A_weight, self.A_bias, self.B_weight, self.B_bias)
        value: Tensor = LinearWithUpdates.apply(how, dropped, x_NI, linear.weight, linear.bias, *own, gates_NG)
        return value

    @torch.no_grad()
    def acts(self) -> bool:
        """Whether any expert changes the layer's output; the host waits for the device."""
        return any(bool(value.norm()) for value in (self.B_weight, self.B_bias) if value is not None)

    def updates(self) -> tuple[Tensor, Tensor]:
        """Return what each expert adds to the layer's weight (E, out, in) and bias (E, out), float32 or better."""
        A_ERI, B_ERO = self._precise(self.A_weight), self._precise(self.B_weight)
        weight_EOI = torch.einsum("ero,eri->eoi", B_ERO, A_ERI)
        if self.A_bias is None or self.B_bias is None:
            return self.scale * weight_EOI, weight_EOI.new_zeros(weight_EOI.shape[:2])
        shift_EO = torch.einsum("ero,er->eo", B_ERO, self._precise(self.A_bias).view(self.num_experts, self.rank))
        shift_EO = shift_EO + self._precise(self.B_bias).view(self.num_experts, -1)
        return self.scale * weight_EOI, self.scale * shift_EO

    @staticmethod
    def _precise(value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, torch.float32))


@dataclass(frozen=True)
class RouterChoice:
    """Decision of one router.

    Args:
        probs_BNE: Softmax over experts, float32 or better.
        choice_BN: int64, the most probable expert.
    """

    probs_BNE: Tensor
    choice_BN: Tensor


class Router(nn.Linear):
    """Logits of the experts for each token, softmax and the winner; no noise, temperature or capacity."""

    def forward(self, x_BND: Tensor) -> RouterChoice:  # type: ignore[override]
        logits_BNE = super().forward(x_BND)
        probs_BNE = logits_BNE.to(torch.promote_types(logits_BNE.dtype, torch.float32)).softmax(-1)
        return RouterChoice(probs_BNE, probs_BNE.argmax(-1))


class RoutedMLP(nn.Module):
    """What runs in a step of :class:`~visexpert.vision.MoLEFeedForward`, which builds it: router, gates and experts."""

    form: MLPForm
    router: Router
    routing: Routing
    router_kind: RouterKind

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens (..., D) to (..., D)."""
        chosen: RouterChoice = self.router(hidden_states)
        if self._runs_on_the_host(hidden_states):
            return self._on_the_host(hidden_states, chosen)
        gates_NE = self.gates(chosen).to(hidden_states.dtype).flatten(0, -2)
        routed = partial(self._routed, gates_NE)
        return through(self.form, hidden_states, child=self.get_submodule, linear=routed)

    def _runs_on_the_host(self, hidden_states: Tensor) -> bool:
        """Whether the functions for a CPU can be used, and are worth their calls.

        They sort tokens in top-1. A product of sorted rows need not round as one of unsorted rows does, so where no
        expert does anything yet, tokens stay in place and the output equals the MLP's own to the bit.
        """
        if not is_plain_cpu([hidden_states]) or hidden_states.numel() < HOST_FROM:  # in a graph, a size may be unknown
            return False
        if any(len(roles) > 1 for roles in self.form.roles.values()):
            return False
        if self.router_kind == "straight_through" and torch.is_grad_enabled():  # every expert has a gradient
            return False
        experts = [own for name in self.form.roles for own in self._experts_beside(name)]
        replaced = [*map(self._linear, self.form.roles), *experts, *(own.dropout for own in experts)]
        if not are_bare(replaced, (nn.Linear, LowRankExperts, nn.Dropout)):
            return False
        if not is_plain_cpu([hidden_states, *(value for module in replaced for value in module.parameters())]):
            return False
        return self.routing == "dense" or any(own.acts() for own in experts)

    def _on_the_host(self, hidden_states: Tensor, chosen: RouterChoice) -> Tensor:
        """Return the output with tokens in one segment per expert (top-1), or in one for all experts (dense)."""
        x_ND, count = hidden_states.flatten(0, -2), self.router.out_features
        probs_NE = chosen.probs_BNE.flatten(0, -2)
        if self.routing == "dense":
            together = (Segment(slice(0, len(x_ND)), slice(0, count)),)
            routed = partial(self._updated, together, probs_NE.to(x_ND.dtype))
            return through(self.form, x_ND, child=self.get_submodule, linear=routed).view(hidden_states.shape)
        choice_N = chosen.choice_BN.flatten()
        segments, order_N, inverse_N = segments_of(choice_N, count)
        weighed = self.router_kind == "scaled"
        gates_N1 = probs_NE.gather(1, choice_N[:, None])[order_N].to(x_ND.dtype) if weighed else None
        x_ND = permuted(x_ND, order_N, inverse_N)
        routed = partial(self._updated, segments, gates_N1)
        out_ND = through(self.form, x_ND, child=self.get_submodule, linear=routed)
        return permuted(out_ND, inverse_N, order_N).view(hidden_states.shape)

    def _updated(
        self, segments: tuple[Segment, ...], gates_NG: Tensor | None, name: str, x_NI: Tensor
    ) -> tuple[Tensor]:
        """Return the output of a linear layer with its experts on tokens that lie in segments."""
        (experts,) = self._experts_beside(name)
        return (experts.beside(self._linear(name), x_NI, segments, gates_NG),)

    def _routed(self, gates_NE: Tensor, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of a linear layer with its experts, one for each role, laid out as the library has them.

        Elementwise functions may round otherwise where parts of a packed layer are not views of one tensor.
        """
        roles = self.form.roles[name]
        bases, x_NI = parts_of(self._linear(name)(x), roles), x.flatten(0, -2)
        outputs = [
            experts(x_NI, gates_NE, base_NO=base.flatten(0, -2)).view(base.shape)
            for experts, base in zip(self._experts_beside(name), bases, strict=True)
        ]
        return (outputs[0],) if len(roles) == 1 else parts_of(torch.cat(outputs, dim=-1), roles)

    def gates(self, chosen: RouterChoice) -> Tensor:
        """Return the weight g of each expert per token, (B, N, E), given the router's decision."""
        probs = chosen.probs_BNE
        if self.routing == "dense":
            return probs
        experts_E = torch.arange(probs.shape[-1], device=probs.device)
        one_hot = (chosen.choice_BN[..., None] == experts_E).to(probs.dtype)
        if self.router_kind == "scaled":
            return one_hot * probs
        if self.router_kind == "straight_through":
            return one_hot + (probs - probs.detach())
        return one_hot

    def _linear(self, name: str) -> nn.Linear:
        return self.get_submodule(name)  # type: ignore[return-value]

    def _experts_beside(self, name: str) -> tuple[LowRankExperts, ...]:
        return tuple(getattr(self, f"{role}_experts") for role in self.form.roles[name])


@runtime_checkable
class RoutedEncoder(Protocol):
    """An encoder that may run blocks behind its tokens: ``VisionEncoder``.

    Attributes:
        layer: Hidden state in use, from -1.
        routing_watched: Whether blocks behind the tokens run, too, for their routers.
    """

    layer: int
    routing_watched: bool

    def mlp_names(self) -> tuple[str, ...]:
        """Return the dotted names of the MLPs of all blocks, in order."""

    def read_blocks(self) -> tuple[nn.Module, ...]:
        """Return the blocks that the tokens depend on."""

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its dotted name."""


@dataclass(frozen=True)
class RoutingRecord:
    """Decisions of all routers in one forward pass.

    Args:
        layers: Blocks of the encoder, from 0, that the first axis runs over.
        probs_LBNE: Softmax over experts; with a graph if the pass had one.
        choice_LBN: int64, the most probable expert.
    """

    layers: tuple[int, ...]
    probs_LBNE: Tensor
    choice_LBN: Tensor


class RoutingCollector:
    """Records the routers' decisions while :func:`collect_routing` is active; the latest pass counts."""

    def __init__(self) -> None:
        self._choices: dict[int, RouterChoice] = {}

    def keep(self, layer: int, choice: RouterChoice) -> None:
        """Record the decisions of one layer."""
        self._choices[layer] = choice

    def record(self) -> RoutingRecord | None:
        """Return the decisions of all layers that ran; None if no layer has a router (a plain CLIP)."""
        if not self._choices:
            return None
        layers = tuple(sorted(self._choices))
        probs = torch.stack([self._choices[layer].probs_BNE for layer in layers])
        return RoutingRecord(layers, probs, torch.stack([self._choices[layer].choice_BN for layer in layers]))


@contextmanager
def collect_routing(encoder: nn.Module) -> Iterator[RoutingCollector]:
    """Record the routers' decisions in an encoder: ``with collect_routing(clip) as routing: clip(images)``.

    Layers count blocks of a ``VisionEncoder``, and routers in the order of the model in any other encoder that
    :func:`~visexpert.vision.add_mole` has equipped. In a ``VisionEncoder``, blocks with MoLE behind the tokens also
    run, for their routers. The modules store nothing, so no graph outlives the record. Under gradient checkpointing the
    blocks run again in the backward pass, after the ``with``, and are not recorded; the recorded probabilities have a
    gradient if checkpointing is not reentrant (transformers' default). Under DDP each process has the decisions on its
    own images.
    """
    collector = RoutingCollector()
    clip = encoder if isinstance(encoder, RoutedEncoder) else None
    watched = clip is not None and clip.routing_watched
    if clip is not None:
        clip.routing_watched = True
    handles = [router.register_forward_hook(partial(_report, collector, index)) for index, router in _routers(encoder)]
    try:
        yield collector
    finally:
        if clip is not None:
            clip.routing_watched = watched
        for handle in handles:
            handle.remove()


def _routers(encoder: nn.Module) -> list[tuple[int, Router]]:
    """Return the routers with the index of their block, which is the first number in their names, or their own."""
    named = [(name, module) for name, module in encoder.named_modules() if isinstance(module, Router)]
    if not isinstance(encoder, RoutedEncoder):
        return [(index, router) for index, (_, router) in enumerate(named)]
    return [(int(re.findall(r"\.(\d+)\.", name)[0]), router) for name, router in named]


def _report(collector: RoutingCollector, layer: int, module: nn.Module, inputs: object, output: RouterChoice) -> None:
    collector.keep(layer, output)

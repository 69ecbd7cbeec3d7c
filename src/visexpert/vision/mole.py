"""MoLE: MLPs of a vision transformer with low-rank experts beside each linear layer (MoVE-KD, arXiv 2501.01709).

Letters beside those of types.py: E low-rank experts, N tokens with [CLS], H hidden width of the MLP, I inputs and O
outputs of a linear layer, Q all ranks stacked.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPMLP

from visexpert.errors import ConfigError
from visexpert.vision.merged_feed_forward import ExpertWeights, MergedFeedForward
from visexpert.vision.plain_mlp import find_mlps, order_of

MOLE_KEY = re.compile(r"\.mlp\.(router|fc1_experts|fc2_experts)\.")
"""Keys of a state dict that :func:`add_mole` adds to those of CLIP."""

Routing = Literal["top1", "dense"]
RouterKind = Literal["released", "scaled", "straight_through"]
MoLEInit = Literal["identity", "released"]


@dataclass(frozen=True)
class MoLESettings:
    """Mixture-of-LoRA-experts in the MLPs of a CLIP; see :class:`visexpert.vision.MoLEFeedForward`.

    Args:
        num_experts: Low-rank experts per layer (paper: 3).
        rank: Rank of each (paper: 32).
        alpha: Experts are scaled by alpha / rank; null means rank, or 1 (as released) with ``init: released``.
        dropout: Dropout on the input of A in training (release: 0.05).
        routing: ``top1`` (release) or ``dense``.
        init: ``identity`` - the student starts as CLIP; ``released`` - A and B random.
        router: How a top-1 router learns: ``released`` (from the balance loss only), ``scaled`` or
            ``straight_through``.
        layers: Blocks to equip, from 0; null for all that the tokens depend on; ``all`` also for those behind them, as
            in the release, which neither text nor teachers reach, only the balance loss.
    """

    num_experts: int = 3
    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.05
    routing: Routing = "top1"
    init: MoLEInit = "identity"
    router: RouterKind = "released"
    layers: list[int] | Literal["all"] | None = None


@runtime_checkable
class RoutedEncoder(Protocol):
    """An encoder that may run blocks behind its tokens: ``ClipEncoder``.

    Attributes:
        model: The network.
        layer: Hidden state in use, from -1.
        routing_watched: Whether blocks behind the tokens run, too, for their routers.
    """

    model: CLIPVisionModel
    layer: int
    routing_watched: bool

    def read_modules(self) -> tuple[nn.Module, ...]:
        """Return the embeddings, the first norm and the blocks that the tokens depend on."""


@dataclass(frozen=True)
class RouterChoice:
    """Decision of one router.

    Args:
        probs_BNE: Softmax over experts, float32 or better.
        choice_BN: int64, the most probable expert.
    """

    probs_BNE: Tensor
    choice_BN: Tensor


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


class Router(nn.Linear):
    """Logits of the experts for each token, softmax and the winner; no noise, temperature or capacity."""

    def forward(self, x_BND: Tensor) -> RouterChoice:  # type: ignore[override]
        logits_BNE = super().forward(x_BND)
        probs_BNE = logits_BNE.to(torch.promote_types(logits_BNE.dtype, torch.float32)).softmax(-1)
        return RouterChoice(probs_BNE, probs_BNE.argmax(-1))


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

    Layers count blocks of a ``ClipEncoder``, and routers in the order of the model in any other encoder that
    :func:`~visexpert.vision.add_mole` has equipped. In a ``ClipEncoder``, blocks with MoLE behind the tokens also
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
    if not isinstance(encoder, RoutedEncoder):
        return list(enumerate(module for module in encoder.modules() if isinstance(module, Router)))
    found = ((index, getattr(block.mlp, "router", None)) for index, block in enumerate(encoder.model.encoder.layers))
    return [(index, router) for index, router in found if isinstance(router, Router)]


def _report(collector: RoutingCollector, layer: int, module: nn.Module, inputs: object, output: RouterChoice) -> None:
    collector.keep(layer, output)


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


class MoLEFeedForward(nn.Module):
    """An MLP with E low-rank experts beside each of its two linear layers.

    y = W2 act(W1 x + c1 + sum_e g_e D_e(x)) + c2 + sum_e g_e U_e(act(.)), each expert with biases:
    L_e(v) = (alpha / rank) (B_e (A_e drop(v) + a_e) + b_e). One router on the MLP's input serves both layers:
    p = softmax(router(x)), and g is p (``dense``) or picks the largest (``top1``).

    The MLP's layers keep their names (CLIP: ``fc1``, ``fc2``), so the keys of its own state dict stay; MoLE adds
    ``router.{weight,bias}`` and, under ``fc1_experts`` and ``fc2_experts``, ``A_weight`` (E, R, in), ``A_bias`` (E R),
    ``B_weight`` (E, R, out) and ``B_bias`` (E out). Nothing is frozen here. All experts are evaluated in rank space on
    every token, so each of their parameters always has a gradient, as DDP requires. A ``released`` top-1 router without
    a balance loss has none: do not train it.

    Departs from the released code: the default starts as CLIP, scales by 1 instead of 1/32, allows zero dropout, and
    experts share one dropout mask per linear layer (the same distribution in ``top1``, not in ``dense``).

    Args:
        mlp: The MLP, whose layers are reused.
        num_experts: E.
        rank: Rank of each expert.
        alpha: Experts are scaled by alpha / rank; None means rank, or 1 (as released) with ``init: released``.
        dropout: Dropout on the input of A in training.
        routing: ``top1`` or ``dense``.
        init: ``identity`` - B is zero, the output equals the plain MLP's to the bit; ``released`` - A and B
            Kaiming-uniform for ReLU. Biases start at zero.
        router: How a top-1 router learns: ``released`` - the chosen expert is not weighted, so the router learns from
            the balance loss only; ``scaled`` - the expert's output times its p, as in Switch (arXiv 2101.03961, eq. 2);
            ``straight_through`` - not weighted, but differentiated as if it were dense.

    Raises:
        ConfigError: An unknown name, an invalid number, ``router`` with ``dense``, or an MLP that is not two linear
            layers in sequence.
    """

    fc1: nn.Linear  # these three where the MLP is a CLIP's; others may have other names, see order
    activation_fn: nn.Module
    fc2: nn.Linear

    def __init__(
        self,
        mlp: nn.Module,
        *,
        num_experts: int = 3,
        rank: int = 32,
        alpha: float | None = None,
        dropout: float = 0.05,
        routing: Routing = "top1",
        init: MoLEInit = "identity",
        router: RouterKind = "released",
    ) -> None:
        super().__init__()
        if isinstance(mlp, MoLEFeedForward):
            raise ConfigError("add_mole: an MLP has MoLE already (MoLEFeedForward); add it to a model once.")
        self.order = order_of(mlp)
        _check_names(routing=(routing, Routing), init=(init, MoLEInit), router=(router, RouterKind))
        _check_numbers(num_experts=num_experts, rank=rank, dropout=dropout)
        if routing == "dense" and router != "released":
            raise ConfigError(
                f"MoLE: router={router!r} is for routing='top1' only; a dense router learns from the task."
            )
        self.routing, self.router_kind = routing, router
        for name in (self.order.first, *self.order.between, self.order.second, *self.order.after):
            self.add_module(name, mlp.get_submodule(name))
        width, hidden = self._first.in_features, self._first.out_features
        scale = ((1.0 if init == "released" else rank) if alpha is None else alpha) / rank
        make = partial(LowRankExperts, num_experts=num_experts, rank=rank, scale=scale, dropout=dropout, init=init)
        self.router = Router(width, num_experts)
        self.fc1_experts = make(width, hidden)
        self.fc2_experts = make(hidden, width)
        for module in self.added_modules():
            module.to(self._first.weight)

    @property
    def _first(self) -> nn.Linear:
        return self.get_submodule(self.order.first)  # type: ignore[return-value]

    @property
    def _second(self) -> nn.Linear:
        return self.get_submodule(self.order.second)  # type: ignore[return-value]

    def _between(self, hidden_NH: Tensor) -> Tensor:
        for name in self.order.between:
            hidden_NH = self.get_submodule(name)(hidden_NH)
        return hidden_NH

    @property
    def router_learns(self) -> bool:
        """Whether the router learns from text and distillation; otherwise only from the balance loss."""
        return self.routing == "dense" or self.router_kind != "released"

    def added_modules(self) -> tuple[nn.Module, ...]:
        """Return the modules that MoLE adds to the MLP: the router and the experts."""
        return self.router, self.fc1_experts, self.fc2_experts

    def learning_modules(self, *, balanced: bool) -> tuple[nn.Module, ...]:
        """Return the added modules that get a gradient, which leaves out a router with nothing to learn from."""
        experts = (self.fc1_experts, self.fc2_experts)
        return (self.router, *experts) if balanced or self.router_learns else experts

    @property
    def has_merged_form(self) -> bool:
        """Whether each token goes through one unweighted expert, so that a plain MLP can replace it."""
        return self.routing == "top1" and self.router_kind != "scaled"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        chosen: RouterChoice = self.router(hidden_states)
        gates_NE = self.gates(chosen).to(hidden_states.dtype).flatten(0, -2)
        x_ND = hidden_states.flatten(0, -2)
        hidden_NH = self._between(self.fc1_experts(x_ND, gates_NE, base_NO=self._first(x_ND)))
        out_ND: Tensor = self.fc2_experts(hidden_NH, gates_NE, base_NO=self._second(hidden_NH))
        for name in self.order.after:
            out_ND = self.get_submodule(name)(out_ND)
        return out_ND.view(hidden_states.shape)

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

    @torch.no_grad()
    def merged_weights(self) -> ExpertWeights:
        """Return the plain MLP equivalent to each expert: W_e = W + (alpha / rank) B_e A_e, with its biases."""
        return ExpertWeights(*self.fc1_experts.merged(self._first), *self.fc2_experts.merged(self._second))

    def for_inference(self) -> MergedFeedForward:
        """Return an equivalent module that costs (almost) as much as the plain MLP, with the weights of E MLPs.

        Raises:
            ConfigError: Experts are mixed or weighted per token, so no plain MLP is equivalent to one.
        """
        if not self.has_merged_form:
            raise ConfigError(
                f"MoLE with routing={self.routing!r} and router={self.router_kind!r} weighs experts by token and has "
                "no merged form; use it as it is, or train with routing='top1' and another router."
            )
        between = [self.get_submodule(name) for name in self.order.between]
        activation = between[0] if len(between) == 1 else nn.Sequential(*between)
        return MergedFeedForward(self.merged_weights(), copy.deepcopy(self.router), activation)

    @torch.no_grad()
    def folded(self, gates_E: Tensor, config: CLIPVisionConfig) -> CLIPMLP:
        """Return one plain MLP: W + sum_e g_e (alpha / rank) B_e A_e, with its biases.

        Args:
            gates_E: One weight per expert for all tokens.
            config: Configuration of the CLIP.
        """
        gates_E = gates_E.to(self._first.weight)
        plain = CLIPMLP(config).to(self._first.weight)
        for name, linear, experts in (
            ("fc1", self._first, self.fc1_experts),
            ("fc2", self._second, self.fc2_experts),
        ):
            weight, bias = experts.folded(linear, gates_E)
            plain.get_submodule(name).load_state_dict({"weight": weight, "bias": bias})
        return plain

    def extra_repr(self) -> str:
        """Return the settings that the weights do not show."""
        return f"routing={self.routing}, router={self.router_kind}, scale={self.fc1_experts.scale:g}"


def add_mole(
    encoder: nn.Module,
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    num_experts: int = 3,
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.05,
    routing: Routing = "top1",
    init: MoLEInit = "identity",
    router: RouterKind = "released",
) -> tuple[MoLEFeedForward, ...]:
    """Replace the MLPs of a vision transformer with MoLE. The options are those of :class:`MoLEFeedForward`.

    With ``init="identity"`` the model at first gives what it gave before, to the bit. Its parameters keep their names.

    Args:
        encoder: A ``ClipEncoder``, or a vision transformer of transformers or timm, changed in place, with or
            without its weights loaded.
        layers: Blocks to equip, from 0; None for all that the tokens depend on; ``all`` (the released code) also for
            those behind the hidden state in use of a ``ClipEncoder``, which neither text nor teachers reach.

    Returns:
        The new modules in block order; train their :meth:`MoLEFeedForward.added_modules`.

    Raises:
        ConfigError: The model has no plain MLPs of two linear layers, or several towers of them; a block does not
            exist, is named twice or already has MoLE; invalid options.
    """
    if isinstance(encoder, RoutedEncoder):
        names = [f"model.encoder.layers.{index}.mlp" for index in range(len(encoder.model.encoder.layers))]
        read = len(encoder.read_modules()) - 2
        state = f"hidden state {encoder.layer} depends on 0..{read - 1}, the others learn from the balance loss alone."
    else:
        names = list(find_mlps(encoder))
        read, state = len(names), f"{type(encoder).__name__} has {len(names)} of them."
    chosen = sorted(range(read) if layers is None else range(len(names)) if layers == "all" else layers)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(names))):
        raise ConfigError(f"add_mole: layers={chosen} must name different blocks of 0..{len(names) - 1}; {state}")
    options = {"num_experts": num_experts, "rank": rank, "alpha": alpha, "dropout": dropout}
    made = {
        names[index]: MoLEFeedForward(
            encoder.get_submodule(names[index]),
            routing=routing,
            init=init,
            router=router,
            **options,  # type: ignore[arg-type]
        )
        for index in chosen
    }
    for name, mole in made.items():
        encoder.set_submodule(name, mole)
    return tuple(made.values())


def _check_names(**chosen: tuple[str, object]) -> None:
    for name, (value, allowed) in chosen.items():
        if value not in get_args(allowed):
            raise ConfigError(f"MoLE: {name}={value!r} is unknown; use one of {', '.join(get_args(allowed))}.")


def _check_numbers(*, num_experts: int, rank: int, dropout: float) -> None:
    if num_experts < 1 or rank < 1 or not 0 <= dropout < 1:
        raise ConfigError(
            f"MoLE: num_experts={num_experts}, rank={rank} and dropout={dropout} are invalid; give at least one "
            "expert, a rank of at least 1 and a dropout in [0, 1)."
        )

"""MoLE: MLPs of a vision transformer with low-rank experts beside each linear layer (MoVE-KD, arXiv 2501.01709).

Letters beside those of types.py: E low-rank experts, N tokens with [CLS].
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.typed import typed
from visexpert.vision.merged_feed_forward import MergedFeedForward, MergedLinear
from visexpert.vision.mlp_recognition import form_of
from visexpert.vision.mole_forward import LowRankExperts, MoLEInit, RoutedMLP, Router, RouterKind, Routing

MOLE_KEY = re.compile(r"\.(router\.(weight|bias)|(fc1|fc2|gate|up|down)_experts\.[AB]_(weight|bias))$")
"""Keys of a state dict that :func:`add_mole` adds to those of an encoder."""


@typed
@dataclass(frozen=True)
class MoLESettings:
    """Mixture-of-LoRA-experts in the MLPs of an encoder; see :class:`visexpert.vision.MoLEFeedForward`.

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


@typed
class MoLEFeedForward(RoutedMLP):
    """An MLP with E low-rank experts beside each of its linear layers: two, or the three of a gated MLP (SwiGLU).

    y = W2 act(W1 x + c1 + sum_e g_e D_e(x)) + c2 + sum_e g_e U_e(act(.)), each expert with biases:
    L_e(v) = (alpha / rank) (B_e (A_e drop(v) + a_e) + b_e). One router on the MLP's input serves all layers:
    p = softmax(router(x)), and g is p (``dense``) or picks the largest (``top1``). In a gated MLP, gate, up and down
    each have experts of their own, even where one packed layer computes gate and up: the same model has the same MoLE
    whether its library packs them or not. Experts beside a layer without a bias have none.

    The MLP's children keep their names (CLIP: ``fc1``, ``fc2``), so the keys of its own state dict stay; MoLE adds
    ``router.{weight,bias}`` and, under ``fc1_experts`` and ``fc2_experts`` or ``gate_experts``, ``up_experts`` and
    ``down_experts``, ``A_weight`` (E, R, in), ``A_bias`` (E R), ``B_weight`` (E, R, out) and ``B_bias`` (E out).
    Nothing is frozen here. Each parameter of an expert always has a gradient, as DDP requires, 0 if no token chose it:
    a GPU evaluates all experts in rank space on every token, a CPU those that a token chose, on tokens sorted by
    expert, where the input is large enough to gain by it.
    A ``released`` top-1 router without a balance loss has none: do not train it.

    Departs from the released code: the default starts as CLIP, scales by 1 instead of 1/32, allows zero dropout, and
    experts share one dropout mask per linear layer (the same distribution in ``top1``, not in ``dense``).

    Args:
        mlp: The MLP, whose children are reused.
        num_experts: E.
        rank: Rank of each expert.
        alpha: Experts are scaled by alpha / rank; None means rank, or 1 (as released) with ``init: released``.
        dropout: Dropout on the input of A in training.
        routing: ``top1`` or ``dense``.
        init: ``identity`` - B is zero, the output equals the MLP's own to the bit; ``released`` - A and B
            Kaiming-uniform for ReLU. Biases start at zero.
        router: How a top-1 router learns: ``released`` - the chosen expert is not weighted, so the router learns from
            the balance loss only; ``scaled`` - the expert's output times its p, as in Switch (arXiv 2101.03961, eq. 2);
            ``straight_through`` - not weighted, but differentiated as if it were dense.

    Raises:
        ConfigError: An unknown name, an invalid number, ``router`` with ``dense``, or an MLP that is neither two linear
            layers in sequence nor a gated one.
    """

    fc1: nn.Linear  # these three where the MLP is a CLIP's; others may have other names, see form
    activation_fn: nn.Module
    fc2: nn.Linear
    fc1_experts: LowRankExperts  # these two where the MLP is plain
    fc2_experts: LowRankExperts

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
        self.form = form_of(mlp)
        _check_names(routing=(routing, Routing), init=(init, MoLEInit), router=(router, RouterKind))
        _check_numbers(num_experts=num_experts, rank=rank, dropout=dropout)
        if routing == "dense" and router != "released":
            raise ConfigError(
                f"MoLE: router={router!r} is for routing='top1' only; a dense router learns from the task."
            )
        self.routing, self.router_kind = routing, router
        self._shell = (_without_children(mlp),)  # in a tuple, where it is no child
        self._own = tuple(name for name, _ in mlp.named_children())
        taken = [name for name in self._own if name == "router" or name.endswith("_experts") or hasattr(self, name)]
        if taken:
            raise ConfigError(
                f"MoLE: {type(mlp).__name__} has a child {taken[0]!r}, a name that MoLE uses itself; leave its block "
                "out with layers."
            )
        for name in self._own:
            self.add_module(name, mlp.get_submodule(name))
        first = self._linear(next(iter(self.form.roles)))
        self.router = Router(first.in_features, num_experts)
        scale = ((1.0 if init == "released" else rank) if alpha is None else alpha) / rank
        make = partial(LowRankExperts, num_experts=num_experts, rank=rank, scale=scale, dropout=dropout, init=init)
        made = {
            role: make(linear.in_features, linear.out_features // len(roles), bias=linear.bias is not None)
            for name, roles in self.form.roles.items()
            for linear in (self._linear(name),)
            for role in roles
        }
        for role in self.form.all_roles:
            self.add_module(f"{role}_experts", made[role])
        for module in self.added_modules():
            module.to(first.weight).train(mlp.training)
        self.training = mlp.training

    @property
    def router_learns(self) -> bool:
        """Whether the router learns from text and distillation; otherwise only from the balance loss."""
        return self.routing == "dense" or self.router_kind != "released"

    def experts(self) -> tuple[LowRankExperts, ...]:
        """Return the experts of each linear layer: of the first and second, or of gate, up and down."""
        return tuple(getattr(self, f"{role}_experts") for role in self.form.all_roles)

    def added_modules(self) -> tuple[nn.Module, ...]:
        """Return the modules that MoLE adds to the MLP: the router and the experts."""
        return self.router, *self.experts()

    def learning_modules(self, *, balanced: bool) -> tuple[nn.Module, ...]:
        """Return the added modules that get a gradient, which leaves out a router with nothing to learn from."""
        return self.added_modules() if balanced or self.router_learns else self.experts()

    @property
    def has_merged_form(self) -> bool:
        """Whether each token goes through one unweighted expert, so that a plain MLP can replace it."""
        return self.routing == "top1" and self.router_kind != "scaled"

    @torch.no_grad()
    def merged_weights(self) -> dict[str, MergedLinear]:
        """Return each linear layer for each expert, by its name: W_e = W + (alpha / rank) B_e A_e, with its biases."""
        return {name: MergedLinear(*self._with_updates(name)) for name in self.form.roles}

    def _with_updates(self, name: str, gates_E: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return a layer's weights and biases with each expert added; with gates, one weight and bias with their sum.

        Computed in float32 or better and rounded once.
        """
        linear = self._linear(name)
        updates = [experts.updates() for experts in self._experts_beside(name)]  # packed layers: one behind the other
        weight, bias = (torch.cat(parts, dim=1) for parts in zip(*updates, strict=True))
        if gates_E is not None:
            weight, bias = (torch.einsum("e,e...->...", gates_E.to(weight), update) for update in (weight, bias))
        weight = (linear.weight + weight).to(linear.weight.dtype)
        return weight, None if linear.bias is None else (linear.bias + bias).to(linear.bias.dtype)

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
        others = {name: copy.deepcopy(self.get_submodule(name)) for name in self._own if name not in self.form.roles}
        return MergedFeedForward(self.form, copy.deepcopy(self.router), self.merged_weights(), others).eval()

    @torch.no_grad()
    def folded(self, gates_E: Tensor) -> nn.Module:
        """Return one MLP of the library's own class: W + sum_e g_e (alpha / rank) B_e A_e, with its biases.

        Args:
            gates_E: One weight per expert for all tokens.
        """
        plain = copy.deepcopy(self._shell[0])
        for name in self._own:
            plain.add_module(name, copy.deepcopy(self.get_submodule(name)))
        for name in self.form.roles:
            weight, bias = self._with_updates(name, gates_E)
            linear = plain.get_submodule(name)
            linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        plain.training = self.training
        return plain

    def extra_repr(self) -> str:
        """Return the settings that the weights do not show."""
        return f"routing={self.routing}, router={self.router_kind}, scale={self.experts()[0].scale:g}"


def _without_children(mlp: nn.Module) -> nn.Module:
    """Return a copy of an MLP that shares its attributes and has no children."""
    shell = copy.copy(mlp)
    shell._modules = {}
    return shell


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

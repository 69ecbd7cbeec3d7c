"""MoLE: the MLPs of CLIP with a mixture of low-rank experts beside each linear layer (MoVE-KD, arXiv 2501.01709).

Letters beside those of types.py: E low-rank experts, N tokens with [CLS], H hidden width of the MLP.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPMLP

from visexpert.errors import ConfigError
from visexpert.vision.clip import ClipEncoder
from visexpert.vision.mole_settings import MoLEInit, RouterKind, Routing


@dataclass(frozen=True)
class RouterChoice:
    """What one router decided.

    Args:
        probs_BNE: Softmax over experts, float32 or better.
        choice_BN: int64, the most probable expert.
    """

    probs_BNE: Tensor
    choice_BN: Tensor


@dataclass(frozen=True)
class RoutingRecord:
    """What the routers of all layers decided in one forward pass.

    Args:
        layers: Blocks of the encoder, from 0, that the first axis runs over.
        probs_LBNE: Softmax over experts; with a graph where the pass had one.
        choice_LBN: int64, the most probable expert.
    """

    layers: tuple[int, ...]
    probs_LBNE: Tensor
    choice_LBN: Tensor


class MoLEFeedForward(nn.Module):
    """An MLP of CLIP with E low-rank experts beside each of its two linear layers.

    y = W2 act(W1 x + c1 + sum_e g_e D_e(x)) + c2 + sum_e g_e U_e(act(.)), each expert with biases:
    L_e(v) = (alpha / rank) (B_e (A_e drop(v) + a_e) + b_e). One router on the MLP's input decides for both layers:
    p = softmax(router(x)), and g is p (``dense``) or picks the largest (``top1``).

    ``fc1`` and ``fc2`` keep their names, so the keys of CLIP's own state dict stay; MoLE adds ``router.{weight,bias}``
    and, under ``fc1_experts`` and ``fc2_experts``, ``A_weight`` (E, R, in), ``A_bias`` (E R), ``B_weight`` (E, R, out)
    and ``B_bias`` (E out). Nothing is frozen here. All experts are evaluated in rank space on every token, so each of
    their parameters always has a gradient, as DDP wants; the router has none where it is ``released`` with top-1 and
    no balance loss is taken: leave it out of what trains then.

    Departs from the released code: the default starts as CLIP, scales by 1 instead of 1/32, can do without dropout, and
    experts share one dropout mask per linear layer (the same distribution in ``top1``, not in ``dense``).

    Args:
        mlp: The MLP, whose layers are taken over.
        num_experts: E.
        rank: Rank of each expert.
        alpha: Experts are scaled by alpha / rank; None takes rank, and 1 (the release's) with ``init: released``.
        dropout: On the input of A, in training.
        routing: ``top1`` or ``dense``.
        init: ``identity`` - B is zero, the output equals the plain MLP's to the bit; ``released`` - A and B
            Kaiming-uniform for ReLU. Biases start at zero.
        router: How top-1 lets the router learn: ``released`` - the chosen expert is not weighed, the router learns
            from a balance loss only; ``scaled`` - the expert's output times its p, as in Switch (arXiv 2101.03961,
            eq. 2); ``straight_through`` - not weighed, but differentiated as if it were dense.

    Raises:
        ConfigError: An unknown name, an impossible number, ``router`` beside ``dense``, or no plain MLP of CLIP.
    """

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
        if not isinstance(mlp, CLIPMLP):
            raise ConfigError(f"MoLE goes beside a plain CLIPMLP, not a {type(mlp).__name__}; add it to a CLIP once.")
        _check_names(routing=(routing, Routing), init=(init, MoLEInit), router=(router, RouterKind))
        _check_numbers(num_experts=num_experts, rank=rank, dropout=dropout)
        if routing == "dense" and router != "released":
            raise ConfigError(f"MoLE: router={router!r} is for routing='top1'; a dense router learns from the task.")
        self.routing, self.router_kind = routing, router
        self.fc1, self.activation_fn, self.fc2 = mlp.fc1, mlp.activation_fn, mlp.fc2
        width, hidden = mlp.fc1.in_features, mlp.fc1.out_features
        scale = ((1.0 if init == "released" else rank) if alpha is None else alpha) / rank
        make = partial(_LowRankExperts, num_experts=num_experts, rank=rank, scale=scale, dropout=dropout, init=init)
        self.router = _Router(width, num_experts)
        self.fc1_experts = make(width, hidden)
        self.fc2_experts = make(hidden, width)
        for module in self.added_modules():
            module.to(mlp.fc1.weight)

    @property
    def router_learns(self) -> bool:
        """Whether text and distillation reach the router; otherwise a balance loss alone does."""
        return self.routing == "dense" or self.router_kind != "released"

    def added_modules(self) -> tuple[nn.Module, ...]:
        """What MoLE adds to the MLP: the router and the experts."""
        return self.router, self.fc1_experts, self.fc2_experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map tokens (B, N, D) to (B, N, D)."""
        chosen: RouterChoice = self.router(hidden_states)
        gates_NE = self._gates(chosen).to(hidden_states.dtype).flatten(0, -2)
        x_ND = hidden_states.flatten(0, -2)
        hidden_NH = self.activation_fn(self.fc1_experts(x_ND, gates_NE, base_NO=self.fc1(x_ND)))
        out_ND: Tensor = self.fc2_experts(hidden_NH, gates_NE, base_NO=self.fc2(hidden_NH))
        return out_ND.view(hidden_states.shape)

    def _gates(self, chosen: RouterChoice) -> Tensor:
        """Weight of each expert per token, (B, N, E)."""
        probs = chosen.probs_BNE
        if self.routing == "dense":
            return probs
        one_hot = F.one_hot(chosen.choice_BN, probs.shape[-1]).to(probs.dtype)
        if self.router_kind == "scaled":
            return one_hot * probs
        if self.router_kind == "straight_through":
            return one_hot + (probs - probs.detach())
        return one_hot

    @torch.no_grad()
    def merged_weights(self) -> ExpertWeights:
        """The plain MLP that each expert amounts to: W_e = W + (alpha / rank) B_e A_e, with its biases."""
        return ExpertWeights(*self.fc1_experts.merged(self.fc1), *self.fc2_experts.merged(self.fc2))

    def for_inference(self) -> MergedFeedForward:
        """The same function at (almost) the cost of the plain MLP, with the weights of E of them.

        Raises:
            ConfigError: Experts are mixed or weighed per token, so that no plain MLP stands for one.
        """
        if self.routing == "dense" or self.router_kind == "scaled":
            raise ConfigError(
                f"MoLE with routing={self.routing!r} and router={self.router_kind!r} weighs experts by token and has "
                "no merged form; use it as it is, or train with routing='top1' and another router."
            )
        return MergedFeedForward(self.merged_weights(), copy.deepcopy(self.router), self.activation_fn)

    def extra_repr(self) -> str:
        """What the weights do not tell."""
        return f"routing={self.routing}, router={self.router_kind}, scale={self.fc1_experts.scale:g}"


def add_mole(
    clip: ClipEncoder,
    *,
    layers: Sequence[int] | None = None,
    num_experts: int = 3,
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.05,
    routing: Routing = "top1",
    init: MoLEInit = "identity",
    router: RouterKind = "released",
) -> tuple[MoLEFeedForward, ...]:
    """Put MoLE in place of MLPs of a CLIP. The options are those of :class:`MoLEFeedForward`.

    Args:
        clip: The encoder, changed in place, its weights loaded or not.
        layers: Blocks to equip, from 0; None for all that the tokens depend on. The released code also equips those
            behind the hidden state that is read, where neither text nor teachers reach.

    Returns:
        What was put in, in the order of the blocks; :meth:`MoLEFeedForward.added_modules` is what to train.

    Raises:
        ConfigError: A block that is not read, is named twice or has MoLE already; options that cannot work.
    """
    blocks = list(clip.model.encoder.layers)
    read = len(clip.read_modules()) - 2
    chosen = sorted(range(read) if layers is None else layers)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(read)):
        raise ConfigError(
            f"add_mole: layers={chosen} must name different blocks of 0..{read - 1}, those that hidden state "
            f"{clip.layer} of a CLIP with {len(blocks)} blocks depends on; the others would get no gradient."
        )
    options = {"num_experts": num_experts, "rank": rank, "alpha": alpha, "dropout": dropout}
    made = [
        MoLEFeedForward(blocks[index].mlp, routing=routing, init=init, router=router, **options)  # type: ignore[arg-type]
        for index in chosen
    ]
    for index, mole in zip(chosen, made, strict=True):
        blocks[index].mlp = mole
    return tuple(made)


def merge_for_inference(clip: ClipEncoder) -> ClipEncoder:
    """A copy of a CLIP with each MoLE in its merged form (:meth:`MoLEFeedForward.for_inference`).

    Raises:
        ConfigError: A MoLE has no merged form.
    """
    merged = copy.deepcopy(clip)
    for block in merged.model.encoder.layers:
        if isinstance(block.mlp, MoLEFeedForward):
            block.mlp = block.mlp.for_inference()
    return merged.requires_grad_(False).eval()


class RoutingCollector:
    """Keeps what routers decide while :func:`collect_routing` is active; the latest pass counts."""

    def __init__(self) -> None:
        self._choices: dict[int, RouterChoice] = {}

    def keep(self, layer: int, choice: RouterChoice) -> None:
        """Note the decisions of one layer."""
        self._choices[layer] = choice

    def record(self) -> RoutingRecord | None:
        """All layers that ran; None where no layer has a router (a plain CLIP)."""
        if not self._choices:
            return None
        layers = tuple(sorted(self._choices))
        probs = torch.stack([self._choices[layer].probs_BNE for layer in layers])
        return RoutingRecord(layers, probs, torch.stack([self._choices[layer].choice_BN for layer in layers]))


@contextmanager
def collect_routing(clip: ClipEncoder) -> Iterator[RoutingCollector]:
    """Keep what the routers of ``clip`` decide: ``with collect_routing(clip) as routing: clip(images)``.

    The modules themselves keep nothing, so no graph outlives the record. Under gradient checkpointing the blocks run
    again in the backward pass, after the ``with``, unseen; the probabilities kept have a gradient if checkpointing is
    not reentrant (transformers' default). Under DDP each process has the decisions on its own images.
    """
    collector = RoutingCollector()
    handles = []
    for index, block in enumerate(clip.model.encoder.layers):
        if isinstance(block.mlp, MoLEFeedForward | MergedFeedForward):
            handles.append(block.mlp.router.register_forward_hook(partial(_report, collector, index)))
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()


def _report(collector: RoutingCollector, layer: int, module: nn.Module, inputs: object, output: RouterChoice) -> None:
    collector.keep(layer, output)


class _Router(nn.Linear):
    """Logits of the experts for each token, softmax and the winner; no noise, temperature or capacity."""

    def forward(self, x_BND: Tensor) -> RouterChoice:  # type: ignore[override]
        logits_BNE = super().forward(x_BND)
        probs_BNE = logits_BNE.to(torch.promote_types(logits_BNE.dtype, torch.float32)).softmax(-1)
        return RouterChoice(probs_BNE, probs_BNE.argmax(-1))


class _LowRankExperts(nn.Module):
    """Low-rank updates of one linear layer, all in two products: their ranks stacked, their biases gate columns.

    Biases are flat vectors, which optimisers spare from weight decay.
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
        # Kaiming-uniform with gain sqrt(2) over the inputs of each expert, which the stacking would hide from torch.
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
        """Weights (E, out, in) and biases (E, out) of ``linear`` with each expert added."""
        update_EOI = torch.einsum("ero,eri->eoi", self.B_weight, self.A_weight)
        shift_EO = torch.einsum("ero,er->eo", self.B_weight, self.A_bias.view(self.num_experts, self.rank))
        shift_EO = shift_EO + self.B_bias.view(self.num_experts, -1)
        return linear.weight + self.scale * update_EOI, linear.bias + self.scale * shift_EO


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
    """Top-1 MoLE for inference: tokens sorted by expert, one plain MLP over each contiguous slice.

    Args:
        weights: The MLP of each expert.
        router: Decides per token.
        activation_fn: Between the two layers.
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
        order_N = choice_N.argsort(stable=True)
        counts = torch.bincount(choice_N, minlength=len(self.fc1_EHD)).tolist()
        slices = hidden_states.flatten(0, -2)[order_N].split(counts)
        sorted_ND = torch.cat([self._mlp(part_ND, expert) for expert, part_ND in enumerate(slices)])
        out_ND = torch.empty_like(sorted_ND)
        out_ND[order_N] = sorted_ND
        return out_ND.view(hidden_states.shape)

    def _mlp(self, x_ND: Tensor, expert: int) -> Tensor:
        hidden_NH = self.activation_fn(F.linear(x_ND, self.fc1_EHD[expert], self.fc1_bias_EH[expert]))
        return F.linear(hidden_NH, self.fc2_EDH[expert], self.fc2_bias_ED[expert])


def _check_names(**chosen: tuple[str, object]) -> None:
    for name, (value, allowed) in chosen.items():
        if value not in get_args(allowed):
            raise ConfigError(f"MoLE: {name}={value!r} is unknown; use one of {', '.join(get_args(allowed))}.")


def _check_numbers(*, num_experts: int, rank: int, dropout: float) -> None:
    if num_experts < 1 or rank < 1 or not 0 <= dropout < 1:
        raise ConfigError(
            f"MoLE: num_experts={num_experts}, rank={rank} and dropout={dropout} cannot work; give at least one "
            "expert, a rank of at least 1 and a dropout in [0, 1)."
        )

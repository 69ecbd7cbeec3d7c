"""MoLE on a CPU: tokens lie in one segment per expert, and each linear layer with its experts is one function.

Reading the size of a segment costs a CPU nothing, while a GPU would have to be waited for. Letters beside those of
types.py: E low-rank experts of rank R, N tokens with [CLS], I inputs and O outputs of a linear layer, G experts of a
segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

PART = 1 << 18
"""Values of a part: 1 MiB of float32."""


@dataclass(frozen=True)
class Segment:
    """Tokens that the same experts read: all experts in dense routing, one in top-1.

    Args:
        rows: The tokens, which lie one behind the other.
        experts: The experts.
    """

    rows: slice
    experts: slice


@dataclass(frozen=True)
class Updates:
    """How a linear layer's experts are applied.

    Args:
        segments: Segments that together hold each token once.
        scale: Factor of every update.
        keep: Share of inputs that dropout keeps, above 0.
    """

    segments: tuple[Segment, ...]
    scale: float
    keep: float


def segments_of(choice_N: Tensor, num_experts: int) -> tuple[tuple[Segment, ...], Tensor, Tensor]:
    """Return a segment for each expert that any token chose, the order that sorts tokens into them, and its inverse.

    Args:
        choice_N: int64, the expert of each token.
        num_experts: E.
    """
    order_N = choice_N.argsort(stable=True)
    sizes: list[int] = torch.bincount(choice_N, minlength=num_experts).tolist()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    segments = tuple(
        Segment(slice(end - size, end), slice(expert, expert + 1))
        for expert, (size, end) in enumerate(zip(sizes, ends, strict=True))
        if size
    )
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N))
    return segments, order_N, inverse_N


def is_plain_cpu(values: Sequence[Tensor | None]) -> bool:
    """Whether tensors are ordinary ones of one dtype on a CPU that nothing traces, transforms or casts."""
    tensors = [value for value in values if value is not None]
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return (
        not (traced or transformed or torch.is_autocast_enabled("cpu"))
        and all(type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu" for value in tensors)
        and len({value.dtype for value in tensors}) == 1
    )


def are_bare(modules: Iterable[nn.Module], kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether modules are of these very classes and nothing watches them, so that their work can be done for them."""
    return all(
        type(module) in kinds
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )


def draw_dropped(count: int, share: float) -> Tensor | None:
    """Return which of ``count`` values dropout sets to zero, each with probability ``share``: int64, ascending.

    The gaps between them are drawn, which are geometric: a twentieth of the numbers that a mask takes at a share of
    .05. None if the share is 0.
    """
    if not share:
        return None
    rate, spread = 1 / math.log1p(-share), math.sqrt(count * share * (1 - share))
    found, last = [], -1
    while last < count:
        size = int((count - last) * share + 6 * spread) + 16
        gaps = torch.rand(size).neg_().log1p_().mul_(rate).to(torch.int64).add_(1)
        gaps[0] += last
        found.append(gaps.cumsum_(0))
        last = int(gaps[-1])
    places = torch.cat(found) if len(found) > 1 else found[0]
    return places[: int(torch.searchsorted(places, count))]


class Permuted(torch.autograd.Function):
    """Rows in another order; the gradient's come back by the inverse order, without sums."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        """Return ``x_ND[order_N]``."""
        ctx.save_for_backward(order_N, inverse_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the order of the input."""
        order_N, inverse_N = ctx.saved_tensors
        return permuted(grads[0], inverse_N, order_N), None, None


def permuted(x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Return rows in an order, given its inverse too."""
    return Permuted.apply(x_ND, order_N, inverse_N)  # type: ignore[no-any-return]


class LinearWithUpdates(torch.autograd.Function):
    """A linear layer and its experts: W x + c + scale x sum over e of the gate times B_e (A_e drop(x) + a_e) + b_e.

    Keeps the input once, and of the ranks only what they are. Can be differentiated twice, then by :func:`composed`.
    """

    @staticmethod
    def forward(ctx: Any, how: Updates, dropped: Tensor | None, *operands: Tensor | None) -> Tensor:
        """Return (N, O), given the operands of :func:`composed`."""
        x_NI, weight_OI, bias_O, A_ERI, a_ER, B_ERO, b_EO, gates_NG = operands
        assert x_NI is not None and weight_OI is not None and A_ERI is not None and B_ERO is not None
        E, R, _ = A_ERI.shape
        out_NO = F.linear(x_NI, weight_OI, bias_O)
        stacked = _stacked(B_ERO, b_EO)
        G = how.segments[0].experts.stop - how.segments[0].experts.start if how.segments else E
        ranks = x_NI.new_ones(len(x_NI), G, stacked.shape[1])
        for segment in how.segments:
            rows, experts = segment.rows, segment.experts
            A_QI = A_ERI[experts].flatten(0, 1).t()
            made = x_NI.new_empty(rows.stop - rows.start, A_QI.shape[1])
            for part in _parts(x_NI, dropped, rows):
                torch.mm(part.value, A_QI, out=made[part.start - rows.start : part.stop - rows.start])
            made = made.mul_(1 / how.keep) if how.keep < 1 else made
            made = made if a_ER is None else made.add_(a_ER.view(E, R)[experts].flatten())
            ranks[rows, :, :R] = made.view(-1, G, R)
            gated = _gated(ranks[rows], None if gates_NG is None else gates_NG[rows], how.scale)
            torch.addmm(out_NO[rows], gated, stacked[experts].flatten(0, 1), out=out_NO[rows])
        ctx.how = how
        ctx.save_for_backward(dropped, ranks, *operands)
        return out_NO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each operand that needs one."""
        dropped, ranks, *operands = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # for a second derivative
            return None, None, *_by_autograd(ctx.how, dropped, operands, needed, grads[0])
        x_NI, weight_OI, bias_O, *_ = operands
        dx_NI = grads[0] @ weight_OI if needed[0] else None
        dweight_OI = grads[0].t() @ x_NI if needed[1] else None
        dbias_O = grads[0].sum(0) if needed[2] else None
        return None, None, dx_NI, dweight_OI, dbias_O, *_of_experts(ctx.how, dropped, ranks, operands, grads[0], dx_NI)


def _of_experts(
    how: Updates, dropped: Tensor | None, ranks: Tensor, operands: Sequence[Any], dy_NO: Tensor, dx_NI: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of A, a, B, b and the gates, and add the experts' own to that of the input."""
    x_NI, _, _, A_ERI, a_ER, B_ERO, b_EO, gates_NG = operands
    (E, R, _), stacked = A_ERI.shape, _stacked(B_ERO, b_EO)
    dA_ERI, dstacked = torch.zeros_like(A_ERI), torch.zeros_like(stacked)
    da_ER = None if a_ER is None else torch.zeros_like(a_ER).view(E, R)
    dgates_NG = None if gates_NG is None else torch.empty_like(gates_NG)
    for segment in how.segments:
        rows, experts = segment.rows, segment.experts
        dy, A_QI = dy_NO[rows], A_ERI[experts].flatten(0, 1)
        gates = None if gates_NG is None else gates_NG[rows]
        gated = _gated(ranks[rows], gates, how.scale)
        torch.mm(gated.t(), dy, out=dstacked[experts].flatten(0, 1))
        dgated = torch.mm(dy, stacked[experts].flatten(0, 1).t()).mul_(how.scale).view(ranks[rows].shape)
        if dgates_NG is not None:
            torch.sum(dgated * ranks[rows], -1, out=dgates_NG[rows])
        dranks = dgated[..., :R] if gates is None else dgated[..., :R] * gates[:, :, None]
        dranks = dranks.reshape(len(dy), -1)
        if da_ER is not None:
            da_ER[experts] = dranks.sum(0).view(-1, R)
        dranks = dranks / how.keep
        dA_QI = dA_ERI[experts].flatten(0, 1)
        for part in _parts(x_NI, dropped, rows):
            dranks_part = dranks[part.start - rows.start : part.stop - rows.start]
            torch.addmm(dA_QI, dranks_part.t(), part.value, out=dA_QI)
            if dx_NI is not None:
                _add_kept(dx_NI[part.start : part.stop], dranks_part, A_QI, part.dropped)
    db_EO = None if b_EO is None else dstacked[:, R].reshape(b_EO.shape)
    return dA_ERI, None if da_ER is None else da_ER.view(-1), dstacked[:, :R].contiguous(), db_EO, dgates_NG


def composed(
    how: Updates,
    dropped: Tensor | None,
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    A_ERI: Tensor,
    a_ER: Tensor | None,
    B_ERO: Tensor,
    b_EO: Tensor | None,
    gates_NG: Tensor | None,
) -> Tensor:
    """Return what :class:`LinearWithUpdates` computes, by torch's own differentiable functions.

    Args:
        how: How experts are applied.
        dropped: Places of the inputs that dropout sets to zero, counted over (N, I).
        x_NI: The input.
        weight_OI: The layer's weight.
        bias_O: Its bias.
        A_ERI: The experts' first matrices.
        a_ER: Their biases, (E R).
        B_ERO: The experts' second matrices.
        b_EO: Their biases, (E O).
        gates_NG: Weights of the experts of each token's segment; None for 1.
    """
    (E, R, _), stacked = A_ERI.shape, _stacked(B_ERO, b_EO)
    value_NI = x_NI if dropped is None else x_NI.flatten().index_fill(0, dropped, 0.0).view_as(x_NI) / how.keep
    parts = []
    for segment in how.segments:
        rows, experts = segment.rows, segment.experts
        bias = None if a_ER is None else a_ER.view(E, R)[experts].flatten()
        ranks = F.linear(value_NI[rows], A_ERI[experts].flatten(0, 1), bias).unflatten(1, (-1, R))
        ones = [] if b_EO is None else [ranks.new_ones(*ranks.shape[:2], 1)]
        gated = _gated(torch.cat([ranks, *ones], -1), None if gates_NG is None else gates_NG[rows], how.scale)
        parts.append(gated @ stacked[experts].flatten(0, 1))
    return F.linear(x_NI, weight_OI, bias_O) + torch.cat(parts)


def _by_autograd(
    how: Updates, dropped: Tensor | None, operands: Sequence[Any], needed: Sequence[bool], dy_NO: Tensor
) -> tuple[Tensor | None, ...]:
    out_NO = composed(how, dropped, *operands)
    wanted = [operand for operand, needs in zip(operands, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(out_NO, wanted, dy_NO, create_graph=True, allow_unused=True))
    return tuple(next(found) if needs else None for needs in needed)


def _stacked(B_ERO: Tensor, b_EO: Tensor | None) -> Tensor:
    """Return the second matrices with their biases as a last row each."""
    return B_ERO if b_EO is None else torch.cat([B_ERO, b_EO.view(len(B_ERO), 1, -1)], dim=1)


@dataclass(frozen=True)
class _Part:
    """Rows of an input, few enough to stay in the processor's cache.

    Args:
        start: The first row.
        stop: One behind the last.
        value: The rows, with zeros where dropout drops, not scaled.
        dropped: Places of these zeros in the part; None without dropout.
    """

    start: int
    stop: int
    value: Tensor
    dropped: Tensor | None


def _parts(x_NI: Tensor, dropped: Tensor | None, rows: slice) -> Iterator[_Part]:
    """Give the rows in parts; all in one, and the tensor's own, if none is dropped."""
    if dropped is None:
        yield _Part(rows.start, rows.stop, x_NI[rows], None)
        return
    width = x_NI.shape[1]
    edges = [*range(rows.start, rows.stop, max(1, PART // width)), rows.stop]
    places = torch.searchsorted(dropped, torch.tensor(edges) * width).tolist()
    for (start, stop), (first, last) in zip(pairwise(edges), pairwise(places), strict=True):
        own = dropped[first:last] - start * width
        value = x_NI[start:stop].clone(memory_format=torch.contiguous_format)
        value.view(-1).index_fill_(0, own, 0.0)
        yield _Part(start, stop, value, own)


def _add_kept(dx_NI: Tensor, dranks_NQ: Tensor, A_QI: Tensor, dropped: Tensor | None) -> None:
    """Add the gradient that comes through the experts, which dropped inputs do not reach."""
    if dropped is None:
        torch.addmm(dx_NI, dranks_NQ, A_QI, out=dx_NI)
        return
    untouched = dx_NI.view(-1).index_select(0, dropped)
    torch.addmm(dx_NI, dranks_NQ, A_QI, out=dx_NI)
    dx_NI.view(-1).index_copy_(0, dropped, untouched)


def _gated(ranks: Tensor, gates_NG: Tensor | None, scale: float) -> Tensor:
    """Return ranks (N, G, R or R + 1) times gates and scale, flat."""
    if gates_NG is not None:
        ranks = ranks * (scale * gates_NG)[:, :, None]
    elif scale != 1:
        ranks = ranks * scale
    return ranks.flatten(1)

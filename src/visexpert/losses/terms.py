"""Load-balancing losses, which keep a gate or a router from collapsing onto one expert."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.processes import summed
from visexpert.types import imaged


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


GateBalanceForm = Literal["cv", "switch"]
RouterBalanceForm = Literal["pooled", "per_layer"]


def gate_balance(
    gates_BTK: Tensor,
    attached_K: Tensor,
    form: GateBalanceForm = "cv",
    *,
    load_K: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """Return L_aux, the auxiliary loss of ToVE's token-aware gate.

    ``cv``: CV^2 of importance (sum of gates per expert) plus CV^2 of load (tokens won by each expert), after Shazeer
    et al. 2017, eqs. 6-11. The counted load has no gradient; pass ``load_K`` (the smooth estimate of a noisy gate) to
    get one. ``switch``: K * sum_k f_k P_k with f the share of tokens won and P the mean gate (Fedus et al. 2021, eq.
    4). ToVE cites Shazeer's approach; the paper confirms neither weight nor form. Neither form is linear in the tokens:
    processes that train together add up what both forms count, and where a step has several batches, methods average
    their losses, weighted by the number of images.

    Args:
        gates_BTK: Gates, float, summing to one over attached experts.
        attached_K: bool; detached experts are ignored.
        form: ``cv`` or ``switch``.
        load_K: Smooth load of each expert, for ``cv``.
        top_k: Number of experts that win each token: those with the largest gates.

    Returns:
        Scalar, float32 or better; 0 at perfect balance for ``cv``, 1 for ``switch``. With a single expert the value is
        also 0 or 1, without a gradient; 0 (with a graph) for no token.
    """
    if form not in ("cv", "switch"):
        raise ConfigError(f"gate_balance: form={form!r} is unknown; use 'cv' or 'switch'.")
    full = torch.promote_types(gates_BTK.dtype, torch.float32)
    # Masked sums keep the number of attached experts on the device, so that the host need not wait for it.
    gates_NK = gates_BTK.flatten(0, -2).to(full).masked_fill(~attached_K, 0.0)
    ranked_NK = gates_NK.masked_fill(~attached_K, -1.0)
    won_N1 = ranked_NK.topk(min(top_k, gates_NK.shape[-1]), dim=-1).indices if top_k > 1 else _first_largest(ranked_NK)
    won_K = torch.zeros_like(gates_NK).scatter(-1, won_N1, 1.0).sum(0) * attached_K
    load_K = won_K if load_K is None or form == "switch" else load_K.to(full)
    counts_K = torch.full_like(won_K, len(gates_NK))
    importance_K, load_K, counts_K = summed(torch.stack([gates_NK.sum(0), load_K, counts_K])).unbind()
    if form == "switch":
        mean_K = importance_K / counts_K.clamp_min(1)
        return attached_K.sum() * (load_K / load_K.sum().clamp_min(1) * mean_K).sum()
    return _squared_variation(importance_K, attached_K) + _squared_variation(load_K, attached_K)


def router_balance(
    probs_LBNE: Tensor,
    choice_LBN: Tensor,
    form: RouterBalanceForm = "pooled",
    *,
    has_image_B: Tensor | None = None,
) -> Tensor:
    """Return the balance loss of MoVE-KD's routers: sum_e mean(p_e) mean(1[chosen = e]), mean over images.

    ``pooled`` (the released code; the paper's total loss has no such term): both means run over the tokens of all
    layers, so each layer may collapse onto an expert of its own at no cost. ``per_layer``: both means run over the
    tokens of one layer, and the loss is the mean over layers. The share of chosen tokens has no gradient; the
    probabilities have one, which also reaches earlier layers.

    Args:
        probs_LBNE: Softmax of the router over E experts, per layer and token, [CLS] included.
        choice_LBN: int64, the chosen expert.
        form: ``pooled`` or ``per_layer``.
        has_image_B: bool; samples without an image are ignored. None: every sample has one.

    Returns:
        Scalar, float32 or better: 1 / E at perfect balance, 1 if all tokens go to one expert with certainty; 0 (with a
        graph) if no sample has an image.

    Raises:
        ConfigError: An unknown form.
    """
    if form not in ("pooled", "per_layer"):
        raise ConfigError(f"router_balance: form={form!r} is unknown; use 'pooled' or 'per_layer'.")
    probs_LBNE = probs_LBNE.to(torch.promote_types(probs_LBNE.dtype, torch.float32))
    experts_E = torch.arange(probs_LBNE.shape[-1], device=choice_LBN.device)
    chosen_LBNE = (choice_LBN[..., None] == experts_E).to(probs_LBNE.dtype)  # one_hot reads the values on the host
    share_LBE, mean_LBE = chosen_LBNE.mean(2), probs_LBNE.mean(2)
    if form == "pooled":
        share_LBE, mean_LBE = share_LBE.mean(0, keepdim=True), mean_LBE.mean(0, keepdim=True)
    loss_B = (share_LBE * mean_LBE).sum(-1).mean(0)
    seen_B = imaged(loss_B, has_image_B)
    return seen_B.sum() / max(len(seen_B), 1)


def _first_largest(values_NK: Tensor) -> Tensor:
    return values_NK.argmax(-1, keepdim=True)


def _squared_variation(values_K: Tensor, attached_K: Tensor) -> Tensor:
    """Return CV^2 = variance / mean^2 over attached experts (population variance)."""
    count = attached_K.sum().clamp_min(1)
    mean = values_K.masked_fill(~attached_K, 0.0).sum() / count
    spread = (values_K - mean).square().masked_fill(~attached_K, 0.0).sum() / count
    return spread / mean.square().clamp_min(torch.finfo(values_K.dtype).tiny)


TokenDistance = Literal["mse", "cosine", "smooth_l1"]


def token_distance(
    student_BTD: Tensor,
    target_BTD: Tensor,
    kind: TokenDistance = "mse",
    *,
    normalize: bool = False,
    has_image_B: Tensor | None = None,
) -> Tensor:
    """Return the mean distance of tokens from their targets (ToVE's knowledge merging; its form is unconfirmed).

    Args:
        student_BTD: Tokens of the student.
        target_BTD: Fused tokens, not differentiated.
        kind: ``mse`` - squared error, mean over all entries; ``smooth_l1`` - Huber's with beta 1; ``cosine`` - one
            minus the cosine of each token pair.
        normalize: Apply LayerNorm (without affine) to every token of both sides first.
        has_image_B: bool; samples without an image take no part. None: all have one.

    Returns:
        Scalar, float32; 0 if both agree, and (with a graph) if no sample has an image.

    Raises:
        ConfigError: An unknown kind.
    """
    student_BTD, target_BTD = imaged(student_BTD, has_image_B), imaged(target_BTD, has_image_B)
    student, target = student_BTD.float(), target_BTD.detach().float()
    if not student.numel():
        return student.sum()
    if normalize:
        student, target = (F.layer_norm(tokens, tokens.shape[-1:]) for tokens in (student, target))
    if kind == "mse":
        return F.mse_loss(student, target)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(student, target)
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, target, dim=-1)).mean()
    raise ConfigError(f"token_distance: kind={kind!r} is unknown; use one of {', '.join(get_args(TokenDistance))}.")


def normalized_mse(student_BTD: Tensor, target_BTD: Tensor, *, has_image_B: Tensor | None = None) -> Tensor:
    """Return the squared error over the targets' variance about their mean token: 0 is exact, 1 is the best constant.

    Samples without an image (``has_image_B`` False) are ignored; 0 if none has one.
    """
    student_BTD, target_BTD = imaged(student_BTD, has_image_B), imaged(target_BTD, has_image_B)
    student, target = student_BTD.float(), target_BTD.float()
    centered = target - target.mean(dim=(0, 1), keepdim=True)
    return (student - target).square().sum() / centered.square().sum().clamp_min(1e-12)

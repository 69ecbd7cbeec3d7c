"""ToVE's token-aware gate: how much each CLIP token draws from each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError, require_numbers
from visexpert.losses.terms import GateBalanceForm
from visexpert.typed import typed

GateKind = Literal["token", "uniform"]
NoiseKind = Literal["none", "fixed", "learned"]


@typed
@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Settings of the gate and its load balancing.

    Args:
        kind: ``token`` - the token-aware gate; ``uniform`` - the plain average of the attached experts (control).
        hidden: Hidden width of a two-layer gate; null for a linear one (unconfirmed by the paper).
        noise: Noise added to the logits in training: ``none``; ``fixed`` - Gaussian of ``noise_std``; ``learned`` -
            Shazeer's, with standard deviation softplus(W x) + 1e-2 (the paper's form). The default scores best on
            Tabletop (docs/results/tove-tabletop.md, "all, noisy gate").
        noise_std: Standard deviation of the fixed noise.
        top_k: Keep the k largest gates per token and renormalize; null keeps all (paper).
        balance_weight: Weight of the load-balancing loss (value unconfirmed).
        balance_form: ``cv`` (Shazeer) or ``switch``.

    Raises:
        ConfigError: An unknown value, or a number outside its range.
    """

    kind: GateKind = "token"
    hidden: int | None = None
    noise: NoiseKind = "none"
    noise_std: float = 0.5
    top_k: int | None = None
    balance_weight: float = 0.01
    balance_form: GateBalanceForm = "cv"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, GateKind),
            ("noise", self.noise, NoiseKind),
            ("balance_form", self.balance_form, GateBalanceForm),
        ):
            if value not in get_args(allowed):
                raise ConfigError(f"gate: {name}={value!r} is unknown; use one of {', '.join(get_args(allowed))}.")
        require_numbers("gate", least=0, noise_std=self.noise_std, balance_weight=self.balance_weight)
        require_numbers("gate", least=1, hidden=self.hidden, top_k=self.top_k)
        if self.noise == "fixed" and self.noise_std == 0:
            raise ConfigError("gate: noise_std=0 must be above 0; for no noise, set noise to none.")


@dataclass(frozen=True)
class GateOutput:
    """Output of the gate.

    Args:
        gates_BTK: Softmax over attached experts, 0 for detached ones.
        attached_K: bool, which experts are attached.
        load_BK: Smooth estimate of the number of an image's tokens that each expert wins (Shazeer et al. 2017, eqs.
            8-10), float32 or better; None without noise.
    """

    gates_BTK: Tensor
    attached_K: Tensor
    load_BK: Tensor | None = None


class TokenGate(nn.Module):
    """Soft weights over experts for every CLIP token (ToVE, eq. 3: logits of unused experts are -inf).

    Args:
        dim: Width of the CLIP tokens.
        num_experts: K.
        settings: Kind, noise and top-k.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        settings: GateSettings = GateSettings(),
    ) -> None:
        super().__init__()
        if settings.top_k is not None and settings.top_k > max(num_experts, 1):
            raise ConfigError(f"gate: top_k={settings.top_k} is outside 1..{num_experts}, the number of experts.")
        self.num_experts, self.kind, self.top_k = num_experts, settings.kind, settings.top_k
        self.noise, self.noise_std = settings.noise, settings.noise_std
        if self.kind == "uniform":
            return
        self.norm = nn.LayerNorm(dim)
        self.logits: nn.Module = nn.Linear(dim, num_experts)
        if settings.hidden is not None:
            first, last = nn.Linear(dim, settings.hidden), nn.Linear(settings.hidden, num_experts)
            self.logits = nn.Sequential(first, nn.GELU(), last)
        self.noise_width = nn.Linear(dim, num_experts) if self.noise == "learned" else None

    def forward(self, tokens_BTD: Tensor, attached: Sequence[bool]) -> GateOutput:
        """Gate CLIP tokens.

        Args:
            tokens_BTD: CLIP tokens.
            attached: Whether each expert is in use; at least one must be.

        Raises:
            ConfigError: No expert is attached (the caller should then pass CLIP's tokens on unchanged).
        """
        if not any(attached):
            raise ConfigError("TokenGate: no expert is attached, so there is nothing to weight; attach at least one.")
        attached_K = torch.as_tensor(attached).to(tokens_BTD.device, non_blocking=True)
        if self.kind == "uniform":
            share_K = attached_K.to(tokens_BTD.dtype) / sum(attached)
            return GateOutput(share_K.expand(*tokens_BTD.shape[:2], self.num_experts), attached_K)
        normed_BTD = self.norm(tokens_BTD.to(self.norm.weight.dtype))
        clean_BTK = self.logits(normed_BTD).masked_fill(~attached_K, -torch.inf)
        if not self.training or self.noise == "none":
            return GateOutput(self._softmax(clean_BTK), attached_K)
        std_BTK = self._noise_std(normed_BTD)
        noisy_BTK = clean_BTK + torch.randn_like(clean_BTK) * std_BTK
        load_BK = smooth_load(clean_BTK, noisy_BTK, std_BTK, attached_K, top_k=self.top_k or 1)
        return GateOutput(self._softmax(noisy_BTK), attached_K, load_BK)

    def column_keys(self) -> tuple[str, ...]:
        """Return the state-dict names of the tensors whose first axis runs over experts."""
        if self.kind == "uniform":
            return ()
        last = f"logits.{len(self.logits) - 1}" if isinstance(self.logits, nn.Sequential) else "logits"
        layers = (last,) if self.noise_width is None else (last, "noise_width")
        return tuple(f"{layer}.{name}" for layer in layers for name in ("weight", "bias"))

    @torch.no_grad()
    def keep(self, experts: Sequence[int]) -> None:
        """Drop the rows of all other experts for good.

        Args:
            experts: Columns to keep, in their new order; at least one.

        Raises:
            ConfigError: No column, or one that does not exist.
        """
        if not experts or not all(0 <= index < self.num_experts for index in experts):
            raise ConfigError(f"TokenGate: cannot keep {list(experts)}; give columns within 0..{self.num_experts - 1}.")
        self.num_experts = len(experts)
        self.top_k = None if self.top_k is None else min(self.top_k, self.num_experts)
        if self.kind == "uniform":
            return
        if isinstance(self.logits, nn.Sequential):
            self.logits[-1] = _rows(self.logits[-1], experts)
        else:
            self.logits = _rows(self.logits, experts)
        self.noise_width = None if self.noise_width is None else _rows(self.noise_width, experts)

    def _noise_std(self, normed_BTD: Tensor) -> Tensor:
        if self.noise_width is None:
            return normed_BTD.new_full((*normed_BTD.shape[:2], self.num_experts), self.noise_std)
        return nn.functional.softplus(self.noise_width(normed_BTD)) + 1e-2

    def _softmax(self, logits_BTK: Tensor) -> Tensor:
        if self.top_k is not None and self.top_k < self.num_experts:
            kept = logits_BTK.topk(self.top_k, dim=-1).indices
            outside = torch.ones_like(logits_BTK, dtype=torch.bool).scatter(-1, kept, value=False)
            logits_BTK = logits_BTK.masked_fill(outside, -torch.inf)
        return logits_BTK.softmax(-1)


def smooth_load(clean_BTK: Tensor, noisy_BTK: Tensor, std_BTK: Tensor, attached_K: Tensor, *, top_k: int = 1) -> Tensor:
    """Return the expected number of tokens that each expert would win if its own noise were redrawn.

    P(x, i) = Phi((clean_i - threshold_i) / std_i), summed over the tokens of an image, with the ``top_k``-th largest
    noisy logit of the others as the threshold (Shazeer et al. 2017, appendix A). If at most ``top_k`` experts are
    attached, each wins every token.

    Returns:
        (B, K), float32 or better, zero for detached experts.
    """
    full = torch.promote_types(clean_BTK.dtype, torch.float32)
    clean_BTK, noisy_BTK, std_BTK = clean_BTK.to(full), noisy_BTK.to(full), std_BTK.to(full)
    if len(attached_K) <= top_k:
        return attached_K.to(full).expand(len(clean_BTK), -1) * clean_BTK.shape[1]
    top = noisy_BTK.masked_fill(~attached_K, -torch.inf).topk(top_k + 1, dim=-1)
    is_winner = torch.zeros_like(noisy_BTK, dtype=torch.bool).scatter(-1, top.indices[..., :top_k], value=True)
    threshold_BTK = torch.where(is_winner, top.values[..., top_k:], top.values[..., top_k - 1 : top_k])
    alone_BTK = threshold_BTK == -torch.inf  # no more experts than winners: no competition
    clean_BTK = clean_BTK.masked_fill(~attached_K, 0.0)  # keeps -inf out of the gradient
    wins_BTK: Tensor = torch.special.ndtr((clean_BTK - threshold_BTK.masked_fill(alone_BTK, 0.0)) / std_BTK)
    return wins_BTK.masked_fill(alone_BTK, 1.0).masked_fill(~attached_K, 0.0).sum(1)


def _rows(linear: nn.Module, rows: Sequence[int]) -> nn.Linear:
    """Return a linear layer with some of the outputs of another."""
    assert isinstance(linear, nn.Linear)
    kept = nn.Linear(linear.in_features, len(rows), device=linear.weight.device, dtype=linear.weight.dtype)
    kept.weight.copy_(linear.weight[list(rows)])
    kept.bias.copy_(linear.bias[list(rows)])
    return kept


TransferMode = Literal["residual", "replacement"]


class ResidualTransfer(nn.Module):
    """t_fuse = t_clip + sum_k g_k P_k(e_k) (ToVE); CLIP's tokens stay intact.

    Args:
        mode: ``residual`` - the paper's; ``replacement`` - sum_k g_k P_k(e_k) without t_clip, a control that shows what
            the residual contributes (with one expert: that expert alone as the encoder).
    """

    def __init__(self, *, mode: TransferMode = "residual") -> None:
        super().__init__()
        if mode not in ("residual", "replacement"):
            raise ConfigError(f"ResidualTransfer: mode={mode!r} is unknown; use 'residual' or 'replacement'.")
        self.mode = mode

    def forward(
        self, clip_BTD: Tensor, adapted: Mapping[str, Tensor], gates_BTK: Tensor, names: Sequence[str]
    ) -> Tensor:
        """Fuse.

        Args:
            clip_BTD: Projected CLIP tokens.
            adapted: P_k(e_k), (B, T, D), of the attached experts by name.
            gates_BTK: Gates, columns in the order of ``names``.
            names: All experts, attached or not.
        """
        fused_BTD = clip_BTD if self.mode == "residual" else clip_BTD.new_zeros(())
        for column, name in enumerate(names):
            if name in adapted:
                fused_BTD = fused_BTD + gates_BTK[..., column : column + 1] * adapted[name]
        return fused_BTD

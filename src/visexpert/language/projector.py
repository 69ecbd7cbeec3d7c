"""Projector from CLIP tokens to the language width: t_clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.precision import like_weights

ProjectorKind = Literal["linear", "mlp2x_gelu", "identity"]


@dataclass(frozen=True, kw_only=True)
class ProjectorSettings:
    """Settings of the projector from CLIP tokens to the language width.

    Args:
        kind: ``linear``, ``mlp2x_gelu`` (LLaVA-1.5, MoVE-KD's paper) or ``identity`` for tokens that already fit.
        norm: LayerNorm before it (LLaVA has none; frozen encoders with different scales benefit).
    """

    kind: ProjectorKind = "linear"
    norm: bool = True


class Projector(nn.Module):
    """Maps vision tokens to the language width.

    Args:
        in_dim: Width of the vision tokens.
        out_dim: Language width.
        kind: ``linear``; ``mlp2x_gelu`` - LLaVA-1.5's; ``identity`` for tokens that already fit.
        norm: LayerNorm on the input (LLaVA has none; frozen encoders with different scales benefit).
    """

    def __init__(self, *, in_dim: int, out_dim: int, kind: ProjectorKind = "mlp2x_gelu", norm: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(in_dim) if norm else nn.Identity()
        if kind == "linear":
            self.layers: nn.Module = nn.Linear(in_dim, out_dim)
        elif kind == "mlp2x_gelu":
            self.layers = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))
        elif kind == "identity" and in_dim == out_dim:
            self.layers = nn.Identity()
        else:
            raise ConfigError(
                f"Projector: kind={kind!r} cannot map width {in_dim} to {out_dim}; use 'linear' or 'mlp2x_gelu' "
                "('identity' needs equal widths)."
            )

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Map tokens (B, T, in_dim) to (B, T, out_dim)."""
        projected: Tensor = self.layers(self.norm(like_weights(tokens_BTD, self)))
        return projected

"""Residual knowledge transfer: add expert knowledge to CLIP's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from visexpert.errors import ConfigError

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

"""What knowledge merging merges into, where that is more than a plain CLIP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from visexpert.errors import ConfigError
from visexpert.losses.balance import RouterBalanceForm
from visexpert.methods.seen import RouterBalance
from visexpert.optim import ParameterGroup
from visexpert.vision import ClipEncoder, MoLESettings, equipped_blocks


@dataclass(frozen=True)
class MergeStudent:
    """A student with MoLE: ToVE's knowledge goes into low-rank experts beside CLIP's own weights.

    Args:
        mole: The mixture that is put into CLIP's MLPs.
        mole_lr: Its peak learning rate; null is that of CLIP.
        balance_weight: Weight of the routers' balance loss (MoVE-KD's released code: 0.01). At 0 a router that learns
            from nothing else (``top1``, ``released``) stays as it was drawn.
        balance_form: ``pooled`` (released) or ``per_layer``.

    Raises:
        ConfigError: A weight or rate that cannot be, or an unknown form.
    """

    mole: MoLESettings = field(default_factory=MoLESettings)
    mole_lr: float | None = None
    balance_weight: float = 0.01
    balance_form: RouterBalanceForm = "pooled"

    def __post_init__(self) -> None:
        if self.balance_weight < 0 or (self.mole_lr is not None and self.mole_lr <= 0):
            raise ConfigError(
                f"MergeStudent: balance_weight={self.balance_weight} must not be negative, and mole_lr={self.mole_lr} "
                "must be above 0, or null for CLIP's."
            )
        if self.balance_form not in get_args(RouterBalanceForm):
            raise ConfigError(
                f"MergeStudent: balance_form={self.balance_form!r} is unknown; use one of "
                f"{', '.join(get_args(RouterBalanceForm))}."
            )

    def group(self, clip: ClipEncoder, *, lr: float) -> ParameterGroup:
        """What trains of MoLE, and at which rate.

        Args:
            clip: The student, MoLE in place.
            lr: Rate of CLIP.
        """
        balanced = self.balance_weight > 0
        parts = [part for mole in equipped_blocks(clip).values() for part in mole.learning_modules(balanced=balanced)]
        return ParameterGroup("mole", tuple(parts), lr if self.mole_lr is None else self.mole_lr)

    @property
    def router_balance(self) -> RouterBalance | None:
        """How its routers are balanced; None at a weight of 0."""
        return RouterBalance(self.balance_weight, self.balance_form) if self.balance_weight > 0 else None

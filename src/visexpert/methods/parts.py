"""Parts of a method with their roles, the tokens it stores, and which parts are in train mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

Role = Literal["student", "teachers", "transfer", "language"]

ROLES: tuple[Role, ...] = ("student", "teachers", "transfer", "language")
"""Student: CLIP with MoLE; teachers: frozen experts and copy of CLIP; transfer: adapters, heads, gate, projector."""


@dataclass(frozen=True)
class Part:
    """A part of a method.

    Args:
        name: Shown in the plan.
        role: Its role.
        modules: Its outermost modules.
    """

    name: str
    role: Role
    modules: tuple[nn.Module, ...]

    @classmethod
    def of(cls, name: str, role: Role, module: nn.Module) -> Part:
        """Return a part of one module, or of the children of a container, which is never called itself."""
        is_container = isinstance(module, nn.ModuleDict | nn.ModuleList)
        return cls(name, role, tuple(module.children()) if is_container else (module,))


@dataclass(frozen=True)
class StoredTokens:
    """Tokens of one image that a store keeps.

    Args:
        rows: Number of tokens.
        width: Numbers in each.
    """

    rows: int
    width: int


def settle_modes(module: nn.Module, trained: set[int]) -> None:
    """Put every module with parameters of which none trains into eval mode: no dropout, no noise.

    Modules that keep statistics of their inputs (``keeps_statistics``) stay in train mode.

    Args:
        module: In train mode; changed in place.
        trained: The ``id`` of each parameter that trains.
    """
    for child in module.children():
        own = {id(parameter) for parameter in child.parameters()}
        if not own:
            continue
        if own & trained or any(getattr(part, "keeps_statistics", False) for part in child.modules()):
            settle_modes(child, trained)
        else:
            child.eval()
            _keep_checkpointing(child)


def _keep_checkpointing(part: nn.Module) -> None:
    """Keep gradient checkpointing on in blocks in eval mode: transformers applies it in train mode only.

    The modules inside such a block stay in eval mode. Blocks with their own dropout are left out: it would be active.
    """
    for layer in part.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            own = [value for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)]
            layer.training = not any(own)

"""What a method is made of, in the words of a plan: parts with their roles, and tokens that a store keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

Role = Literal["student", "teachers", "transfer", "language"]

ROLES: tuple[Role, ...] = ("student", "teachers", "transfer", "language")
"""What a part is for: CLIP with MoLE; frozen experts and the frozen copy of CLIP; adapters, heads, gate, projector."""


@dataclass(frozen=True)
class Part:
    """A part of a method.

    Args:
        name: Shown in the plan.
        role: What it is for.
        modules: Where it begins; those of a part inside another come first in the list of parts.
    """

    name: str
    role: Role
    modules: tuple[nn.Module, ...]

    @classmethod
    def of(cls, name: str, role: Role, module: nn.Module) -> Part:
        """A part that is one module; of a container, which is never called itself, its children."""
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
    """Put every part that has parameters, none of which trains, into eval mode: no dropout, no noise.

    Parts that keep statistics of what they see (``keeps_statistics``) stay as they are, whatever trains in them.

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
    """Let blocks that save memory by computing activations anew do so: transformers does it in train mode alone.

    What is inside such a block stays in eval mode. A block with dropout of its own would drop, too, and is left out.
    """
    for layer in part.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            own = [value for name, value in vars(layer).items() if "drop" in name and isinstance(value, float)]
            layer.training = not any(own)

"""What a method is made of, in the words of a plan: parts with their roles, and tokens that a store keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

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

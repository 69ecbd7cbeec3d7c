"""What is asked of a model, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

Role = Literal["expert", "clip", "language"]
ROLES: tuple[Role, ...] = ("expert", "clip", "language")

Verdict = Literal["works", "differs", "refused", "error"]
"""``works`` - loads, and equals its own library wherever that can be asked; ``differs`` - loads, but does not;
``refused`` - one of our sentences; ``error`` - anything else that was raised."""

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference that passes for rounding, as a share of the largest value."""


@dataclass(frozen=True)
class Asked:
    """What a user asks to be tried.

    Args:
        model: Folder, Hugging Face id, or a name of timm or open_clip.
        weights: For a name: file, folder, Hugging Face id or tag; ``random`` for none. None for the name's own.
        image_size: Side in pixels; None for the model's own.
        layer: Which block's tokens; None for the role's default.
        dtype: Of a language model's weights.
    """

    model: str
    weights: str | None = None
    image_size: int | None = None
    layer: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class Comparison:
    """Our numbers held against those of the model's own library, on the same input.

    Args:
        what: What was compared.
        with_: Where the library computes the same.
        difference: Largest absolute difference.
        scale: Largest absolute value there.
        dtype: What was computed in.
    """

    what: str
    with_: str
    difference: float
    scale: float
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, what: str, with_: str, ours: Tensor, theirs: Tensor) -> Comparison:
        """Compare two tensors; other shapes or NaN differ without bound."""
        dtype = theirs.dtype
        if ours.shape != theirs.shape:
            return cls(f"{what} ({tuple(ours.shape)}, there {tuple(theirs.shape)})", with_, float("inf"), 0.0, dtype)
        difference = float((ours.float() - theirs.float()).abs().max())
        return cls(what, with_, difference, float(theirs.float().abs().max()), dtype)

    @property
    def equal(self) -> bool:
        """Whether the difference is rounding; NaN is not, and zeros that equal zeros say nothing."""
        return self.scale > 0 and self.difference <= TOLERANCE.get(self.dtype, 1e-4) * self.scale

    def __str__(self) -> str:
        return f"{self.what} from {self.with_}: {self.difference:.2g}, where the largest value is {self.scale:.2g}"


@dataclass(frozen=True)
class Attempt:
    """What came of one class in one role.

    Args:
        role: The role.
        name: The class; empty where none was found.
        verdict: See :data:`Verdict`.
        message: Why not; empty where it works.
        facts: What a user wants to know of it, by name.
        comparisons: With the model's own library.
        settings: ``class_path`` and ``init_args`` for a configuration.
    """

    role: Role
    name: str
    verdict: Verdict
    message: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether it can be used."""
        return self.verdict == "works"

    def yaml(self, model: str) -> str:
        """The lines of a configuration that use it."""
        place: dict[str, Any] = {self.role: dict(self.settings)}
        if self.role == "expert":
            place = {"experts": {slug(model): dict(self.settings)}}
        return yaml.safe_dump({"model": {"init_args": place}}, sort_keys=False, width=1000)


def slug(model: str) -> str:
    """A name for an expert, from that of its model."""
    last = Path(model.rstrip("/").split(":")[-1]).name.partition("@")[0]
    return re.sub(r"\W+", "_", last).strip("_").lower() or "expert"

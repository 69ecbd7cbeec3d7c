"""What to try, and the result of each attempt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

Role = Literal["expert", "encoder", "language"]
ROLES: tuple[Role, ...] = ("expert", "encoder", "language")

Verdict = Literal["works", "differs", "refused", "error"]
"""``works``: loads, and equals its own library wherever the two can be compared; ``differs``: loads, but does not equal
it; ``refused``: raised one of our own errors; ``error``: raised any other."""

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference that counts as rounding, relative to the largest value."""


@dataclass(frozen=True)
class Request:
    """A model to try, and how.

    Args:
        model: Folder, Hugging Face id, or a name of timm or open_clip.
        weights: Weights for a named network: file, folder, Hugging Face id, tag, or ``random``; None for its default.
        image_size: Side in pixels; None for the model's default.
        layer: Block whose tokens are taken; None for the role's default.
        dtype: Data type of a language model's weights.
    """

    model: str
    weights: str | None = None
    image_size: int | None = None
    layer: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class Comparison:
    """Difference between our output and that of the model's own library, on the same input.

    Args:
        what: What was compared.
        reference: Where the library computes it.
        difference: Largest absolute difference between the two.
        scale: Largest absolute value of the library's.
        dtype: Data type of the library's output.
    """

    what: str
    reference: str
    difference: float
    scale: float
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, what: str, reference: str, ours: Tensor, theirs: Tensor) -> Comparison:
        """Compare two tensors; the difference is infinite where shapes differ, and NaN where one holds NaN."""
        dtype = theirs.dtype
        if ours.shape != theirs.shape:
            return cls(
                f"{what} ({tuple(ours.shape)}, the library's {tuple(theirs.shape)})",
                reference,
                float("inf"),
                0.0,
                dtype,
            )
        difference = float((ours.float() - theirs.float()).abs().max())
        return cls(what, reference, difference, float(theirs.float().abs().max()), dtype)

    @property
    def equal(self) -> bool:
        """Whether the difference is rounding: false for NaN, and for outputs that are all zero, which prove nothing."""
        return self.scale > 0 and self.difference <= TOLERANCE.get(self.dtype, 1e-4) * self.scale

    def __str__(self) -> str:
        return f"{self.what} from {self.reference}: {self.difference:.2g}, where the largest value is {self.scale:.2g}"


@dataclass(frozen=True)
class Attempt:
    """Result of trying one class in one role.

    Args:
        role: Role that was tried.
        name: Name of the class; empty if none fits.
        verdict: See :data:`Verdict`.
        message: Why it does not work; empty if it does.
        facts: Properties to show, by name.
        comparisons: Comparisons with the model's own library.
        settings: ``class_path`` and ``init_args`` for a configuration file.
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
        """Whether the model can be used in this role."""
        return self.verdict == "works"

    def yaml(self, model: str) -> str:
        """Return the lines of a configuration that use the model."""
        place: dict[str, Any] = {"clip" if self.role == "encoder" else self.role: dict(self.settings)}
        if self.role == "expert":
            place = {"experts": {slug(model): dict(self.settings)}}
        return yaml.safe_dump({"model": {"init_args": place}}, sort_keys=False, width=1000)


def slug(model: str) -> str:
    """Return a name for an expert, made from the name of its model."""
    last = Path(model.rstrip("/").split(":")[-1]).name.partition("@")[0]
    return re.sub(r"\W+", "_", last).strip("_").lower() or "expert"

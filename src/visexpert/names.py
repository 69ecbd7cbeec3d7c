"""Names of encoders: those that are our own, and under which name and role a store keeps whose tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

CLIP = "clip"
"""The frozen CLIP: among teachers, in logs, in a store."""

STUDENT = "student"
"""The student beside its teachers, in logs."""

WEIGHED = ("teachers", "tokens")
"""What has weights whose entropy is logged, beside the variances of single encoders."""

RESERVED = (CLIP, STUDENT, *WEIGHED)
"""Names that no expert may have."""

Role = Literal["expert", "teacher", "clip"]
"""Whose tokens a store keeps: those of an expert of a hub; what a student is drawn to, be it the frozen CLIP with its
[CLS] attention or a whole ToVE; those of the CLIP that a method builds on."""


class EncoderName(NamedTuple):
    """Whose tokens a store keeps.

    Args:
        role: What the encoder is to the run. Encoders of one name and different roles are different encoders.
        name: Its name in that role.
    """

    role: Role
    name: str

    def __str__(self) -> str:
        if self.name == CLIP:  # of whatever family
            return "encoder" if self.role == CLIP else "frozen encoder"
        return f"{self.role} {self.name}"


def reserved_among(names: Iterable[str]) -> list[str]:
    """Those that no expert may have, in their order."""
    return [name for name in names if name in RESERVED]

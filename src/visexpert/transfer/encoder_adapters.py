"""Distillation heads by config name: encoder adapters, heads on the student, fixed maps (MoVE-KD)."""

from __future__ import annotations

from typing import Literal, Protocol

from visexpert.errors import ConfigError
from visexpert.transfer.kd_heads import (
    AdapterKind,
    FixedHead,
    KDHead,
    KDPair,
    KDSizes,
    RawHead,
    ReleasedAdapter,
    Standardize,
    ToStudentHead,
    ToTeacherHead,
)

__all__ = [
    "AdapterKind",
    "Alignment",
    "FixedHead",
    "KDHead",
    "KDPair",
    "KDSizes",
    "RawHead",
    "ReleasedAdapter",
    "Standardize",
    "Teacher",
    "ToStudentHead",
    "ToTeacherHead",
    "make_kd_head",
]

Alignment = Literal["raw", "to_student", "to_teacher", "fixed"]

_ADAPTERS: dict[Alignment, tuple[AdapterKind, ...]] = {
    "raw": (),
    "to_student": ("released", "linear", "mlp"),
    "to_teacher": ("mlp", "linear"),
    "fixed": (),
}
"""Adapters that each alignment can train, the default first."""


class Teacher(Protocol):
    """What a head needs to know about a teacher; every ``VisionExpert`` provides it."""

    @property
    def token_dim(self) -> int:
        """Width E of its tokens."""

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Their grid."""


def make_kd_head(
    name: str,
    teacher: Teacher,
    *,
    clip_width: int,
    clip_grid: tuple[int, int],
    alignment: Alignment = "to_student",
    adapter: AdapterKind | None = None,
    hidden_dim: int | None = None,
    seed: int = 0,
) -> KDHead:
    """Build the head for one teacher from config values.

    Args:
        name: The teacher's name.
        teacher: Its sizes.
        clip_width: Width of the student's tokens.
        clip_grid: Their grid.
        alignment: ``raw``, ``to_student``, ``to_teacher`` or ``fixed``.
        adapter: Part to train: ``released`` (to_student only, its default), ``linear`` or ``mlp`` (the default of
            to_teacher); null for none.
        hidden_dim: Hidden width of ``mlp``; default ``clip_width``.
        seed: Seed of the ``fixed`` map.

    Raises:
        ConfigError: An unknown value, values that exclude one another, or sizes that do not match.
    """
    kind = _adapter_kind(name, alignment, adapter, hidden_dim)
    sizes = KDSizes(name, teacher.token_dim, teacher.grid_hw, clip_width, clip_grid)
    if alignment == "raw":
        return RawHead(sizes)
    if alignment == "fixed":
        return FixedHead(sizes, seed=seed)
    head = ToStudentHead if alignment == "to_student" else ToTeacherHead
    return head(sizes, kind=kind or "mlp", hidden_dim=hidden_dim)


def _adapter_kind(
    name: str, alignment: Alignment, adapter: AdapterKind | None, hidden_dim: int | None
) -> AdapterKind | None:
    """Return the adapter kind: the one requested, or the alignment's default; None if it trains nothing."""
    if alignment not in _ADAPTERS:
        raise ConfigError(f"Teacher {name!r}: alignment={alignment!r} is unknown; use one of {', '.join(_ADAPTERS)}.")
    allowed = _ADAPTERS[alignment]
    if adapter is not None and adapter not in allowed:
        choice = f"use one of {', '.join(allowed)}" if allowed else "leave adapter out"
        raise ConfigError(f"Teacher {name!r}: alignment={alignment!r} has no adapter={adapter!r}; {choice}.")
    kind = adapter or next(iter(allowed), None)
    if hidden_dim is not None and kind != "mlp":
        raise ConfigError(
            f"Teacher {name!r}: hidden_dim={hidden_dim} needs adapter='mlp'; set adapter, or leave hidden_dim out."
        )
    return kind

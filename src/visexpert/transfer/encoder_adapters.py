"""Heads of distillation by the words of a config: encoder adapters, heads on the student, fixed maps (MoVE-KD)."""

from __future__ import annotations

from typing import Literal, Protocol

from visexpert.errors import ConfigError
from visexpert.transfer.kd_heads import (
    FixedHead,
    KDHead,
    KDPair,
    KDSizes,
    RawHead,
    ToStudentHead,
    ToTeacherHead,
)
from visexpert.transfer.kd_maps import AdapterKind, ReleasedAdapter, Standardise

__all__ = [
    "AdapterKind",
    "Alignment",
    "FixedHead",
    "KDHead",
    "KDPair",
    "KDSizes",
    "RawHead",
    "ReleasedAdapter",
    "Standardise",
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
"""What each alignment can train, its default first."""


class Teacher(Protocol):
    """What a head must know of a teacher; every ``VisionExpert`` says it."""

    @property
    def token_dim(self) -> int:
        """Width of its tokens."""

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
    """The head for one teacher, by the words of a config.

    Args:
        name: The teacher's name.
        teacher: Its sizes.
        clip_width: Width of the student's tokens.
        clip_grid: Their grid.
        alignment: ``raw``, ``to_student``, ``to_teacher`` or ``fixed``.
        adapter: What is trained: ``released`` (only to_student, its default), ``linear`` or ``mlp`` (the default of
            to_teacher); null where nothing is.
        hidden_dim: Hidden width of ``mlp``; default ``clip_width``.
        seed: Of the map of ``fixed``.

    Raises:
        ConfigError: An unknown word, words that do not go together, or sizes that cannot fit.
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
    """What is trained: as asked for, or the first that the alignment has; None where nothing is."""
    if alignment not in _ADAPTERS:
        raise ConfigError(f"Teacher {name!r}: alignment={alignment!r} is unknown; use one of {', '.join(_ADAPTERS)}.")
    allowed = _ADAPTERS[alignment]
    if adapter is not None and adapter not in allowed:
        choice = f"use one of {', '.join(allowed)}" if allowed else "leave adapter out"
        raise ConfigError(f"Teacher {name!r}: alignment={alignment!r} has no adapter={adapter!r}; {choice}.")
    kind = adapter or next(iter(allowed), None)
    if hidden_dim is not None and kind != "mlp":
        raise ConfigError(f"Teacher {name!r}: hidden_dim={hidden_dim} needs adapter='mlp'; set that or leave it out.")
    return kind

"""Heads that pair a student's tokens with a teacher's, by alignment: raw, to the student, to the teacher, fixed."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.grids import resample_tokens
from visexpert.precision import like_weights
from visexpert.transfer.standardize import Standardization, make_standardization
from visexpert.types import ExpertTokens

AdapterKind = Literal["released", "linear", "mlp"]
Alignment = Literal["raw", "to_student", "to_teacher", "fixed"]

_ADAPTERS: dict[Alignment, tuple[AdapterKind, ...]] = {
    "raw": (),
    "to_student": ("released", "linear", "mlp"),
    "to_teacher": ("mlp", "linear"),
    "fixed": (),
}
"""Adapters that each alignment can train, the default first."""


class ReleasedAdapter(nn.Module):
    """MoVE-KD's encoder adapter: linear over channels, exact GELU, linear over the token axis.

    It is tied to the teacher's grid; the second layer must learn the spatial layout.

    Args:
        in_dim: Width E of the teacher's tokens.
        in_tokens: Their number S.
        out_dim: Width D of the student's tokens.
        out_tokens: Their number T.
    """

    def __init__(self, *, in_dim: int, in_tokens: int, out_dim: int, out_tokens: int) -> None:
        super().__init__()
        self.channels = nn.Linear(in_dim, out_dim)
        self.tokens = nn.Linear(in_tokens, out_tokens)

    def forward(self, tokens_BSE: Tensor) -> Tensor:
        """Map tokens (B, S, E) to (B, T, D)."""
        mapped_BDT: Tensor = self.tokens(F.gelu(self.channels(like_weights(tokens_BSE, self)).transpose(1, 2)))
        return mapped_BDT.transpose(1, 2)


def token_map(kind: str, in_dim: int, out_dim: int, hidden_dim: int | None) -> nn.Module:
    """Build a per-token map: ``linear``, or LayerNorm and two layers (hidden width ``out_dim`` by default)."""
    if kind == "linear":
        return nn.Linear(in_dim, out_dim)
    hidden = hidden_dim or out_dim
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, out_dim))


@dataclass(frozen=True)
class KDPair:
    """A prediction and its target; gradients flow into whichever has a graph.

    Args:
        prediction_BTX: Computed from the student's tokens.
        target_BTX: Computed from the teacher's tokens, with the same shape.
    """

    prediction_BTX: Tensor
    target_BTX: Tensor


@dataclass(frozen=True)
class KDSizes:
    """Sizes that a head is built for.

    Args:
        name: The teacher's name, for messages.
        token_dim: Width E of the teacher's tokens.
        token_grid: Their grid, height x width = S.
        clip_width: Width D of the student's tokens.
        clip_grid: Their grid, height x width = T.
    """

    name: str
    token_dim: int
    token_grid: tuple[int, int]
    clip_width: int
    clip_grid: tuple[int, int]


class KDHead(nn.Module, ABC):
    """Maps a student and one teacher into one space: T tokens of width X.

    Args:
        sizes: Sizes of teacher and student.
    """

    def __init__(self, sizes: KDSizes) -> None:
        super().__init__()
        self.sizes = sizes

    sets_scale = False
    """Whether the student's own tokens are pulled towards targets with a fixed scale, which nothing trains."""

    @property
    def width(self) -> int:
        """Width X of prediction and target."""
        return self.sizes.clip_width

    @abstractmethod
    def pair(self, student_BTD: Tensor, teacher: ExpertTokens) -> KDPair:
        """Pair tokens whose shapes :meth:`forward` has checked."""

    def forward(self, student_BTD: Tensor, teacher: ExpertTokens) -> KDPair:
        """Pair student tokens (B, T, D) with teacher tokens (B, S, E).

        Args:
            student_BTD: Patch tokens of the student.
            teacher: Tokens of the teacher on the grid that the head was built for.

        Raises:
            ConfigError: Sizes other than those the head was built for.
        """
        self._check(student_BTD, teacher)
        return self.pair(student_BTD, teacher)

    def resampled(self, teacher: ExpertTokens) -> Tensor:
        """Return the teacher's tokens (B, T, E) on the student's grid, without a graph."""
        tokens_BSE = teacher.tokens_BSE.detach()
        if self.sizes.token_grid == self.sizes.clip_grid:
            return tokens_BSE
        return resample_tokens(tokens_BSE, self.sizes.token_grid, self.sizes.clip_grid)

    def _check(self, student_BTD: Tensor, teacher: ExpertTokens) -> None:
        sizes = self.sizes
        found = (teacher.tokens_BSE.shape[1:], teacher.grid_hw, student_BTD.shape[1:])
        teacher_shape = (math.prod(sizes.token_grid), sizes.token_dim)
        student_shape = (math.prod(sizes.clip_grid), sizes.clip_width)
        if found != (teacher_shape, sizes.token_grid, student_shape):
            raise ConfigError(
                f"The KD head of teacher {sizes.name!r} got teacher tokens {tuple(found[0])} on grid {found[1]} and "
                f"student tokens {tuple(found[2])}, but was built for {teacher_shape} on {sizes.token_grid} and "
                f"{student_shape}; build it for this teacher and this CLIP."
            )


class RawHead(KDHead):
    """Compares the student's tokens with the teacher's own, as for MoVE-KD's CLIP teacher. No parameters.

    Raises:
        ConfigError: Teacher and student differ in width.
    """

    def __init__(self, sizes: KDSizes) -> None:
        super().__init__(sizes)
        if sizes.token_dim != sizes.clip_width:
            raise ConfigError(
                f"Teacher {sizes.name!r} has tokens of width {sizes.token_dim}, the student of {sizes.clip_width}, so "
                "they cannot be compared raw; use alignment to_student, to_teacher or fixed."
            )

    def pair(self, student_BTD: Tensor, teacher: ExpertTokens) -> KDPair:
        """Return the teacher's tokens, resampled if the grids differ."""
        return KDPair(student_BTD, self.resampled(teacher))


class ToStudentHead(KDHead):
    """The paper's alignment: an adapter, trained with the student, maps the teacher's tokens into its space.

    Both sides get gradients, so the adapter may learn to predict the student instead of teaching it; monitor
    ``visexpert.losses.across_image_variance`` of both.

    Args:
        sizes: Sizes of teacher and student.
        kind: ``released`` - :class:`ReleasedAdapter`; ``linear``, ``mlp`` - resampled to the student's grid, then
            mapped token by token.
        hidden_dim: Hidden width of ``mlp``; default D.
    """

    def __init__(self, sizes: KDSizes, *, kind: AdapterKind = "released", hidden_dim: int | None = None) -> None:
        super().__init__(sizes)
        self.adapter: nn.Module
        if kind == "released":
            self.adapter = ReleasedAdapter(
                in_dim=sizes.token_dim,
                in_tokens=math.prod(sizes.token_grid),
                out_dim=sizes.clip_width,
                out_tokens=math.prod(sizes.clip_grid),
            )
        else:
            self.adapter = token_map(kind, sizes.token_dim, sizes.clip_width, hidden_dim)
        self.kind = kind

    def pair(self, student_BTD: Tensor, teacher: ExpertTokens) -> KDPair:
        """Return the student's tokens as they are, the teacher's adapted."""
        tokens = teacher.tokens_BSE.detach() if self.kind == "released" else self.resampled(teacher)
        return KDPair(student_BTD, self.adapter(like_weights(tokens, self.adapter)))


class ToTeacherHead(KDHead):
    """A head on the student predicts the standardized tokens of the teacher, as agglomerative encoders do.

    The target has no graph, so nothing can shrink it; the student gets its gradient through the head.

    Args:
        sizes: Sizes of teacher and student.
        kind: ``linear`` or ``mlp``.
        hidden_dim: Hidden width of ``mlp``; default D.
        standardize: ``channel`` or ``phi_s``.
    """

    def __init__(
        self,
        sizes: KDSizes,
        *,
        kind: AdapterKind = "mlp",
        hidden_dim: int | None = None,
        standardize: Standardization = "channel",
    ) -> None:
        super().__init__(sizes)
        self.standardize = make_standardization(standardize, sizes.token_dim)
        self.head = token_map(kind, sizes.clip_width, sizes.token_dim, hidden_dim or sizes.clip_width)

    @property
    def width(self) -> int:
        """Width of the teacher's tokens."""
        return self.sizes.token_dim

    def pair(self, student_BTD: Tensor, teacher: ExpertTokens) -> KDPair:
        """Return the head's prediction (B, T, E), the teacher's tokens standardized."""
        target_BTE = self.standardize(self.resampled(teacher))
        return KDPair(self.head(like_weights(student_BTD, self.head)), target_BTE)


class FixedHead(KDHead):
    """Maps the teacher's standardized tokens into the student's width with a fixed orthogonal map.

    The map has orthonormal rows for E <= D (distances are preserved) and orthonormal columns for E > D. It is drawn
    from the seed and the teacher's name, so teachers of the same width get different maps in any order. No parameters.

    Args:
        sizes: Sizes of teacher and student.
        seed: Seed of the map.
        standardize: ``channel`` or ``phi_s``.
    """

    sets_scale = True
    map_ED: Tensor

    def __init__(self, sizes: KDSizes, *, seed: int = 0, standardize: Standardization = "channel") -> None:
        super().__init__(sizes)
        self.standardize = make_standardization(standardize, sizes.token_dim)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {sizes.name}".encode()))
        empty_ED = torch.empty(sizes.token_dim, sizes.clip_width, device="cpu")
        self.register_buffer("map_ED", nn.init.orthogonal_(empty_ED, generator=generator))

    def pair(self, student_BTD: Tensor, teacher: ExpertTokens) -> KDPair:
        """Return the student's tokens as they are, the teacher's standardized and rotated."""
        return KDPair(student_BTD, self.standardize(self.resampled(teacher)) @ self.map_ED.to(torch.float32))


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
    standardize: Standardization = "channel",
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
        standardize: How ``to_teacher`` and ``fixed`` standardize the teacher's tokens: ``channel``
            (:class:`~visexpert.transfer.standardize.Standardize`) or ``phi_s``
            (:class:`~visexpert.transfer.standardize.PhiS`).

    Raises:
        ConfigError: An unknown value, values that exclude one another, or sizes that do not match.
    """
    kind = _adapter_kind(name, alignment, adapter, hidden_dim)
    sizes = KDSizes(name, teacher.token_dim, teacher.grid_hw, clip_width, clip_grid)
    if standardize != "channel" and alignment not in ("fixed", "to_teacher"):
        raise ConfigError(
            f"Teacher {name!r}: alignment={alignment!r} standardizes no teacher, so standardize={standardize!r} has no "
            "effect; use to_teacher or fixed, or leave it out."
        )
    if alignment == "raw":
        return RawHead(sizes)
    if alignment == "fixed":
        return FixedHead(sizes, seed=seed, standardize=standardize)
    if alignment == "to_student":
        return ToStudentHead(sizes, kind=kind or "mlp", hidden_dim=hidden_dim)
    return ToTeacherHead(sizes, kind=kind or "mlp", hidden_dim=hidden_dim, standardize=standardize)


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

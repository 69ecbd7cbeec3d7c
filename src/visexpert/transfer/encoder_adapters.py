"""Where student and teacher tokens meet for distillation: encoder adapters, heads and fixed maps (MoVE-KD)."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError, DataError
from visexpert.grids import resample_tokens
from visexpert.types import ExpertTokens

Direction = Literal["raw", "to_student", "to_teacher", "fixed"]
AdapterKind = Literal["released", "linear", "mlp"]


_ADAPTERS: dict[Direction, tuple[AdapterKind, ...]] = {
    "raw": (),
    "to_student": ("released", "linear", "mlp"),
    "to_teacher": ("mlp", "linear"),
    "fixed": (),
}
"""What each direction can train, its default first."""


class Teacher(Protocol):
    """What a head must know of a teacher; every ``VisionExpert`` says it."""

    token_dim: int
    grid_hw: tuple[int, int]


@dataclass(frozen=True)
class KDPair:
    """What distillation compares; gradient flows into whatever has a graph.

    Args:
        prediction_BTX: Made from the student's tokens.
        target_BTX: Made from the teacher's, of the same shape.
    """

    prediction_BTX: Tensor
    target_BTX: Tensor


@dataclass(frozen=True)
class KDSizes:
    """What a head is built for.

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
    """Brings a student and one teacher into one space, T tokens of some width X.

    Args:
        sizes: Of teacher and student.
    """

    def __init__(self, sizes: KDSizes) -> None:
        super().__init__()
        self.sizes = sizes

    @abstractmethod
    def pair(self, student_BTD: Tensor, teacher: ExpertTokens, has_image_B: Tensor | None) -> KDPair:
        """:meth:`forward` on tokens that were checked."""

    def forward(self, student_BTD: Tensor, teacher: ExpertTokens, has_image_B: Tensor | None = None) -> KDPair:
        """Pair student tokens (B, T, D) with teacher tokens (B, S, E).

        Args:
            student_BTD: Patch tokens of the student.
            teacher: Tokens of the teacher, on the grid that the head was built for.
            has_image_B: bool; samples without an image leave statistics of the teacher alone. None: all have one.

        Raises:
            ConfigError: Sizes other than the head was built for.
            DataError: The teacher's tokens are not finite. Also where they would be masked: 0 x NaN is NaN in the
                gradient of an adapter.
        """
        self._check(student_BTD, teacher)
        return self.pair(student_BTD, teacher, has_image_B)

    def resampled(self, teacher: ExpertTokens) -> Tensor:
        """The teacher's tokens (B, T, E) on the student's grid, without a graph."""
        return resample_tokens(teacher.tokens_BSE.detach(), teacher.grid_hw, self.sizes.clip_grid)

    def _check(self, student_BTD: Tensor, teacher: ExpertTokens) -> None:
        sizes, tokens_BSE = self.sizes, teacher.tokens_BSE
        found = (tokens_BSE.shape[1:], teacher.grid_hw, student_BTD.shape[1:])
        teacher_shape = (math.prod(sizes.token_grid), sizes.token_dim)
        student_shape = (math.prod(sizes.clip_grid), sizes.clip_width)
        if found != (teacher_shape, sizes.token_grid, student_shape):
            raise ConfigError(
                f"The KD head of teacher {sizes.name!r} got teacher tokens {tuple(found[0])} on grid {found[1]} and "
                f"student tokens {tuple(found[2])}, but was built for {teacher_shape} on {sizes.token_grid} and "
                f"{student_shape}; build it for this teacher and this CLIP."
            )
        # One sum instead of a mask of the tokens' size: any NaN or infinity stays in it.
        if not bool(tokens_BSE.detach().sum(dtype=torch.float32).isfinite()):
            raise DataError(
                f"Teacher {sizes.name!r} gave tokens that are NaN or infinite; look at its weights, its images and its "
                "precision (bfloat16 or float32 instead of float16)."
            )


class RawHead(KDHead):
    """The student's tokens against the teacher's own, as for MoVE-KD's CLIP teacher. No parameters.

    Raises:
        ConfigError: The teacher has another width than the student.
    """

    def __init__(self, sizes: KDSizes) -> None:
        super().__init__(sizes)
        if sizes.token_dim != sizes.clip_width:
            raise ConfigError(
                f"Teacher {sizes.name!r} has tokens of width {sizes.token_dim}, the student of {sizes.clip_width}, so "
                "they cannot be compared raw; use direction to_student, to_teacher or fixed."
            )

    def pair(self, student_BTD: Tensor, teacher: ExpertTokens, has_image_B: Tensor | None) -> KDPair:
        """Teacher tokens resampled where the grids differ."""
        return KDPair(student_BTD, self.resampled(teacher))


class ToStudentHead(KDHead):
    """The papers' direction: an adapter maps the teacher's tokens into the student's space, trained with it.

    Both sides get gradient, so the adapter may learn to predict the student instead of teaching it; watch
    ``visexpert.losses.across_image_variance`` of both.

    Args:
        sizes: Of teacher and student.
        kind: ``released`` - :class:`ReleasedAdapter`; ``linear``, ``mlp`` - resampled to the student's grid, then that
            map on each token.
        hidden_dim: Hidden width of ``mlp``; default D.
    """

    def __init__(self, sizes: KDSizes, *, kind: AdapterKind = "released", hidden_dim: int | None = None) -> None:
        super().__init__(sizes)
        self.adapter: nn.Module
        if kind == "released":
            self.adapter = ReleasedAdapter(
                in_dim=sizes.token_dim, in_tokens=math.prod(sizes.token_grid),
                out_dim=sizes.clip_width, out_tokens=math.prod(sizes.clip_grid),
            )  # fmt: skip
        else:
            self.adapter = _token_map(kind, sizes.token_dim, sizes.clip_width, hidden_dim)
        self.kind = kind

    def pair(self, student_BTD: Tensor, teacher: ExpertTokens, has_image_B: Tensor | None) -> KDPair:
        """The student's tokens as they are, the teacher's adapted."""
        tokens = teacher.tokens_BSE.detach() if self.kind == "released" else self.resampled(teacher)
        return KDPair(student_BTD, self.adapter(tokens))


class ToTeacherHead(KDHead):
    """A head on the student predicts the standardised tokens of the teacher, as agglomerative encoders do.

    The target has no graph: nothing can shrink it, and the student gets gradient through the head.

    Args:
        sizes: Of teacher and student.
        kind: ``linear`` or ``mlp``.
        hidden_dim: Hidden width of ``mlp``; default D.
    """

    def __init__(self, sizes: KDSizes, *, kind: AdapterKind = "mlp", hidden_dim: int | None = None) -> None:
        super().__init__(sizes)
        self.standardise = Standardise(sizes.token_dim)
        self.head = _token_map(kind, sizes.clip_width, sizes.token_dim, hidden_dim or sizes.clip_width)

    def pair(self, student_BTD: Tensor, teacher: ExpertTokens, has_image_B: Tensor | None) -> KDPair:
        """The head's prediction (B, T, E), the teacher's tokens standardised."""
        return KDPair(self.head(student_BTD), self.standardise(self.resampled(teacher), has_image_B))


class FixedHead(KDHead):
    """The standardised tokens of the teacher, carried into the student's width by a fixed orthogonal map.

    The map has orthonormal rows for E <= D (distances stay) and orthonormal columns for E > D. It is drawn from the
    seed and the teacher's name, so teachers of one width get unlike maps, whatever their order. No parameters.

    Args:
        sizes: Of teacher and student.
        seed: Of the map.
    """

    map_ED: Tensor

    def __init__(self, sizes: KDSizes, *, seed: int = 0) -> None:
        super().__init__(sizes)
        self.standardise = Standardise(sizes.token_dim)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {sizes.name}".encode()))
        empty_ED = torch.empty(sizes.token_dim, sizes.clip_width, device="cpu")
        self.register_buffer("map_ED", nn.init.orthogonal_(empty_ED, generator=generator))

    def pair(self, student_BTD: Tensor, teacher: ExpertTokens, has_image_B: Tensor | None) -> KDPair:
        """The student's tokens as they are, the teacher's standardised and turned."""
        return KDPair(student_BTD, self.standardise(self.resampled(teacher), has_image_B) @ self.map_ED)


class ReleasedAdapter(nn.Module):
    """MoVE-KD's encoder adapter: linear over channels, exact GELU, linear over the token axis.

    It is tied to the teacher's grid; spatial layout must be learned by the second layer.

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
        mapped_BDT: Tensor = self.tokens(F.gelu(self.channels(tokens_BSE).transpose(1, 2)))
        return mapped_BDT.transpose(1, 2)


class Standardise(nn.Module):
    """Tokens to zero mean and unit variance per channel, by statistics over all tokens seen in training.

    Statistics are cumulative (each batch counts alike) instead of per batch or per token, so that an image's target
    does not depend on its batch and settles with time. They travel in the checkpoint; DDP takes those of rank 0.
    Evaluated before any training, the batch's own are used.

    Args:
        dim: Number of channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(dim, affine=False, momentum=None)

    def forward(self, tokens_BTE: Tensor, has_image_B: Tensor | None = None) -> Tensor:
        """Standardise (B, T, E); in training, learn the statistics of samples with an image first. No graph."""
        statistics = self.statistics
        assert statistics.running_mean is not None and statistics.running_var is not None
        tokens_BTE = tokens_BTE.detach().to(statistics.running_mean.dtype)
        seen_BTE = tokens_BTE if has_image_B is None else tokens_BTE[has_image_B]
        if seen_BTE.numel() == 0:
            return torch.zeros_like(tokens_BTE)
        if self.training:
            statistics(seen_BTE.flatten(0, 1))
        mean_E, var_E = statistics.running_mean, statistics.running_var
        if not self.training and not statistics.num_batches_tracked:
            var_E, mean_E = torch.var_mean(seen_BTE, dim=(0, 1))
        return F.batch_norm(tokens_BTE.flatten(0, 1), mean_E, var_E, eps=statistics.eps).view_as(tokens_BTE)


def make_kd_head(
    name: str,
    teacher: Teacher,
    *,
    clip_width: int,
    clip_grid: tuple[int, int],
    direction: Direction = "to_student",
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
        direction: ``raw``, ``to_student``, ``to_teacher`` or ``fixed``.
        adapter: What is trained: ``released`` (only to_student, its default), ``linear`` or ``mlp`` (the default of
            to_teacher); null where nothing is.
        hidden_dim: Hidden width of ``mlp``; default ``clip_width``.
        seed: Of the map of ``fixed``.

    Raises:
        ConfigError: An unknown word, words that do not go together, or sizes that cannot fit.
    """
    kind = _adapter_kind(name, direction, adapter, hidden_dim)
    sizes = KDSizes(name, teacher.token_dim, teacher.grid_hw, clip_width, clip_grid)
    if direction == "raw":
        return RawHead(sizes)
    if direction == "fixed":
        return FixedHead(sizes, seed=seed)
    head = ToStudentHead if direction == "to_student" else ToTeacherHead
    return head(sizes, kind=kind or "mlp", hidden_dim=hidden_dim)


def _adapter_kind(
    name: str, direction: Direction, adapter: AdapterKind | None, hidden_dim: int | None
) -> AdapterKind | None:
    """What is trained: as asked for, or the first that the direction has; None where nothing is."""
    if direction not in _ADAPTERS:
        raise ConfigError(f"Teacher {name!r}: direction={direction!r} is unknown; use one of {', '.join(_ADAPTERS)}.")
    allowed = _ADAPTERS[direction]
    if adapter is not None and adapter not in allowed:
        choice = f"use one of {', '.join(allowed)}" if allowed else "leave adapter out"
        raise ConfigError(f"Teacher {name!r}: direction={direction!r} has no adapter={adapter!r}; {choice}.")
    kind = adapter or next(iter(allowed), None)
    if hidden_dim is not None and kind != "mlp":
        raise ConfigError(f"Teacher {name!r}: hidden_dim={hidden_dim} needs adapter='mlp'; set that or leave it out.")
    return kind


def _token_map(kind: str, in_dim: int, out_dim: int, hidden_dim: int | None) -> nn.Module:
    """A map of each token on its own."""
    if kind == "linear":
        return nn.Linear(in_dim, out_dim)
    hidden = hidden_dim or out_dim
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, out_dim))

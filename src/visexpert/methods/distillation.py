"""Several teachers into one student: what each head compares, how teachers and tokens are weighed, what to watch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.losses import across_image_variance, cls_token_weights, feature_kd, gated_kd, teacher_weights
from visexpert.losses.distill import Convention, uniform_teacher_weights
from visexpert.types import ExpertTokens
from visexpert.vision import ClsAttention

log = logging.getLogger(__name__)

TeacherWeighting = Literal["attention", "uniform", "gate"]
TokenWeighting = Literal["attention", "uniform"]

ANCHOR = "clip"
"""Name of the frozen CLIP among the teachers."""

STUDENT = "student"
"""Name of the student beside the teachers, in logs."""

UNIFORM, COLLAPSED = 0.999, 0.05
"""Entropy, as a share of the greatest, above and below which weights raise an alarm."""


@dataclass(frozen=True)
class Distilled:
    """What a distillation step found.

    Args:
        loss: Scalar.
        watched: Scalars without a graph to log: variance across images of student and targets, entropy of weights.
    """

    loss: Tensor
    watched: Mapping[str, Tensor]


class Distillation(nn.Module):
    """The KD loss of MoVE-KD over any teachers.

    Args:
        heads: One per teacher, by name (:func:`visexpert.transfer.make_kd_head`).
        teacher_weighting: ``attention`` - agreement with CLIP's [CLS] token; ``uniform``; ``gate`` - ToVE's gate on
            CLIP's tokens weighs the experts token by token.
        token_weighting: ``attention`` - CLIP's [CLS] attention; ``uniform``.
        convention: ``paper`` or ``released``, see :mod:`visexpert.losses.distill`.
        anchor_share: Weight of CLIP among the teachers, where it is one.
        alarm_every: Training steps between two looks at whether to raise an alarm.

    Raises:
        ConfigError: An unknown word, or a share outside 0 to 1.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        *,
        teacher_weighting: TeacherWeighting,
        token_weighting: TokenWeighting,
        convention: Convention,
        anchor_share: float,
        alarm_every: int = 50,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("teacher_weighting", teacher_weighting, TeacherWeighting),
            ("token_weighting", token_weighting, TokenWeighting),
            ("convention", convention, Convention),
        ):
            if value not in get_args(allowed):
                raise ConfigError(f"MoVEKD: {name}={value!r} is unknown; use one of {', '.join(get_args(allowed))}.")
        if not 0 <= anchor_share <= 1:
            raise ConfigError(
                f"MoVEKD: anchor_share={anchor_share} is no share; give 0 to 1, or null for no CLIP teacher."
            )
        self.heads = nn.ModuleDict(dict(heads))
        self.teacher_weighting, self.token_weighting = teacher_weighting, token_weighting
        self.convention: Convention = convention
        self.anchor_share = anchor_share
        for name in (STUDENT, *heads):  # one each, so that a start from a run with other teachers keeps what is shared
            self.register_buffer(_start_of(name), torch.tensor(torch.nan))
        self.alarm_every, self._steps = alarm_every, 0
        self._told: set[str] = set()

    def forward(
        self,
        student_BTD: Tensor,
        teachers: Mapping[str, ExpertTokens],
        clip: ClsAttention | None,
        *,
        gates_BTK: Tensor | None = None,
        has_image_B: Tensor | None = None,
    ) -> Distilled:
        """Compare the student's tokens with each teacher's.

        Args:
            student_BTD: Patch tokens of the student.
            teachers: Tokens of every teacher that has a head.
            clip: What the frozen CLIP says of the same images; None where no weighting needs it.
            gates_BTK: Gate of each expert per token, in the order of the heads without CLIP's; for ``gate``.
            has_image_B: bool; samples without an image take no part.
        """
        pairs = {name: head(student_BTD, teachers[name], has_image_B) for name, head in self.heads.items()}
        predictions = {name: pair.prediction_BTX for name, pair in pairs.items()}
        targets = {name: pair.target_BTX for name, pair in pairs.items()}
        tokens_BT = None
        if self.token_weighting == "attention":
            tokens_BT = cls_token_weights(_given(clip).cls_logits_BHN, self.convention)
        if self.teacher_weighting == "gate":
            assert gates_BTK is not None
            weights = self._beside_anchor(gates_BTK)
        else:
            weights = self._teacher_weights(targets, clip, has_image_B)
        if weights.ndim == 3:
            loss = gated_kd(predictions, targets, weights, tokens_BT, self.convention, has_image_B=has_image_B)
        else:
            loss = feature_kd(
                predictions, targets, weights, tokens_BT, convention=self.convention, has_image_B=has_image_B
            )
        shares = {"teachers": self._beside(weights), "tokens": tokens_BT}
        watched = self.watch({STUDENT: student_BTD, **targets}, shares=shares, has_image_B=has_image_B)
        return Distilled(loss, watched)

    def forget_start(self) -> None:
        """Take the variance of the next batch as the start that alarms compare with."""
        for name in (STUDENT, *self.heads):
            self.get_buffer(_start_of(name)).fill_(torch.nan)

    @torch.no_grad()
    def watch(
        self,
        sides: Mapping[str, Tensor],
        *,
        shares: Mapping[str, Tensor | None] | None = None,
        has_image_B: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What to log of a step; in training, also alarms.

        Args:
            sides: Tokens (B, T, X) by name: those of ``student`` and the targets.
            shares: Weights over the last axis by what they weigh (``teachers``, ``tokens``).
            has_image_B: bool; samples without an image take no part.

        Returns:
            ``variance/NAME`` across images (NaN for fewer than two) and ``entropy/NAME`` as a share of the greatest.
        """
        kept = slice(None) if has_image_B is None else has_image_B
        variances = {name: across_image_variance(tokens[kept]) for name, tokens in sides.items()}
        watched = {f"variance/{name}": value for name, value in variances.items()}
        for name, share in (shares or {}).items():
            if share is not None and share.shape[-1] > 1:
                watched[f"entropy/{name}"] = _entropy(share[kept])
        if self.training:
            self._start(variances)
            if self._steps % self.alarm_every == 0:  # an alarm has to wait for the device, logging does not
                self._alarm(variances)
                self._alarm_of_weights(watched)
            self._steps += 1
        return watched

    def _teacher_weights(
        self, targets: Mapping[str, Tensor], clip: ClsAttention | None, has_image_B: Tensor | None
    ) -> Tensor:
        """(B, K) in the order of the heads."""
        if self.teacher_weighting == "uniform":
            return uniform_teacher_weights(targets, anchor_share=self.anchor_share)
        cls_BD = _given(clip).tokens.cls_BD
        assert cls_BD is not None
        return teacher_weights(
            cls_BD, targets, anchor_share=self.anchor_share, convention=self.convention, has_image_B=has_image_B
        )

    def _beside_anchor(self, gates_BTK: Tensor) -> Tensor:
        """The experts' gates (B, T, K) with CLIP's fixed share put in its place."""
        if ANCHOR not in self.heads:
            return gates_BTK.detach()
        shares = list(((1 - self.anchor_share) * gates_BTK.detach()).unbind(-1))
        shares.insert(list(self.heads).index(ANCHOR), torch.full_like(gates_BTK[..., 0], self.anchor_share))
        return torch.stack(shares, dim=-1)

    def _beside(self, weights: Tensor) -> Tensor | None:
        """What is left to teachers beside CLIP, whose share is fixed, divided by its sum; None where nothing is."""
        if ANCHOR not in self.heads:
            return weights
        others = [index for index, name in enumerate(self.heads) if name != ANCHOR]
        return weights[..., others] / (1 - self.anchor_share) if self.anchor_share < 1 else None

    def _start(self, variances: Mapping[str, Tensor]) -> None:
        """Keep the first variance of each that is one."""
        for name, now in variances.items():
            start = self.get_buffer(_start_of(name))
            start.copy_(torch.where(start.isnan(), now.to(start), start))

    def _alarm(self, variances: Mapping[str, Tensor]) -> None:
        """Warn, once each, when variance across images falls under a third of its start."""
        start = torch.stack([self.get_buffer(_start_of(name)) for name in variances])
        now = torch.stack(list(variances.values())).to(start)
        for name, is_low in zip(variances, (now < start / 3).tolist(), strict=True):
            if is_low:
                self._tell(
                    f"variance/{name}",
                    f"Variance of {name}'s tokens across images fell under a third of its start: every image gets "
                    "nearly the same tokens. Use direction to_teacher or fixed, or a stronger CLIP anchor.",
                )

    def _alarm_of_weights(self, watched: Mapping[str, Tensor]) -> None:
        """Warn, once each, when weights that were asked to adapt do not, or leave all but one out."""
        asked = {"teachers": self.teacher_weighting, "tokens": self.token_weighting}
        for name, weighting in asked.items():
            if weighting == "uniform" or f"entropy/{name}" not in watched:
                continue
            value = float(watched[f"entropy/{name}"])
            if value > UNIFORM or value < COLLAPSED:
                state = "uniform" if value > UNIFORM else "collapsed onto one"
                self._tell(f"entropy/{name}", f"Weights of {name} are {state} (entropy {value:.4f} of the greatest).")

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            log.warning("%s", message)


def _start_of(name: str) -> str:
    return f"variance_start_{name}"


def _given(clip: ClsAttention | None) -> ClsAttention:
    if clip is None:
        raise ConfigError("Distillation: these weights come from CLIP's attention, but no CLIP was run.")
    return clip


def _entropy(weights: Tensor) -> Tensor:
    """Entropy over the last axis, as a share of the greatest; mean over the rest."""
    entropy: Tensor = torch.special.entr(weights).sum(-1).mean()
    return entropy / math.log(weights.shape[-1])

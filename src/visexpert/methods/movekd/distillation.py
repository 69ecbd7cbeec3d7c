"""Several teachers into one student: what each head compares, how teachers and tokens are weighed, what to watch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError, DataError
from visexpert.losses import across_image_variance, cls_token_weights, feature_kd, gated_kd, teacher_weights
from visexpert.losses.distill import uniform_teacher_weights
from visexpert.methods.settings import WeightingSettings
from visexpert.methods.step import on_host
from visexpert.names import CLIP, STUDENT
from visexpert.types import ExpertTokens, imaged
from visexpert.vision import ClsAttention

log = logging.getLogger(__name__)

UNIFORM, COLLAPSED = 0.999, 0.05
"""Entropy, as a share of the greatest, above and below which weights raise an alarm."""


class DistillationMonitor(nn.Module):
    """Keeps what alarms compare with, and looks from time to time: looking waits for the device, keeping does not.

    A base class, so that the starts of the variances keep their names in the checkpoints of what inherits it.

    Args:
        names: Sides whose variance across images is watched.
        adaptive: What has weights that were asked to adapt, such as ``teachers``: others raise no alarm.
        alarm_every: Training steps between two looks.
    """

    keeps_statistics = True

    def __init__(self, names: Iterable[str], *, adaptive: Iterable[str], alarm_every: int) -> None:
        super().__init__()
        self._names, self._adaptive = tuple(names), tuple(adaptive)
        for name in self._names:  # one each, so that a start from a run with other teachers keeps what is shared
            self.register_buffer(_start_of(name), torch.tensor(torch.nan))
        self.alarm_every, self._steps = alarm_every, 0
        self._told: set[str] = set()
        self._finite: dict[str, Tensor] = {}

    def forget_start(self) -> None:
        """Take the variance of the next batch as the start that alarms compare with."""
        for name in self._names:
            self.get_buffer(_start_of(name)).fill_(torch.nan)

    @torch.no_grad()
    def watch(
        self,
        sides: Mapping[str, Tensor],
        *,
        shares: Mapping[str, Tensor | None] | None = None,
        asked: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return what to log of a step; in training, also raise alarms. Call this once a step.

        Args:
            sides: Tokens (B, T, X) of images by name, some of those that are watched.
            shares: Weights over the last axis by what they weigh (``teachers``, ``tokens``).
            asked: Tokens that the loss pulls a side towards; if they vary less than it does, their variance is the
                start.

        Returns:
            ``variance/NAME`` across images (NaN for fewer than two) and ``entropy/NAME`` as a share of the greatest.

        Raises:
            DataError: In training, tokens that :meth:`note_finite` noted since the last look are not finite.
        """
        variances = {name: across_image_variance(tokens) for name, tokens in sides.items()}
        drawn = {name: across_image_variance(tokens) for name, tokens in (asked or {}).items()}
        watched = {f"variance/{name}": value for name, value in variances.items()}
        for name, share in (shares or {}).items():
            if share is not None and share.shape[-1] > 1:
                watched[f"entropy/{name}"] = _entropy(share)
        if self.training:
            self._start({name: torch.minimum(now, drawn.get(name, now)) for name, now in variances.items()})
            if self._looks:
                self._look(variances, watched)
            self._steps += 1
        return watched

    @torch.no_grad()
    def note_finite(self, teachers: Mapping[str, ExpertTokens]) -> None:
        """Note whether tokens of teachers are finite; in training, :meth:`watch` looks when it is time to.

        Also where they would be masked: 0 x NaN is NaN in the gradient of an adapter.

        Raises:
            DataError: In evaluation, some are not.
        """
        # One sum instead of a mask of the tokens' size: any NaN or infinity stays in it.
        now = {name: given.tokens_BSE.sum(dtype=torch.float32).isfinite() for name, given in teachers.items()}
        if not self.training:
            return _refuse(on_host(now))
        self._finite = {name: flag & self._finite.get(name, flag) for name, flag in now.items()}

    def check_finite(self) -> None:
        """Look at what was noted, before a checkpoint is written: none ever holds what came of such tokens.

        Raises:
            DataError: A teacher gave tokens that are NaN or infinite.
        """
        noted, self._finite = self._finite, {}
        _refuse(on_host(noted))

    @property
    def starts(self) -> bool:
        """Whether the start of the variances may still be taken: a first batch may have too few images."""
        return self.training and self._steps < self.alarm_every

    @property
    def _looks(self) -> bool:
        return self._steps % self.alarm_every == 0

    def _start(self, variances: Mapping[str, Tensor]) -> None:
        """Keep the first variance of each that is one."""
        for name, now in variances.items():
            start = self.get_buffer(_start_of(name))
            start.copy_(torch.where(start.isnan(), now.to(start), start))

    def _look(self, variances: Mapping[str, Tensor], watched: Mapping[str, Tensor]) -> None:
        """Look at all that is kept on the device, in one transfer.

        Warn, once each, when variance across images falls under a third of its start, and when weights that were asked
        to adapt do not, or leave all but one out; fresh adapters weigh all alike.
        """
        noted, self._finite = self._finite, {}
        low = {name: now < self.get_buffer(_start_of(name)).to(now) / 3 for name, now in variances.items()}
        entropies = {name: watched[f"entropy/{name}"] for name in self._adaptive if f"entropy/{name}" in watched}
        groups = {"finite": noted, "low": low, "entropy": entropies if self._steps > 0 else {}}
        read = on_host({(group, name): value for group, values in groups.items() for name, value in values.items()})
        _refuse({name: read["finite", name] for name in noted})
        for name in (name for name in low if read["low", name]):
            self._tell(
                f"variance/{name}",
                f"Variance of {name}'s tokens across images fell under a third of its start: they shrink, or every "
                "image gets nearly the same ones. Use alignment to_teacher or fixed, or a stronger CLIP anchor.",
            )
        for name in groups["entropy"]:
            value = read["entropy", name]
            if value > UNIFORM or value < COLLAPSED:
                state = "uniform" if value > UNIFORM else "collapsed onto one"
                self._tell(f"entropy/{name}", f"Weights of {name} are {state} (entropy {value:.4f} of the greatest).")

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            log.warning("%s", message)


def _start_of(name: str) -> str:
    return f"variance_start_{name}"


def _refuse(finite: Mapping[str, float]) -> None:
    names = [repr(name) for name, flag in finite.items() if not flag]
    if not names:
        return
    raise DataError(
        f"Teacher {' and '.join(names)} gave tokens that are NaN or infinite; look at its weights, its images and its "
        "precision (bfloat16 or float32 instead of float16), then continue from the last checkpoint, which is sound."
    )


def _entropy(weights: Tensor) -> Tensor:
    """Entropy over the last axis, as a share of the greatest; mean over the rest."""
    entropy: Tensor = torch.special.entr(weights).sum(-1).mean()
    return entropy / math.log(weights.shape[-1])


@dataclass(frozen=True)
class Distilled:
    """What a distillation step found.

    Args:
        loss: Scalar.
        watched: Scalars without a graph to log: ``variance/NAME`` across images of student and targets, ``entropy/...``
            of weights, ``weight/NAME`` of each teacher, ``peak/tokens``.
        distances: Mean squared error to each teacher, alike whatever the weighting; in evaluation only.
    """

    loss: Tensor
    watched: Mapping[str, Tensor]
    distances: Mapping[str, Tensor] = field(default_factory=dict)


class Distillation(DistillationMonitor):
    """The KD loss of MoVE-KD over any teachers.

    Args:
        heads: One per teacher, by name (:func:`visexpert.transfer.make_kd_head`).
        weighting: How teachers and tokens are weighed.
        alarm_every: Training steps between two looks at whether to raise an alarm.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        weighting: WeightingSettings,
        *,
        alarm_every: int = 50,
    ) -> None:
        asked = {"teachers": weighting.teachers, "tokens": weighting.tokens}
        super().__init__(
            (STUDENT, *heads),
            adaptive=[name for name, how in asked.items() if how != "uniform"],
            alarm_every=alarm_every,
        )
        self.heads = nn.ModuleDict(dict(heads))
        self.weighting = weighting
        self.clip_teacher_weight = weighting.clip_teacher_weight or 0.0

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
            has_image_B: bool, on the host; samples without an image take no part.

        Raises:
            DataError: Tokens of a teacher are not finite; in training it may take some steps to show.
        """
        self.note_finite(teachers)
        if has_image_B is not None:
            keep = partial(imaged, has_image_B=has_image_B)
            student_BTD, gates_BTK = keep(student_BTD), None if gates_BTK is None else keep(gates_BTK)
            teachers = {name: tokens.mapped(keep) for name, tokens in teachers.items()}
            clip = None if clip is None else clip.mapped(keep)
        pairs = {name: head(student_BTD, teachers[name]) for name, head in self.heads.items()}
        predictions = {name: pair.prediction_BTX for name, pair in pairs.items()}
        targets = {name: pair.target_BTX for name, pair in pairs.items()}
        tokens_BT = None
        if self.weighting.tokens == "attention":
            tokens_BT = cls_token_weights(_given(clip).cls_logits_BHN, self.weighting.convention)
        if self.weighting.teachers == "gate":
            assert gates_BTK is not None
            weights = self._beside_anchor(gates_BTK)
        else:
            weights = self._teacher_weights(targets, clip)
        compare = gated_kd if weights.ndim == 3 else feature_kd
        loss = compare(predictions, targets, weights, tokens_BT, self.weighting.convention)
        weights = weights.detach()
        shares = {"teachers": self._beside(weights), "tokens": tokens_BT}
        asked = self._asked(targets, weights)
        watched = self.watch({STUDENT: student_BTD, **targets}, shares=shares, asked=asked)
        watched |= self._mean_weights(weights, tokens_BT)
        return Distilled(loss, watched, {} if self.training else _distances(predictions, targets))

    @torch.no_grad()
    def _asked(self, targets: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """The weighted mean of the targets, where fixed maps give the student's tokens another scale than CLIP's."""
        if not self.starts or not any(getattr(head, "sets_scale", False) for head in self.heads.values()):
            return {}
        shares_BTK = weights if weights.ndim == 3 else weights[:, None]
        return {STUDENT: (torch.stack(list(targets.values()), dim=-1) * shares_BTK[:, :, None]).sum(-1)}

    @torch.no_grad()
    def _mean_weights(self, weights: Tensor, tokens_BT: Tensor | None) -> dict[str, Tensor]:
        """Return each teacher's mean weight, and the largest token weight of an image over the mean one."""
        mean_K = weights.flatten(0, -2).mean(0)
        found = {f"weight/{name}": mean for name, mean in zip(self.heads, mean_K, strict=True)}
        if tokens_BT is not None:
            found["peak/tokens"] = tokens_BT.shape[1] * tokens_BT.amax(1).mean()
        return found

    def _teacher_weights(self, targets: Mapping[str, Tensor], clip: ClsAttention | None) -> Tensor:
        """Return weights (B, K) in the order of the heads."""
        if self.weighting.teachers == "uniform":
            return uniform_teacher_weights(targets, clip_teacher_weight=self.clip_teacher_weight)
        cls_BD = _given(clip).tokens.cls_BD
        assert cls_BD is not None
        return teacher_weights(
            cls_BD,
            targets,
            clip_teacher_weight=self.clip_teacher_weight,
            convention=self.weighting.convention,
            detach=self.weighting.detach,
        )

    def _beside_anchor(self, gates_BTK: Tensor) -> Tensor:
        """The experts' gates (B, T, K) with CLIP's fixed share put in its place."""
        if CLIP not in self.heads:
            return gates_BTK.detach()
        shares = list(((1 - self.clip_teacher_weight) * gates_BTK.detach()).unbind(-1))
        shares.insert(list(self.heads).index(CLIP), torch.full_like(gates_BTK[..., 0], self.clip_teacher_weight))
        return torch.stack(shares, dim=-1)

    def _beside(self, weights: Tensor) -> Tensor | None:
        """What is left to teachers beside CLIP, whose share is fixed, divided by its sum; None where nothing is."""
        if CLIP not in self.heads:
            return weights
        others = [index for index, name in enumerate(self.heads) if name != CLIP]
        return weights[..., others] / (1 - self.clip_teacher_weight) if self.clip_teacher_weight < 1 else None


def _given(clip: ClsAttention | None) -> ClsAttention:
    if clip is None:
        raise ConfigError("Distillation: these weights come from CLIP's attention, but no CLIP was run.")
    return clip


@torch.no_grad()
def _distances(predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean squared error over images, tokens and channels, for each teacher."""
    return {
        name: feature_kd({name: predictions[name]}, {name: target}, target.new_ones(1, 1))
        for name, target in targets.items()
    }

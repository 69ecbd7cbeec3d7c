"""Distillation of several teachers into one student: loss, weights of teachers and tokens, monitoring."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError, DataError
from visexpert.losses import (
    across_image_variances,
    cls_token_weights,
    feature_errors,
    feature_kd,
    gated_kd,
    teacher_weights,
)
from visexpert.losses.distill import uniform_teacher_weights
from visexpert.methods.movekd.agglomeration import Agglomeration
from visexpert.methods.movekd.looks import Look, overlapping
from visexpert.methods.settings import WeightingSettings
from visexpert.methods.step import on_host
from visexpert.names import CLIP, STUDENT
from visexpert.transfer import KDHead, KDPair
from visexpert.types import ExpertTokens, imaged
from visexpert.vision import Saliency

log = logging.getLogger(__name__)

UNIFORM, COLLAPSED = 0.999, 0.05
"""Entropies, relative to the largest, above and below which weights raise an alarm."""


class DistillationMonitor(nn.Module):
    """Watches distillation and raises alarms. Values stay on the device; checks, which wait for it, run now and then.

    It is a base class, so that the starts of the variances keep their names in checkpoints.

    Args:
        names: Names of the tokens whose variance across images is watched.
        adaptive: Weights that should adapt, such as ``teachers``; others raise no alarm.
        alarm_every: Training steps between two checks.
    """

    keeps_statistics = True

    def __init__(self, names: Iterable[str], *, adaptive: Iterable[str], alarm_every: int) -> None:
        super().__init__()
        self._names, self._adaptive = tuple(names), tuple(adaptive)
        for name in self._names:  # one per name, so that a start from a run with other teachers keeps those in common
            self.register_buffer(_start_of(name), torch.tensor(torch.nan))
        self.alarm_every, self._steps = alarm_every, 0
        self._told: set[str] = set()
        self._finite: dict[str, Tensor] = {}

    def forget_start(self) -> None:
        """Use the variance of the next batch as the start for alarms."""
        for name in self._names:
            self.get_buffer(_start_of(name)).fill_(torch.nan)

    @torch.no_grad()
    def watch(
        self,
        variances: Mapping[str, Tensor],
        *,
        shares: Mapping[str, Tensor | None] | None = None,
        asked: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return what to log of a step; in training, also raise alarms. Call this once a step.

        Args:
            variances: Variance of tokens across images by name, of some or all that are watched.
            shares: Weights over the last axis by what they weigh (``teachers``, ``tokens``).
            asked: Tokens (B, T, X) that the loss pulls others towards, by their name; if they vary less, their variance
                is the start.

        Returns:
            ``variance/NAME`` across images (NaN for fewer than two), ``entropy/NAME`` relative to the largest.

        Raises:
            DataError: In training, tokens noted by :meth:`note_finite` since the last check are not finite.
        """
        drawn = across_image_variances(asked) if asked else {}
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
        """Note whether the teachers' tokens are finite; in training, :meth:`watch` checks it now and then.

        Raises:
            DataError: In evaluation, some are not.
        """
        # One sum instead of a mask of the tokens' size: any NaN or infinity stays in it.
        now = {name: given.tokens_BSE.sum(dtype=torch.float32).isfinite() for name, given in teachers.items()}
        if not self.training:
            return _refuse(on_host(now))
        self._finite = {name: flag & self._finite.get(name, flag) for name, flag in now.items()}

    def check_finite(self) -> None:
        """Check what was noted before a checkpoint is written, so that none holds the effect of such tokens.

        Raises:
            DataError: A teacher gave tokens that are NaN or infinite.
        """
        noted, self._finite = self._finite, {}
        _refuse(on_host(noted))

    @property
    def starts(self) -> bool:
        """Whether the start of the variances may still be set: the first batches may have too few images."""
        return self.training and self._steps < self.alarm_every

    @property
    def _looks(self) -> bool:
        return self._steps % self.alarm_every == 0

    def _start(self, variances: Mapping[str, Tensor]) -> None:
        """Set the starts that are unset to the current variances."""
        for name, now in variances.items():
            start = self.get_buffer(_start_of(name))
            start.copy_(torch.where(start.isnan(), now.to(start), start))

    def _look(self, variances: Mapping[str, Tensor], watched: Mapping[str, Tensor]) -> None:
        """Check all that is kept on the device, in one transfer.

        Warn, once each, if variance across images falls below a third of its start, or if weights that should adapt are
        uniform (not in the first step, when adapters are fresh) or collapse onto one.
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
                f"Variance of {name}'s tokens across images fell below a third of its start: they shrink, or every "
                "image gets nearly the same ones. Use alignment to_teacher or fixed, or a stronger CLIP anchor.",
            )
        for name in groups["entropy"]:
            value = read["entropy", name]
            if value > UNIFORM or value < COLLAPSED:
                state = "uniform" if value > UNIFORM else "collapsed onto one"
                self._tell(f"entropy/{name}", f"Weights of {name} are {state} (entropy {value:.4f} of the largest).")

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
    """Return the entropy over the last axis, relative to the largest, averaged over the rest."""
    entropy: Tensor = torch.special.entr(weights).sum(-1).mean()
    return entropy / math.log(weights.shape[-1])


@dataclass(frozen=True)
class Distilled:
    """Output of a distillation step.

    Args:
        loss: Scalar.
        watched: Scalars to log, without a graph: ``variance/NAME`` across images of student and targets,
            ``entropy/...`` of weights, ``weight/NAME`` of each teacher, ``peak/tokens``.
        distances: Mean squared error to each teacher, without any weighting; in evaluation only.
    """

    loss: Tensor
    watched: Mapping[str, Tensor]
    distances: Mapping[str, Tensor] = field(default_factory=dict)


class Distillation(DistillationMonitor):
    """The KD loss of MoVE-KD over any teachers.

    Args:
        heads: One per teacher, by name (:func:`visexpert.transfer.make_kd_head`).
        weighting: How teachers and tokens are weighted.
        agglomeration: What is added to the error of each token; None for nothing.
        alarm_every: Training steps between two checks.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        weighting: WeightingSettings,
        *,
        agglomeration: Agglomeration | None = None,
        alarm_every: int = 50,
    ) -> None:
        asked = {"teachers": weighting.teachers, "tokens": weighting.tokens}
        super().__init__(
            (STUDENT, *heads),
            adaptive=[name for name, how in asked.items() if how != "uniform"],
            alarm_every=alarm_every,
        )
        self.heads = nn.ModuleDict(dict(heads))
        self.agglomeration = agglomeration
        self.weighting = weighting
        self.clip_teacher_weight = weighting.clip_teacher_weight or 0.0

    def forward(
        self,
        student_BTD: Tensor,
        teachers: Mapping[str, ExpertTokens],
        clip: Saliency | None,
        *,
        summary_BD: Tensor | None = None,
        gates_BTK: Tensor | None = None,
        has_image_B: Tensor | None = None,
        look: Look | None = None,
    ) -> Distilled:
        """Compare the student's tokens with each teacher's.

        Args:
            student_BTD: Patch tokens of the student.
            teachers: Tokens of every teacher that has a head.
            clip: Output of the frozen CLIP on the same images; None if no weighting needs it.
            summary_BD: The student's own summary; for agglomeration's summary loss.
            gates_BTK: Gate of each expert per token, in the order of the heads without CLIP's; for ``gate``.
            has_image_B: bool, on the host; samples without an image take no part.
            look: What student and teachers saw; None if both saw the same whole images.

        Raises:
            DataError: Tokens of a teacher are not finite; in training this may be noticed some steps later.
        """
        self.note_finite(teachers)
        if has_image_B is not None:
            keep = partial(imaged, has_image_B=has_image_B)
            student_BTD, gates_BTK = keep(student_BTD), None if gates_BTK is None else keep(gates_BTK)
            summary_BD = None if summary_BD is None else keep(summary_BD)
            teachers = {name: tokens.mapped(keep) for name, tokens in teachers.items()}
            clip = None if clip is None else clip.mapped(keep)
        pairs = {name: head(student_BTD, teachers[name]) for name, head in self.heads.items()}
        if look is not None:
            pairs = {name: _shown_to_both(pair, self._grid_hw, look) for name, pair in pairs.items()}
        predictions = {name: pair.prediction_BTX for name, pair in pairs.items()}
        targets = {name: pair.target_BTX for name, pair in pairs.items()}
        tokens_BT = self._token_weights(clip, look) if self.weighting.tokens == "attention" else None
        if self.weighting.teachers == "gate":
            assert gates_BTK is not None
            weights = self._beside_anchor(gates_BTK)
        else:
            weights = self._teacher_weights(targets, clip)
        variances = across_image_variances({STUDENT: student_BTD, **targets})
        added: Mapping[str, Tensor] = {}
        if self.agglomeration is not None:
            errors_BK = feature_errors(predictions, targets, tokens_BT, self.weighting.convention)
            found = self.agglomeration(errors_BK, weights, pairs, summary_BD=summary_BD, teachers=teachers)
            loss, added = found.loss, found.watched
        else:
            compare = gated_kd if weights.ndim == 3 else feature_kd
            loss = compare(predictions, targets, weights, tokens_BT, self.weighting.convention)
        weights = weights.detach()
        shares = {"teachers": self._beside(weights), "tokens": tokens_BT}
        watched = self.watch(variances, shares=shares, asked=self._asked(targets, weights))
        watched |= {**self._mean_weights(weights, tokens_BT), **added}
        return Distilled(loss, watched, {} if self.training else _distances(predictions, targets))

    def kd_heads(self) -> dict[str, KDHead]:
        """Return the heads by teacher."""
        return {name: head for name, head in self.heads.items() if isinstance(head, KDHead)}

    @property
    def _grid_hw(self) -> tuple[int, int]:
        """Grid of the tokens that are compared."""
        return next(iter(self.kd_heads().values())).sizes.clip_grid

    def trained_modules(self) -> list[nn.Module]:
        """Return what trains: the heads, and those of summaries."""
        return [self.heads, *([] if self.agglomeration is None else [self.agglomeration.summary_heads])]

    @torch.no_grad()
    def _asked(self, targets: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """Return the weighted mean of the targets, if fixed maps give them a scale other than CLIP's."""
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

    def _token_weights(self, clip: Saliency | None, look: Look | None) -> Tensor:
        """Return the weight of each token that is compared, (B, T)."""
        logits_BHN = _given(clip).logits_BHN
        if look is not None:
            logits_BHN = _scores_of_both(logits_BHN, self._grid_hw, look)
        return cls_token_weights(logits_BHN, self.weighting.convention)

    def _teacher_weights(self, targets: Mapping[str, Tensor], clip: Saliency | None) -> Tensor:
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
        """Insert CLIP's fixed share into the experts' gates (B, T, K)."""
        if CLIP not in self.heads:
            return gates_BTK.detach()
        shares = list(((1 - self.clip_teacher_weight) * gates_BTK.detach()).unbind(-1))
        shares.insert(list(self.heads).index(CLIP), torch.full_like(gates_BTK[..., 0], self.clip_teacher_weight))
        return torch.stack(shares, dim=-1)

    def _beside(self, weights: Tensor) -> Tensor | None:
        """Return the weights of teachers other than CLIP, normalized; None if CLIP has the full weight."""
        if CLIP not in self.heads:
            return weights
        others = [index for index, name in enumerate(self.heads) if name != CLIP]
        return weights[..., others] / (1 - self.clip_teacher_weight) if self.clip_teacher_weight < 1 else None


def _shown_to_both(pair: KDPair, grid_hw: tuple[int, int], look: Look) -> KDPair:
    """Return the tokens of student and teacher where their crops overlap."""
    return KDPair(
        overlapping(pair.prediction_BTX, grid_hw, look.student, look.teachers),
        overlapping(pair.target_BTX, grid_hw, look.teachers, look.student),
    )


def _scores_of_both(logits_BHN: Tensor, grid_hw: tuple[int, int], look: Look) -> Tensor:
    """Return the scores of [CLS], and of the patches of the teachers' crop that the student's shows, too."""
    shown_BTH = overlapping(logits_BHN[..., 1:].mT, grid_hw, look.teachers, look.student)
    return torch.cat([logits_BHN[..., :1], shown_BTH.mT], dim=-1)


def _given(clip: Saliency | None) -> Saliency:
    if clip is None:
        raise ConfigError("Distillation: these weights come from CLIP's attention, but no CLIP was run; pass clip.")
    return clip


@torch.no_grad()
def _distances(predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean squared error over images, tokens and channels, for each teacher."""
    return {
        name: feature_kd({name: predictions[name]}, {name: target}, target.new_ones(1, 1))
        for name, target in targets.items()
    }

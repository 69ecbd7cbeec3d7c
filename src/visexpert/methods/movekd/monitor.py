"""What to watch in distillation, and when to raise an alarm: variances, entropies, tokens that are not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from visexpert.errors import DataError
from visexpert.losses import across_image_variance
from visexpert.methods.reduction import on_host
from visexpert.types import ExpertTokens, imaged

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
        has_image_B: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What to log of a step; in training, also alarms. Called once a step.

        Args:
            sides: Tokens (B, T, X) by name, some of those that are watched.
            shares: Weights over the last axis by what they weigh (``teachers``, ``tokens``).
            asked: Tokens that the loss draws a side to; where they vary less than it does, their variance is the start.
            has_image_B: bool, on the host; samples without an image take no part.

        Returns:
            ``variance/NAME`` across images (NaN for fewer than two) and ``entropy/NAME`` as a share of the greatest.

        Raises:
            DataError: In training, tokens that :meth:`note_finite` noted since the last look are not finite.
        """
        variances = {name: across_image_variance(imaged(tokens, has_image_B)) for name, tokens in sides.items()}
        watched = {f"variance/{name}": value for name, value in variances.items()}
        for name, share in (shares or {}).items():
            if share is not None and share.shape[-1] > 1:
                watched[f"entropy/{name}"] = _entropy(imaged(share, has_image_B))
        if self.training:
            drawn = {name: across_image_variance(imaged(tokens, has_image_B)) for name, tokens in (asked or {}).items()}
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

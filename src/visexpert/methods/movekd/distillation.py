"""Several teachers into one student: what each head compares, how teachers and tokens are weighed, what to watch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.losses import cls_token_weights, feature_kd, gated_kd, teacher_weights
from visexpert.losses.distill import uniform_teacher_weights
from visexpert.methods.movekd.monitor import DistillationMonitor
from visexpert.methods.settings import WeightingSettings
from visexpert.names import CLIP, STUDENT
from visexpert.types import ExpertTokens, imaged
from visexpert.vision import ClsAttention


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
        pairs = {name: head(student_BTD, teachers[name], has_image_B) for name, head in self.heads.items()}
        predictions = {name: pair.prediction_BTX for name, pair in pairs.items()}
        targets = {name: pair.target_BTX for name, pair in pairs.items()}
        tokens_BT = None
        if self.weighting.tokens == "attention":
            tokens_BT = cls_token_weights(_given(clip).cls_logits_BHN, self.weighting.convention)
        if self.weighting.teachers == "gate":
            assert gates_BTK is not None
            weights = self._beside_anchor(gates_BTK)
        else:
            weights = self._teacher_weights(targets, clip, has_image_B)
        compare = gated_kd if weights.ndim == 3 else feature_kd
        loss = compare(predictions, targets, weights, tokens_BT, self.weighting.convention, has_image_B=has_image_B)
        weights = weights.detach()
        shares = {"teachers": self._beside(weights), "tokens": tokens_BT}
        asked = self._asked(targets, weights)
        watched = self.watch({STUDENT: student_BTD, **targets}, shares=shares, asked=asked, has_image_B=has_image_B)
        watched |= self._mean_weights(weights, tokens_BT, has_image_B)
        return Distilled(loss, watched, {} if self.training else _distances(predictions, targets, has_image_B))

    @torch.no_grad()
    def _asked(self, targets: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """The weighted mean of the targets, where fixed maps give the student's tokens another scale than CLIP's."""
        if not self.starts or not any(getattr(head, "sets_scale", False) for head in self.heads.values()):
            return {}
        shares_BTK = weights if weights.ndim == 3 else weights[:, None]
        return {STUDENT: (torch.stack(list(targets.values()), dim=-1) * shares_BTK[:, :, None]).sum(-1)}

    @torch.no_grad()
    def _mean_weights(self, weights: Tensor, tokens_BT: Tensor | None, has_image_B: Tensor | None) -> dict[str, Tensor]:
        """Mean weight of each teacher; how many times the mean the heaviest token of an image weighs."""
        mean_K = imaged(weights, has_image_B).flatten(0, -2).mean(0)
        found = {f"weight/{name}": mean for name, mean in zip(self.heads, mean_K, strict=True)}
        if tokens_BT is not None:
            found["peak/tokens"] = tokens_BT.shape[1] * imaged(tokens_BT, has_image_B).amax(1).mean()
        return found

    def _teacher_weights(
        self, targets: Mapping[str, Tensor], clip: ClsAttention | None, has_image_B: Tensor | None
    ) -> Tensor:
        """(B, K) in the order of the heads."""
        if self.weighting.teachers == "uniform":
            return uniform_teacher_weights(targets, clip_teacher_weight=self.clip_teacher_weight)
        cls_BD = _given(clip).tokens.cls_BD
        assert cls_BD is not None
        return teacher_weights(
            cls_BD,
            targets,
            clip_teacher_weight=self.clip_teacher_weight,
            convention=self.weighting.convention,
            has_image_B=has_image_B,
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
def _distances(
    predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], has_image_B: Tensor | None
) -> dict[str, Tensor]:
    """Mean squared error over images, tokens and channels, for each teacher."""
    return {
        name: feature_kd({name: predictions[name]}, {name: target}, target.new_ones(1, 1), has_image_B=has_image_B)
        for name, target in targets.items()
    }

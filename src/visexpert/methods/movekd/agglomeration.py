"""What agglomerative encoders add to MoVE-KD's loss: relations, summaries, dropped and balanced teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visexpert.errors import ConfigError
from visexpert.losses import kept_teachers, loss_shares, relation_errors, rescaled, summary_errors
from visexpert.methods.settings import AgglomerationSettings
from visexpert.precision import like_weights
from visexpert.processes import summed
from visexpert.transfer import KDPair, token_map
from visexpert.types import ExpertTokens


@dataclass(frozen=True)
class Agglomerated:
    """The loss over all teachers.

    Args:
        loss: Scalar.
        watched: Scalars to log, without a graph: ``relation/NAME``, ``summary/NAME`` (mean errors), ``kept/NAME``
            (share of images that learned from a teacher) and ``share/NAME`` (factor of its loss).
    """

    loss: Tensor
    watched: Mapping[str, Tensor]


class Agglomeration(nn.Module):
    """Adds further errors of each teacher to that of its tokens, then drops and balances teachers.

    Args:
        names: Names of the teachers, in the order of their weights.
        settings: What is added.
        summary_widths: Width of the summary of each teacher that has one, by name.
        student_width: Width D of the student's summary.
        anchor: Name of the student's own frozen copy, if it is a teacher: its summary is compared as it is, without a
            head, and it is neither dropped nor balanced, because its loss starts at 0.

    Raises:
        ConfigError: A summary loss, but no teacher with a summary.
    """

    keeps_statistics = True

    def __init__(
        self,
        names: Sequence[str],
        settings: AgglomerationSettings,
        *,
        summary_widths: Mapping[str, int],
        student_width: int,
        anchor: str | None = None,
    ) -> None:
        super().__init__()
        self.names, self.settings = tuple(names), settings
        self.free = [index for index, name in enumerate(names) if name != anchor]
        self.summaries = tuple(name for name in names if name in summary_widths) if settings.summary > 0 else ()
        if settings.summary > 0 and not self.summaries:
            raise ConfigError(
                f"MoVEKD: agglomeration.summary={settings.summary} compares summaries, but none of the teachers "
                f"{list(names)} has one; add CLIP as a teacher (weighting.clip_teacher_weight) or an expert with a "
                "[CLS] token, whose tokens are not in a store, or set it to 0."
            )
        self.summary_heads = nn.ModuleDict(
            {
                name: token_map("mlp", student_width, summary_widths[name], student_width)
                for name in self.summaries
                if name != anchor
            }
        )
        if settings.balance == "running_mean":
            # One per teacher, so that a start from a run with other teachers keeps those in common.
            for index in self.free:
                self.register_buffer(_mean_of(self.names[index]), torch.tensor(torch.nan))

    def forward(
        self,
        errors_BK: Tensor,
        weights_BK: Tensor,
        pairs: Mapping[str, KDPair],
        *,
        summary_BD: Tensor | None,
        teachers: Mapping[str, ExpertTokens],
    ) -> Agglomerated:
        """Return the loss of images.

        Args:
            errors_BK: Error of each teacher's tokens.
            weights_BK: Weight of each teacher.
            pairs: Predictions and targets by teacher.
            summary_BD: The student's summary; None if no summary is compared.
            teachers: The teachers' own output, with their summaries.
        """
        watched: dict[str, Tensor] = {}
        losses_BK = errors_BK + self._added(pairs, summary_BD, teachers, watched)
        if self.training and self.free:  # plain in validation, so that runs can be compared
            if self.settings.balance == "running_mean":
                losses_BK = self._balanced(losses_BK, weights_BK, watched)
            if self.settings.drop > 0:
                weights_BK = self._dropped(losses_BK, weights_BK, watched)
        loss_B = (losses_BK * weights_BK).sum(1)
        return Agglomerated(loss_B.sum() / max(len(loss_B), 1), watched)

    def _dropped(self, losses_BK: Tensor, weights_BK: Tensor, watched: dict[str, Tensor]) -> Tensor:
        """Return the weights without those of the teachers that images leave out; note the share that stays."""
        kept_BU = kept_teachers(losses_BK[:, self.free], self.settings.drop)
        watched |= {f"kept/{self.names[index]}": kept for index, kept in zip(self.free, kept_BU.mean(0), strict=True)}
        return self._with_free(weights_BK, rescaled(weights_BK[:, self.free], kept_BU))

    @torch.no_grad()
    def _shares(self, losses_BU: Tensor, weights_BU: Tensor) -> Tensor:
        """Update the running means, and return the factor of each teacher's loss."""
        means = [self.get_buffer(_mean_of(self.names[index])) for index in self.free]
        images_U = torch.full_like(losses_BU.sum(0), len(losses_BU))
        losses_U, weights_U, images_U = summed(torch.stack([losses_BU.sum(0), weights_BU.sum(0), images_U])).unbind()
        for mean, now in zip(means, losses_U / images_U, strict=True):  # NaN without any image, which is passed over
            moved = torch.where(
                mean.isnan(), now.to(mean), torch.lerp(now.to(mean), mean, self.settings.balance_momentum)
            )
            mean.copy_(torch.where(now.isfinite(), moved, mean))
        return loss_shares(torch.stack(means).to(losses_BU), weights_U / images_U.clamp_min(1))

    def _balanced(self, losses_BK: Tensor, weights_BK: Tensor, watched: dict[str, Tensor]) -> Tensor:
        """Return the losses, each divided by its running mean; note the factors."""
        losses_BU = losses_BK[:, self.free]
        shares_U = self._shares(losses_BU.detach(), weights_BK[:, self.free].detach())
        watched |= {f"share/{self.names[index]}": share for index, share in zip(self.free, shares_U, strict=True)}
        return self._with_free(losses_BK, losses_BU * shares_U)

    def _with_free(self, all_BK: Tensor, free_BU: Tensor) -> Tensor:
        """Return the columns with those of all teachers but the anchor replaced."""
        columns = list(all_BK.unbind(1))
        for index, column_B in zip(self.free, free_BU.unbind(1), strict=True):
            columns[index] = column_B
        return torch.stack(columns, dim=1)

    def _added(
        self,
        pairs: Mapping[str, KDPair],
        summary_BD: Tensor | None,
        teachers: Mapping[str, ExpertTokens],
        watched: dict[str, Tensor],
    ) -> Tensor:
        """Return the weighted errors (B, K) of relations and summaries; note their means."""
        columns: list[Tensor] = []
        for name in self.names:
            column_B = pairs[name].target_BTX.new_zeros(len(pairs[name].target_BTX), dtype=torch.float32)
            if self.settings.relations > 0:
                pair = pairs[name]
                relation_B = relation_errors(pair.prediction_BTX, pair.target_BTX, self.settings.relation_form)
                watched[f"relation/{name}"] = relation_B.detach().mean()
                column_B = column_B + self.settings.relations * relation_B
            if name in self.summaries:
                error_B = self._summary(name, summary_BD, teachers[name])
                watched[f"summary/{name}"] = error_B.detach().mean()
                column_B = column_B + self.settings.summary * error_B
            columns.append(column_B)
        return torch.stack(columns, dim=1)

    def _summary(self, name: str, summary_BD: Tensor | None, teacher: ExpertTokens) -> Tensor:
        if summary_BD is None or teacher.summary_BF is None:
            raise ConfigError(
                f"MoVEKD: agglomeration.summary found no summary of {'the student' if summary_BD is None else name!r}; "
                "a store keeps patch tokens only: set store.folder to null for teachers with a summary."
            )
        if name in self.summary_heads:
            summary_BD = self.summary_heads[name](like_weights(summary_BD, self.summary_heads[name]))
        return summary_errors(summary_BD, teacher.summary_BF)


def _mean_of(name: str) -> str:
    return f"mean_loss_{name}"

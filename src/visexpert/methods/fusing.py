"""What detachment and merging ask of a method beyond what every command does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from visexpert.errors import ConfigError
from visexpert.language import LanguageModel, Projector
from visexpert.methods.base import Method
from visexpert.types import Batch, VisionTokens
from visexpert.vision import ClipEncoder, MoLESettings

FusionSpace = Literal["language", "clip"]


class FusingMethod(Method):
    """A method that fuses tokens of experts into those of its encoder, so that each expert can be detached or merged.

    Experts of the hub may be attached and detached at any time: tokens are those of a model with the attached ones.
    """

    fusion_space: FusionSpace
    """Where tokens are fused: ``language`` - behind the projector; ``clip`` - before it."""

    @abstractmethod
    def transferred(self, batch: Batch) -> VisionTokens:
        """Fused tokens of images: what merging teaches a CLIP to produce.

        (B, T, d_lang) where ``fusion_space`` is ``language``; else (B, T, D), which the projector has yet to read.
        """

    @abstractmethod
    def fusion_fingerprint(self) -> str:
        """Digest of all that :meth:`transferred` depends on, encoders, weights and attached experts alike."""

    @abstractmethod
    def drop_experts(self, names: Iterable[str]) -> None:
        """Remove experts for good: what stays equals running with them detached.

        Raises:
            ConfigError: A name that is not in the hub.
        """

    @abstractmethod
    def subset_modules(self) -> Sequence[nn.Module]:
        """Modules whose output on a batch is the same whatever experts are attached."""

    @abstractmethod
    def plain(
        self, clip: ClipEncoder, projector: Projector, language: LanguageModel, *, clip_lr: float
    ) -> FusingMethod:
        """A model without experts, of parts that were trained to do without: what merging ends in.

        Args:
            clip: The merged encoder.
            projector: Its projector, of this model's kind.
            language: Language model.
            clip_lr: Learning rate that CLIP was merged with, above 0, so that its weights are in the checkpoint.
        """

    @abstractmethod
    def detached_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments in ``config.yaml`` of this model, from those of the run whose experts it has dropped.

        Args:
            settings: ``init_args`` of the run.
        """

    @abstractmethod
    def merged_config(
        self, settings: Mapping[str, Any], *, clip_lr: float, mole: MoLESettings | None
    ) -> dict[str, Any]:
        """Arguments in ``config.yaml`` of what :meth:`plain` gives.

        Args:
            settings: ``init_args`` of the run that was merged.
            clip_lr: As for :meth:`plain`.
            mole: Of the merged CLIP; None for a plain one.
        """

    def rates(self) -> dict[str, float]:
        """Learning rates by name of the attribute, for re-tuning; those of a method's own belong here, too."""
        return {"lr": self.lr, "language_lr": self.language_lr}

    @contextmanager
    def retuning(self, lr: float | None, *, steps: int) -> Iterator[None]:
        """Train what is left at other rates: what is frozen stays so, nothing waits, a tenth of the steps warms up.

        Args:
            lr: Peak learning rate of all that trains; None for the run's own rates.
            steps: Optimizer steps.
        """
        before: dict[str, float] = self.rates()
        waits = self.warmup_steps, self.language_frozen_steps
        if lr is not None:
            vars(self).update({name: lr for name, rate in before.items() if rate > 0})
        self.warmup_steps, self.language_frozen_steps = min(self.warmup_steps, steps // 10), 0
        try:
            yield
        finally:
            vars(self).update(before)
            self.warmup_steps, self.language_frozen_steps = waits


def fusing(model: nn.Module, *, wanted_by: str) -> FusingMethod:
    """The model, where it is one whose experts can be detached and merged.

    Args:
        model: Any model.
        wanted_by: Who asks, for the message.

    Raises:
        ConfigError: It is another one.
    """
    if not isinstance(model, FusingMethod):
        raise ConfigError(
            f"{wanted_by} works on a method that fuses experts (a FusingMethod, such as ToVE), not on "
            f"{type(model).__name__}; leave it out, or name a run of such a method."
        )
    return model

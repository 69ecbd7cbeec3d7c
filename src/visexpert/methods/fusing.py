"""Base class of methods whose experts can be detached and merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from visexpert.errors import ConfigError
from visexpert.language import LanguageModel, Projector
from visexpert.methods.base import Method
from visexpert.typed import typed
from visexpert.types import Batch, VisionTokens
from visexpert.vision import MoLESettings, VisionEncoder

FusionSpace = Literal["language", "clip"]


@typed
class FusingMethod(Method):
    """A method that fuses tokens of experts into those of its encoder.

    Experts of the hub may be attached and detached at any time; tokens are those of a model with the attached ones.
    """

    fusion_space: FusionSpace
    """Where tokens are fused: ``language`` - after the projector; ``clip`` - before it."""

    @property
    def fused_width(self) -> int:
        """Width of :meth:`transferred`."""
        return self.language.width if self.fusion_space == "language" else self.clip.width

    @abstractmethod
    def transferred(self, batch: Batch) -> VisionTokens:
        """Return fused tokens, which merging teaches a CLIP to produce.

        (B, T, d_lang) if ``fusion_space`` is ``language``; otherwise (B, T, D), before the projector.
        """

    @abstractmethod
    def fusion_fingerprint(self) -> str:
        """Return a digest of all that :meth:`transferred` depends on: encoders, weights and attached experts."""

    @abstractmethod
    def drop_experts(self, names: Iterable[str]) -> None:
        """Remove experts for good; the tokens are the same as with them detached.

        Raises:
            ConfigError: A name that is not in the hub.
        """

    @abstractmethod
    def subset_modules(self) -> Sequence[nn.Module]:
        """Return the modules whose output does not depend on which experts are attached."""

    @abstractmethod
    def plain(
        self,
        clip: VisionEncoder,
        projector: Projector,
        language: LanguageModel,
        *,
        clip_lr: float,
        keep_pooled: float = 0.0,
    ) -> FusingMethod:
        """Build the merged model: without experts, from parts that were trained to do without them.

        Args:
            clip: The merged encoder.
            projector: Its projector.
            language: Language model.
            clip_lr: Learning rate of CLIP in merging, above 0, so that checkpoints hold its weights.
            keep_pooled: Weight of the pooled output in merging; above 0 checkpoints hold the pooled path, too.
        """

    @abstractmethod
    def detached_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``config.yaml`` arguments of this model after :meth:`drop_experts`.

        Args:
            settings: ``init_args`` of the run.
        """

    @abstractmethod
    def merged_config(
        self, settings: Mapping[str, Any], *, clip_lr: float, mole: MoLESettings | None, keep_pooled: float = 0.0
    ) -> dict[str, Any]:
        """Return the ``config.yaml`` arguments of the model that :meth:`plain` builds.

        Args:
            settings: ``init_args`` of the merged run.
            clip_lr: As for :meth:`plain`.
            mole: MoLE of the merged CLIP; None for a plain one.
            keep_pooled: As for :meth:`plain`.
        """

    def rates(self) -> dict[str, float]:
        """Return the learning rates by attribute name, for re-tuning; methods add their own."""
        return {"lr": self.lr, "language_lr": self.language_lr}

    @contextmanager
    def retuning(self, lr: float | None, *, steps: int) -> Iterator[None]:
        """Train at other rates: frozen parts stay frozen, nothing starts later, a tenth of the steps is warm-up.

        Args:
            lr: Peak learning rate of everything that trains; None for the run's own rates.
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
    """Return the model if its experts can be detached and merged.

    Args:
        model: Any model.
        wanted_by: What needs it, for the message.

    Raises:
        ConfigError: They cannot.
    """
    if not isinstance(model, FusingMethod):
        raise ConfigError(
            f"{wanted_by} works on a method that fuses experts (a FusingMethod, such as ToVE), not on "
            f"{type(model).__name__}; leave it out, or name a run of such a method."
        )
    return model

"""Keep the student's pooled output, which its text tower, zero-shot use and retrieval rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from visexpert.errors import ConfigError, require_numbers
from visexpert.losses import pooled_distance
from visexpert.methods.step import LossTerm
from visexpert.types import Batch
from visexpert.vision import PooledRecord, VisionEncoder, record_pooled


class KeptPooled:
    """Adds weight * (1 - cosine) between the student's pooled output and the frozen encoder's, both projected.

    Blocks behind the tokens, the norm and the pooling head train along; the projection into the space of the text
    tower, where the source has one, stays frozen. One forward pass of the student gives tokens and pooled output.

    Args:
        weight: Weight of the loss, above 0.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._frozen: VisionEncoder | None = None

    @classmethod
    def of(cls, clip: VisionEncoder, weight: float, *, owner: str) -> KeptPooled | None:
        """Return what keeps the pooled output of an encoder; None at a weight of 0.

        Raises:
            ConfigError: The weight is negative, or the encoder has no pooled output.
        """
        require_numbers(owner, least=0, keep_pooled=weight)
        if weight == 0:
            return None
        try:
            clip.require_pooled()
        except ConfigError as error:
            raise ConfigError(f"{owner}: keep_pooled={weight:g} cannot be kept: {error} Set it to 0.") from error
        return cls(weight)

    @contextmanager
    def recording(self, student: VisionEncoder, frozen: Callable[[], VisionEncoder]) -> Iterator[PooledPair]:
        """Record the pooled output of both encoders in the forward passes that a step makes anyway.

        Args:
            student: The encoder that trains.
            frozen: Returns the frozen one; called once.
        """
        if self._frozen is None:
            self._frozen = frozen()
        with record_pooled(student) as own, record_pooled(self._frozen) as theirs:
            yield PooledPair(self.weight, student, self._frozen, own, theirs)


@dataclass(frozen=True)
class PooledPair:
    """The pooled outputs of one step.

    Args:
        weight: Weight of the loss.
        student: The encoder that trains.
        frozen: The frozen encoder.
        own: What the student pooled.
        theirs: What the frozen encoder pooled, if the step ran it.
    """

    weight: float
    student: VisionEncoder
    frozen: VisionEncoder
    own: PooledRecord
    theirs: PooledRecord

    def term(self, batch: Batch) -> LossTerm:
        """Return the loss over whole images: tiles have no pooled output of their own."""
        pooled_VP = self.own.pooled_BP
        assert pooled_VP is not None
        student_BE = self.student.project(pooled_VP[: len(batch)])
        with torch.no_grad():
            frozen_BE = self.frozen.project(self._frozen(batch))
        value = pooled_distance(student_BE, frozen_BE, has_image_B=batch.has_image_B)
        return LossTerm(value, "image", self.weight)

    def _frozen(self, batch: Batch) -> Tensor:
        seen = self.theirs.pooled_BP
        # A store may have given the frozen encoder's tokens, so that it did not run.
        return self.frozen.pooled(batch.images_01()) if seen is None else seen[: len(batch)]

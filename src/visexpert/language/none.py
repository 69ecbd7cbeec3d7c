"""No language model: for distillation of the encoder alone."""

from __future__ import annotations

from collections.abc import Sequence

from visexpert.errors import ConfigError
from visexpert.language.base import LanguageModel, Predictions
from visexpert.language.generation import Decoding
from visexpert.types import TextBatch, VisionTokens


class NoLanguage(LanguageModel):
    """Placeholder for a language model; builds nothing and cannot read or generate text."""

    def __init__(self) -> None:
        super().__init__(width=0)

    def load_weights(self) -> None:
        """Nothing."""

    def forward(self, vision: VisionTokens, text: TextBatch) -> Predictions:
        """Refused."""
        raise ConfigError("This run has no language model (NoLanguage): set lm_weight to 0, or set language.")

    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        """Refused."""
        raise ConfigError("This run has no language model (NoLanguage), so it cannot caption; use another run.")

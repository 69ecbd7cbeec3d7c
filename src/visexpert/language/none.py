"""No language model: for distillation of the encoder alone."""

from __future__ import annotations

from collections.abc import Sequence

from visexpert.errors import ConfigError
from visexpert.language.base import LanguageSide, Predictions
from visexpert.language.generation import Decoding
from visexpert.types import TextBatch, VisionTokens


class NoLanguage(LanguageSide):
    """Stands where a language model would; nothing is built, nothing can be read or written."""

    def __init__(self) -> None:
        super().__init__(width=0)

    def load_weights(self) -> None:
        """Nothing."""

    def forward(self, vision: VisionTokens, text: TextBatch) -> Predictions:
        """Refused."""
        raise ConfigError("This run has no language side (NoLanguage): set lm_weight to 0, or give it one.")

    def _generate(
        self, vision: VisionTokens, prompts: Sequence[Sequence[int]], *, eos_id: int, decoding: Decoding
    ) -> list[list[int]]:
        """Refused."""
        raise ConfigError("This run has no language side (NoLanguage), so it cannot write; caption with another run.")

"""The absent language model says so instead of answering."""

from __future__ import annotations

import pytest
import torch

from visexpert.data import pack
from visexpert.errors import ConfigError
from visexpert.language import NoLanguage
from visexpert.types import VisionTokens

VISION = VisionTokens(torch.zeros(1, 4, 8), (2, 2))


def test_it_builds_nothing() -> None:
    side = NoLanguage()
    side.load_weights()
    assert not list(side.parameters()) and not side.state_dict()


def test_reading_and_writing_are_refused() -> None:
    with pytest.raises(ConfigError, match="no language model .*: set lm_weight to 0"):
        NoLanguage()(VISION, pack([[([5, 6, 7], 1)]], 0))
    with pytest.raises(ConfigError, match="no language model .* cannot caption; use another run"):
        NoLanguage().generate(VISION, [[1]], eos_id=2)

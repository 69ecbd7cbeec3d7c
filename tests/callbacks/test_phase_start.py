"""A phase that cannot work at the end of a fit says so before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from tests.methods.helpers import bare_trainer, tiny_tove
from tests.methods.movekd.helpers import tiny_movekd
from visexpert.callbacks import ExpertDetachment, KnowledgeMerging
from visexpert.callbacks.phase import Phase
from visexpert.errors import ConfigError
from visexpert.methods import Method


class Nothing(L.LightningDataModule):
    """Data that may have a validation part of nothing, and that nobody may train on."""

    def train_dataloader(self) -> Any:
        raise AssertionError("training began")


class NoValidation(Nothing):
    def val_dataloader(self) -> list[Any]:
        return []


DETACH: dict[str, Any] = {"timing_images": 1, "timing_seconds": 0.0, "retune_steps": 0}


@pytest.mark.parametrize(
    ("phase", "model", "data", "told"),
    [
        (ExpertDetachment(keep=2, **DETACH), tiny_tove(), NoValidation(), "NoValidation has none; give the data some"),
        (ExpertDetachment(keep=2, **DETACH), tiny_tove(), Nothing(), "Nothing has none"),
        (ExpertDetachment(keep=4, **DETACH), tiny_tove(), NoValidation(), "keep is 4, but the model has 3 experts"),
        (ExpertDetachment(keep=1, **DETACH), tiny_tove(experts={}), NoValidation(), "no expert to detach"),
        (ExpertDetachment(keep=2, **DETACH), tiny_movekd(), NoValidation(), "FusingMethod.*not on MoVEKD"),
        (KnowledgeMerging(steps=1), tiny_tove(experts={}), NoValidation(), "nothing to merge"),
        (KnowledgeMerging(steps=1), tiny_movekd(), NoValidation(), "FusingMethod.*not on MoVEKD"),
    ],
)
def test_what_a_phase_cannot_work_on_is_refused_before_training(
    phase: Phase, model: Method, data: L.LightningDataModule, told: str, tmp_path: Path
) -> None:
    model.mark_loaded()
    with pytest.raises(ConfigError, match=told):
        bare_trainer(tmp_path, callbacks=[phase], steps=1).fit(model, datamodule=data)

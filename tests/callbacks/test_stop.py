"""A fit that goes on where no step is left says so, and which setting to raise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.tiny import TinyModule, loader, trainer
from visexpert.callbacks import MetricsContinuation


def fit(folder: Path, *, ckpt_path: Path | None = None, **ends: Any) -> None:
    """4 batches an epoch; ``last.ckpt`` is what is left at the end."""
    saves = ModelCheckpoint(folder, save_last=True, every_n_epochs=1)
    made = trainer(callbacks=[MetricsContinuation(), saves], enable_checkpointing=True, **ends)
    made.fit(TinyModule(), loader(), ckpt_path=ckpt_path)


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ({"max_steps": 8, "max_epochs": -1}, "is at step 8 and trainer.max_steps is 8; raise that"),
        ({"max_steps": 5, "max_epochs": -1}, "is at step 8 and trainer.max_steps is 5; raise that"),
        ({"max_epochs": 2}, "is at step 8 and trainer.max_epochs is 2; raise that"),
        ({"max_epochs": 3}, None),
    ],
)
def test_no_step_left_is_told_with_the_setting_to_raise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ends: dict[str, int], told: str | None
) -> None:
    fit(tmp_path, max_epochs=2)
    assert "No step is left" not in caplog.text
    fit(tmp_path, ckpt_path=tmp_path / "last.ckpt", **ends)
    assert ("No step is left" in caplog.text) == (told is not None)
    assert told is None or (told in caplog.text and "last.ckpt" in caplog.text)


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ({"max_steps": 6, "max_epochs": 2}, ("1.50 epochs", "max_epochs is 2 (8 steps)", "max_steps: 6 ends")),
        ({"max_steps": 9, "max_epochs": 2}, ("2.25 epochs", "(8 steps)", "max_epochs: 2 ends")),
        ({"max_steps": 4, "max_epochs": 2, "accumulate_grad_batches": 2}, ()),
        ({"max_steps": 6, "max_epochs": -1}, ()),
        ({"max_epochs": 1}, ()),
    ],
)
def test_steps_and_epochs_that_disagree_are_told(
    caplog: pytest.LogCaptureFixture, ends: dict[str, int], told: tuple[str, ...]
) -> None:
    trainer(callbacks=[MetricsContinuation()], **ends).fit(TinyModule(), loader())
    assert ("ends the training" in caplog.text) == bool(told)
    assert all(words in caplog.text for words in told)

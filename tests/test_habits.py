"""What users of Lightning are used to works from the command line: loggers, callbacks, flags of the trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from visexpert.cli import ShownFormatter, main
from visexpert.report import read_metrics

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Scenes are rendered once for all of these fits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("sys.argv", ["visexpert"])
        yield


def fit(run: Path, *options: str, **trainer: Any) -> Path:
    """Fit by the command, the trainer's settings in an overlay as a user writes them."""
    overlay = run.with_suffix(".yaml")
    settings = {"max_steps": STEPS, "val_check_interval": 2, **trainer}
    overlay.write_text(yaml.safe_dump({"trainer": settings}), encoding="utf-8")
    main(["fit", "--config", "tove/smoke", "--config", str(overlay), "--run", str(run), *options])
    return run


def once(run: Path, **trainer: Any) -> Path:
    return fit(run, "--test_after_fit", "false", **trainer)


def named(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


def steps_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def test_loggers_rates_and_the_best_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    run = once(
        tmp_path / "run",
        logger=[named(f"{kind}Logger", save_dir=str(tmp_path / kind)) for kind in ("CSV", "TensorBoard")],
        callbacks=[
            named("LearningRateMonitor", logging_interval="step"),
            named("ModelCheckpoint", monitor="val/nll/nll", mode="max", filename="worst"),
        ],
    )
    own = read_metrics(run / "metrics.csv")
    rate = next(name for name in own if name.startswith("lr-"))
    assert len(own[rate][1]) == STEPS and len(set(own[rate][1])) > 1  # the warm-up is seen
    assert list(own["train/loss"][0]) == list(range(STEPS))
    (table,) = (tmp_path / "CSV").rglob("metrics.csv")
    (events,) = (tmp_path / "TensorBoard").rglob("events.*")
    board = EventAccumulator(str(events))
    board.Reload()
    losses = [event.value for event in board.Scalars("train/loss")]
    for found in (losses, list(read_metrics(table)["train/loss"][1])):
        assert found == pytest.approx(list(own["train/loss"][1]))
    scores = dict(zip(*own["val/nll/nll"], strict=True))
    worst = max(scores, key=lambda step: scores[step])
    assert (
        steps_of(run / "checkpoints" / "worst.ckpt") == worst + 1 and steps_of(run / "checkpoints/last.ckpt") == STEPS
    )


def test_early_stopping_ends_a_fit_that_no_longer_improves(tmp_path: Path) -> None:
    stop = named("EarlyStopping", monitor="val/nll/nll", mode="max", patience=1, min_delta=100)
    run = once(tmp_path / "run", callbacks=[stop], max_steps=8)
    assert steps_of(run / "checkpoints" / "last.ckpt") == 4  # the second validation is no better by 100


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_rehearsal_keeps_nothing_and_spoils_nothing(command: str, tmp_path: Path) -> None:
    run = once(tmp_path / "run", max_steps=1, val_check_interval=1)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = ["--config", "tove/smoke", "--test_after_fit", "false", "--run"] if command == "fit" else []
    main([command, *again, str(run), "--trainer.fast_dev_run", "true"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    if command == "fit":
        main([command, *again, str(tmp_path / "new"), "--trainer.fast_dev_run", "1"])
        assert not (tmp_path / "new").exists()


def test_overfitting_one_batch_sees_the_same_images_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visexpert.methods import ToVE

    seen: list[list[int]] = []
    step = ToVE.training_step

    def watched(self: ToVE, batch: Any, batch_idx: int) -> Any:
        seen.append(sorted(batch.index_B.tolist()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ToVE, "training_step", watched)
    once(tmp_path / "run", overfit_batches=1, max_steps=3, val_check_interval=1)
    assert len(seen) == 3 and len(set(map(tuple, seen))) == 1


def test_accumulated_gradients_take_as_many_steps_of_twice_the_images(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", accumulate_grad_batches=2, max_steps=2)
    assert steps_of(run / "checkpoints" / "last.ckpt") == 2
    assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["cost/train_images"] == 2 * 2 * 8


def test_a_profiler_reports_once(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    once(tmp_path / "run", profiler="simple", max_steps=1, val_check_interval=1)
    reports = [record for record in caplog.records if "Profiler Report" in record.getMessage()]
    assert len(reports) == 1 and "run_training_batch" in reports[0].getMessage()
    assert "Profiler Report" not in capfd.readouterr().err  # Lightning's own handler would print it again
    shown = ShownFormatter("%(message)s").format(reports[0])
    assert "\\t" not in shown and "\t" not in shown

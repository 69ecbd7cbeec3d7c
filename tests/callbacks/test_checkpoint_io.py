"""Checkpoints of a trainer: whole or not there, in whatever way the writer ends."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from visexpert.callbacks.checkpoint_io import RunTrainer, WholeFileIO, save_whole, use_whole_files
from visexpert.errors import DataError, WeightsError
from visexpert.io.checkpoints import load_checkpoint
from visexpert.methods.checkpointed import fills_itself, saves_shards


def content(value: float) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((1000,), value)}, "global_step": int(value)}


def value_of(path: Path) -> float:
    return float(load_checkpoint(path, owner="test")["state_dict"]["weight"][0])


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_whole(content(1), path)
    child = os.fork()
    if child == 0:
        write = torch.save

        def half(checkpoint: Any, part: Path) -> None:
            write(checkpoint, part)
            part.write_bytes(part.read_bytes()[:500])
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(torch, "save", half)  # noqa: B010 (in this process alone)
        WholeFileIO().save_checkpoint(content(2), str(path))
    os.waitpid(child, 0)
    assert value_of(path) == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_leaves_the_one_before_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "last.ckpt"
    save_whole(content(1), path)

    def full(checkpoint: Any, part: Path) -> None:
        part.write_bytes(b"PK")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match=r"last\.ckpt.*free the disk"):
        save_whole(content(2), path)
    assert value_of(path) == 1 and os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = torch.save
    monkeypatch.setattr(torch, "save", lambda checkpoint, part: write(checkpoint, "/dev/full"))
    with pytest.raises(DataError, match="free the disk"):
        save_whole(content(2), tmp_path / "last.ckpt")
    assert not os.listdir(tmp_path)


def test_nothing_passes_through_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own writer does, which the second half shows."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    trainer = fitted(tmp_path / "run", plugins=[WholeFileIO()])
    assert isinstance(trainer.strategy.checkpoint_io, WholeFileIO)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"step=2.ckpt", "last.ckpt"}
    with pytest.raises(FileNotFoundError):
        fitted(tmp_path / "other")


def fitted(folder: Path, **options: Any) -> L.Trainer:
    keeper = ModelCheckpoint(dirpath=folder, filename="{step}", save_last=True, every_n_train_steps=1)
    trainer = RunTrainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        callbacks=[keeper],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(BoringModel())
    return trainer


def test_a_user_s_own_writer_stays() -> None:
    plain, wrapped, own = (SingleDeviceStrategy(), SingleDeviceStrategy(), SingleDeviceStrategy())
    wrapped.checkpoint_io = AsyncCheckpointIO()
    own.checkpoint_io = mine = type("Mine", (WholeFileIO,), {})()
    for strategy in (plain, wrapped, own):
        use_whole_files(strategy)
    assert type(plain.checkpoint_io) is WholeFileIO and own.checkpoint_io is mine
    assert type(wrapped.checkpoint_io.checkpoint_io) is WholeFileIO


def test_which_strategies_save_shards() -> None:
    assert saves_shards(FSDPStrategy(state_dict_type="sharded"))
    assert not saves_shards(FSDPStrategy(state_dict_type="full")) and not saves_shards(SingleDeviceStrategy())


def test_which_strategies_read_a_checkpoint_before_it_is_completed() -> None:
    assert fills_itself(FSDPStrategy(state_dict_type="sharded")) and fills_itself(FSDPStrategy(state_dict_type="full"))
    assert not fills_itself(SingleDeviceStrategy())


class Sharding(SingleDeviceStrategy):
    """Saves a folder by itself, as the engines do, and fails where it is told to."""

    fails = False

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        folder = Path(filepath)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint["state_dict"], folder / "shard")
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "meta").write_text(str(checkpoint["global_step"]), encoding="utf-8")


def test_a_folder_of_shards_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    strategy = Sharding(device=torch.device("cpu"))
    trainer = fitted(tmp_path, strategy=strategy)
    assert saves_shards(strategy) and (tmp_path / "last.ckpt" / "meta").read_text(encoding="utf-8") == "2"
    strategy.fails = True
    with pytest.raises(OSError, match="No space"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt" / "meta").read_text(encoding="utf-8") == "2"
    strategy.fails = False
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"step=2.ckpt", "last.ckpt"}


def test_what_is_damaged_is_refused_by_the_trainer(tmp_path: Path) -> None:
    fitted(tmp_path, plugins=[WholeFileIO()])
    (tmp_path / "last.ckpt").write_bytes(b"")
    trainer = RunTrainer(accelerator="cpu", logger=False, plugins=[WholeFileIO()], default_root_dir=tmp_path)
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        trainer.fit(BoringModel(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_saving_without_a_word_on_the_optimizer_keeps_it_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = fitted(tmp_path, plugins=[WholeFileIO()])
    with caplog.at_level("INFO"):
        trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert "weights_only" not in caplog.text
    assert load_checkpoint(tmp_path / "again.ckpt", owner="test")["optimizer_states"]

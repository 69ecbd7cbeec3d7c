"""How weights get to the disk and back: whole or not at all, and never by running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

from visexpert.callbacks.run_folder import environment
from visexpert.errors import ConfigError, DataError, first_line, require_checkout
from visexpert.io.checkpoints import load_checkpoint
from visexpert.io.files import remove, take_place, whole_file
from visexpert.io.run_files import write_json
from visexpert.io.weights import write_weights
from visexpert.methods import Method
from visexpert.methods.checkpointed import saves_shards


class WholeFileIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place and renames it; reads files, and folders of shards, with a clear error.

    Lightning's own writer takes the temporary folder, from which a file is copied over the earlier one where that lies
    on another disk: a kill meanwhile destroys both. It also holds the whole file in memory. Addresses such as
    ``s3://`` are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save to a file; see :func:`save_whole`."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_whole(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read onto the CPU.

        Raises:
            WeightsError: It is missing, damaged, could run code, or holds no weights.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        return load_checkpoint(Path(path), owner="ckpt_path")


def save_whole(checkpoint: dict[str, Any], path: Path) -> None:
    """Save a checkpoint to a file; an earlier one stays until this one is whole.

    Raises:
        DataError: The disk is full or the folder cannot be written.
    """
    try:
        with whole_file(path) as part:
            torch.save(checkpoint, part)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise DataError(
            f"Cannot write {path} ({first_line(error)[:120]}): free the disk, then run the same again; what was saved "
            "before is still whole."
        ) from error


def use_whole_files(strategy: Strategy) -> None:
    """Make a strategy write with :class:`WholeFileIO`, unless the user gave another writer."""
    given = strategy._checkpoint_io
    if given is None:
        strategy.checkpoint_io = WholeFileIO()
    elif isinstance(given, _WrappingCheckpointIO) and given.checkpoint_io is None:
        given.checkpoint_io = WholeFileIO()


class RunTrainer(L.Trainer):
    """A trainer whose checkpoints are whole or not there, those that are folders, too."""

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Save as Lightning does; a folder of shards is moved into place once every process has written its own."""
        weights_only = bool(weights_only)  # of None, Lightning says that it was not set
        if not saves_shards(self.strategy):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        path = Path(self.strategy.broadcast(filepath))
        part = path.with_name(f".{path.name}.part")
        if self.is_global_zero:
            remove(part)
        self.strategy.barrier("RunTrainer.save_checkpoint")
        super().save_checkpoint(part, weights_only, storage_options)
        if self.is_global_zero:
            take_place(part, path)
        self.strategy.barrier("RunTrainer.save_checkpoint")


class ShipLanguage(Callback):
    """Write the language model's weights (fp16 safetensors) and their card at the end of training.

    Args:
        out: Weights file; the facts go beside it as ``.json`` under ``cards``.
        cards: Folder of the facts.
        trained_on: One sentence for the card: which encoder, data and steps.
    """

    def __init__(self, *, out: str, cards: str, trained_on: str) -> None:
        if not out.endswith(".safetensors"):
            raise ConfigError(f"ShipLanguage: out must end in .safetensors, the only format that is read; got {out!r}.")
        require_checkout("ShipLanguage", out, cards)
        self.out, self.cards, self.trained_on = Path(out), Path(cards), trained_on

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Method):
            raise ConfigError("ShipLanguage needs a method with a language model; remove it from this config.")
        if not trainer.is_global_zero:
            return
        state = pl_module.language.state_dict()
        tied = {key for key in state if key == "head.weight"}
        weights = {key: value.half().contiguous() for key, value in state.items() if key not in tied}
        write_weights(weights, self.out)
        scores = {
            k: float(v) for k, v in trainer.callback_metrics.items() if torch.is_tensor(v) and k.startswith("val/")
        }
        facts = {
            "name": self.out.stem,
            "license": "Apache-2.0",
            "trained_on": self.trained_on,
            "steps": trainer.global_step,
            "parameters": sum(value.numel() for value in weights.values()),
            "validation": {name: round(value, 4) for name, value in sorted(scores.items())},
            "seed": environment()["seed"],
        }
        write_json(self.cards / f"{self.out.stem}.json", facts)

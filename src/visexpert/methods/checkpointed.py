"""Weights of a method: from their own files, from an earlier run, from a checkpoint of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import nn

from visexpert.methods.accumulation import MovingBuffers, rewind_to_step
from visexpert.methods.columns import NAMES, Columns, experts_in, refuse_other_order
from visexpert.methods.start import find_start, refuse_other_model, refuse_other_training
from visexpert.optim import ParameterGroup, make_groups
from visexpert.precision import ClippedModule, convert_records


class CheckpointedModule(ClippedModule, ABC):
    """A module of which frozen parts are read from their own files and the rest is kept in checkpoints.

    Args:
        weight_decay: Of the optimizer, which splits each group of parameters by it.
    """

    init_from: str | None = None
    """Checkpoint of an earlier run to start from, for methods that can."""

    def __init__(self, *, weight_decay: float) -> None:
        super().__init__()
        self.weight_decay = weight_decay
        self._loaded = self._continues = False
        self._loaded_steps = 0
        self._kept: frozenset[str] = frozenset()
        self._moving = MovingBuffers({})

    @abstractmethod
    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Parts that never train, by attribute name: no gradient, eval mode, in no checkpoint."""

    @abstractmethod
    def trained_groups(self) -> Sequence[ParameterGroup]:
        """What trains, listed by module, with its learning rate."""

    @abstractmethod
    def load_weights(self) -> None:
        """Fill pretrained parts; called once, before the first epoch or evaluation, after building."""

    def columns(self) -> Columns:
        """Which expert each column of the gate is, for methods with experts."""
        return Columns()

    @property
    def trained_steps(self) -> int:
        """Optimizer steps behind the present weights, those of a loaded checkpoint included."""
        return max(self._loaded_steps, 0 if self._trainer is None else int(self.trainer.global_step))

    def count_steps(self, steps: int) -> None:
        """Say how many optimizer steps are behind the weights, where no checkpoint does."""
        self._loaded_steps = steps

    def mark_loaded(self) -> None:
        """Say that the weights are in place, so that no later stage reads the sources again."""
        self._loaded = True

    def continue_run(self) -> None:
        """Say that a checkpoint with all that trains is read next, so that where the run once started may be gone."""
        self._continues, self.init_from = True, None

    def check_start(self) -> None:
        """Refuse a fit that cannot start, as early as that is known.

        Raises:
            WeightsError: The run to start from has no checkpoint.
        """
        if self.init_from is not None:
            find_start(self.init_from)

    def keep(self, keys: Iterable[str]) -> None:
        """Keep these tensors in checkpoints, frozen or not: they are not those of their own files."""
        self._kept |= {key for key in keys if self._is_frozen_key(key)}

    def setup(self, stage: str) -> None:
        """Load weights, settle what trains."""
        convert_records(self._trainer)
        if not self._loaded:
            if stage == "fit" and not self._continues:
                self.check_start()
            self.load_weights()
            self._loaded = True
        self.settle_training()

    def settle_training(self) -> None:
        """Ask a gradient of all that :meth:`trained_groups` lists and of nothing else.

        It does not change later: DDP waits in each step for the gradient of whatever asked for one when it was built.
        """
        frozen = {id(p) for module in self.frozen_modules().values() for p in module.parameters()}
        trained = {id(p) for group in self.trained_groups() for module in group.modules for p in module.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained - frozen)

    def on_train_start(self) -> None:
        """Find the buffers that training changes."""
        own = self.state_dict(keep_vars=True)
        self._moving = MovingBuffers(
            {key: own[key] for key, _ in self.named_buffers() if key in own and not self._is_frozen_key(key)}
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen parts, which have files of their own; inside an optimizer step, go back to its start.

        It says, too, which experts the columns of a gate are. Engines that save shards need the frozen parts, too.
        """
        checkpoint[NAMES] = list(self.columns().names)
        state = checkpoint["state_dict"]
        if self._trainer is not None and rewind_to_step(checkpoint, self.trainer):
            self._moving.put_back(state)
        if self._trainer is not None and saves_shards(self.trainer.strategy):
            return
        for key in [key for key in state if self._is_frozen_key(key) and key not in self._kept]:
            del state[key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put frozen parts back, so that loading stays strict about everything else; order a gate's columns by name.

        Raises:
            WeightsError: Under a trainer, a checkpoint of another model, or of a training of other parts.
        """
        self._loaded_steps = int(checkpoint["global_step"])
        if "state_dict" not in checkpoint:  # an engine that saves shards fills the model by itself, by position
            refuse_other_order(self.columns(), checkpoint.get(NAMES), path=self._checkpoint_path)
            return
        state, own = checkpoint["state_dict"], self.state_dict()
        columns, theirs = self.columns(), experts_in(checkpoint)
        if theirs is None or sorted(theirs) == sorted(columns.names):  # else strict loading names the parts that differ
            state.update(columns.arrange(state, own, theirs=theirs, path=self._checkpoint_path))
        self.keep(key for key in state if key in own)
        for key, value in own.items():
            if self._is_frozen_key(key):
                state.setdefault(key, value)
        if self._trainer is None:
            return
        refuse_other_model(own, state, path=self.trainer.ckpt_path)
        if self.trainer.state.fn == "fit":
            refuse_other_order(columns, theirs, path=self.trainer.ckpt_path)
            groups = make_groups(self.trained_groups(), weight_decay=self.weight_decay)
            refuse_other_training(groups, checkpoint, path=self.trainer.ckpt_path)

    @property
    def _checkpoint_path(self) -> object:
        """Where the checkpoint that is being read lies, for messages."""
        return "the checkpoint" if self._trainer is None else self.trainer.ckpt_path

    def holds(self, part: str) -> bool:
        """Whether checkpoints hold weights of a part, by attribute name: it trains, or came from a run that did."""
        return part not in self.frozen_modules() or any(key.split(".", 1)[0] == part for key in self._kept)

    def _is_frozen_key(self, key: str) -> bool:
        return key.split(".", 1)[0] in self.frozen_modules()


def saves_shards(strategy: Strategy) -> bool:
    """Whether a strategy writes checkpoints by its own engine, as folders to which each process adds its shard."""
    if type(strategy).save_checkpoint is Strategy.save_checkpoint:
        return False
    return getattr(strategy, "_state_dict_type", "sharded") == "sharded"

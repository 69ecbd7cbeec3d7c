"""Weights of a method: from pretrained files, an earlier run, or its own checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn

from visexpert.methods.accumulation import MovingBuffers, rewind_to_step
from visexpert.methods.columns import NAMES, Columns, experts_in, refuse_other_order
from visexpert.methods.start import find_start, refuse_other_model, refuse_other_training
from visexpert.noise import hide_noise
from visexpert.optim import ParameterGroup, make_groups
from visexpert.precision import ClippedModule, convert_records


class CheckpointedModule(ClippedModule, ABC):
    """A module whose checkpoints leave out frozen parts, which have files of their own.

    Args:
        weight_decay: Weight decay of the optimizer.
    """

    init_from: str | None = None
    """Checkpoint of an earlier run to start from."""

    def __init__(self, *, weight_decay: float) -> None:
        super().__init__()
        self.weight_decay = weight_decay
        self._loaded = self._continues = False
        self._loaded_steps = 0
        self._kept: frozenset[str] = frozenset()
        self._moving = MovingBuffers({})
        self._axes: dict[nn.Parameter, int] = {}

    @abstractmethod
    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Return the parts that never train, by attribute name: no gradient, eval mode, not in checkpoints."""

    @abstractmethod
    def trained_groups(self) -> Sequence[ParameterGroup]:
        """Return the modules that train, with their learning rates."""

    @abstractmethod
    def load_weights(self) -> None:
        """Load pretrained parts; called once, before the first epoch or evaluation."""

    def columns(self) -> Columns:
        """Return which expert each column of the gate belongs to."""
        return Columns()

    @property
    def trained_steps(self) -> int:
        """Optimizer steps that led to the current weights, including those of a loaded checkpoint."""
        return max(self._loaded_steps, 0 if self._trainer is None else int(self.trainer.global_step))

    def count_steps(self, steps: int) -> None:
        """Set the number of optimizer steps that led to the weights, if no checkpoint has it."""
        self._loaded_steps = steps

    def mark_loaded(self) -> None:
        """Mark the weights as loaded, so that they are not read from their sources again."""
        self._loaded = True

    def continue_run(self) -> None:
        """Prepare for a checkpoint with all trained weights; ``init_from`` is then not read and may be gone."""
        self._continues, self.init_from = True, None

    def check_start(self) -> None:
        """Check early that a fit can start.

        Raises:
            WeightsError: The run to start from has no checkpoint.
        """
        if self.init_from is not None:
            find_start(self.init_from)

    def keep(self, keys: Iterable[str]) -> None:
        """Keep these tensors in checkpoints even if frozen: they differ from the pretrained files."""
        self._kept |= {key for key in keys if self._is_frozen_key(key)}

    def setup(self, stage: str) -> None:
        """Load weights, and set which parameters train."""
        hide_noise()  # in a trainer of the user's own as on the command line
        convert_records(self._trainer)
        if not self._loaded:
            if stage == "fit" and not self._continues:
                self.check_start()
            self.load_weights()
            self._loaded = True
        self._axes = {parameter: self._axes.get(parameter, parameter.ndim) for parameter in self.parameters()}
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            for parameter in self.parameters():
                parameter.data = parameter.data.contiguous()  # its shards can have no other layout
        self.settle_training()

    def settle_training(self) -> None:
        """Require a gradient for the parameters in :meth:`trained_groups` only.

        This does not change later: in each step DDP waits for the gradient of every parameter that required one when
        it was built.
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
        """Leave out frozen parts, add the experts of the gate's columns, and rewind to the start of an optimizer step.

        Engines that fill the model by themselves get the frozen parts, too.
        """
        checkpoint[NAMES] = list(self.columns().names)
        state = checkpoint["state_dict"]
        if self._trainer is not None and rewind_to_step(checkpoint, self.trainer):
            self._moving.put_back(state)
        if self._trainer is not None and fills_itself(self.trainer.strategy):
            return
        for key in [key for key in state if self._is_frozen_key(key) and key not in self._kept]:
            del state[key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the frozen parts, so that loading can be strict, and order a gate's columns by name.

        Raises:
            WeightsError: Under a trainer: the checkpoint is of another model, or other parts trained in it.
        """
        self._loaded_steps = int(checkpoint["global_step"])
        if "state_dict" not in checkpoint:  # an engine that saves shards fills the model itself, by position
            refuse_other_order(self.columns(), checkpoint.get(NAMES), path=self._checkpoint_path)
            return
        state, own = checkpoint["state_dict"], self.state_dict()
        columns, theirs = self.columns(), experts_in(checkpoint)
        if theirs is None or sorted(theirs) == sorted(columns.names):  # otherwise strict loading names the differences
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
            groups = make_groups(self.trained_groups(), weight_decay=self.weight_decay, axes=self._axes)
            refuse_other_training(groups, checkpoint, path=self.trainer.ckpt_path)

    @property
    def _checkpoint_path(self) -> object:
        """Path of the checkpoint being read, for messages."""
        return "the checkpoint" if self._trainer is None else self.trainer.ckpt_path

    def holds(self, part: str) -> bool:
        """Return whether checkpoints hold weights of a part: it trains, or comes from a run in which it did."""
        return part not in self.frozen_modules() or any(key.split(".", 1)[0] == part for key in self._kept)

    def _is_frozen_key(self, key: str) -> bool:
        return key.split(".", 1)[0] in self.frozen_modules()


def fills_itself(strategy: Strategy) -> bool:
    """Return whether a strategy reads checkpoints into the model before the model is asked to complete them."""
    return saves_shards(strategy) or isinstance(strategy, FSDPStrategy)


def saves_shards(strategy: Strategy) -> bool:
    """Return whether a strategy writes checkpoints with its own engine, as folders with a shard per process."""
    if type(strategy).save_checkpoint is Strategy.save_checkpoint:
        return False
    return getattr(strategy, "_state_dict_type", "sharded") == "sharded"

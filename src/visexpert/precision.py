"""What a run's numeric precision asks of batches and of tensors that meet weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor, nn


@runtime_checkable
class Record(Protocol):
    """What hands out its tensors one by one, such as :class:`visexpert.types.Batch`."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Return a copy with each tensor changed."""


def convert_records(trainer: Trainer | None) -> None:
    """Let the trainer's precision plugin convert records tensor by tensor; it refuses frozen dataclasses itself.

    What a tensor becomes is up to the plugin: float tensors are cast, integers and bools stay. Calling this again
    changes nothing.

    Args:
        trainer: None does nothing.
    """
    if trainer is None or isinstance(trainer.precision_plugin.convert_input, _RecordConverter):
        return
    plugin = trainer.precision_plugin
    plugin.convert_input = _RecordConverter(plugin.convert_input)  # type: ignore[method-assign]


class _RecordConverter:
    """A plugin's conversion, for records, too.

    Args:
        convert: The plugin's own.
    """

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self._convert = convert

    def __call__(self, data: Any) -> Any:
        return data.mapped(self._convert) if isinstance(data, Record) else self._convert(data)


def like_weights(values: Tensor, module: nn.Module) -> Tensor:
    """Cast float values to the precision of a module's weights; without float weights they stay as they are.

    Under autocast weights are float32, and operations cast by themselves; where the weights are held in 16 bits
    (``bf16-true``, DeepSpeed) or 64, their input must be, too.
    """
    dtype = next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), values.dtype)
    return values.to(dtype)

"""What a run's numeric precision asks of batches, of tensors that meet weights, and of clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer


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


class ClippedModule(LightningModule):
    """A module whose gradients can be clipped in every precision and under every strategy that a trainer offers."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, and where it refuses to though it could be done."""
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)


def clip_gradients(module: LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """Clip gradients as Lightning does, but under ``bf16-mixed`` and FSDP, too.

    Lightning refuses to clip for any fused optimizer in mixed precision, because one such might undo the scale of
    gradients itself; without a scale there is nothing to undo. Under FSDP it refuses to clip by the norm, because a
    process holds shards alone; the root that Lightning wraps a module in sums their norms over processes.
    """
    plugin = module.trainer.precision_plugin
    kind = GradClipAlgorithmType(algorithm or GradClipAlgorithmType.NORM)
    if isinstance(plugin, FSDPPrecision) and kind == GradClipAlgorithmType.NORM:
        if value:
            root: Any = module.trainer.strategy.model
            root.clip_grad_norm_(value)
    elif isinstance(plugin, MixedPrecision) and plugin.scaler is None:
        Precision.clip_gradients(plugin, optimizer, value or 0.0, kind)
    else:
        module.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)

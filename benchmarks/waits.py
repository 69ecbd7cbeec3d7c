"""Count on a CPU how often a training step would make the host wait for a GPU.

With a GPU the host only queues work. It waits when a value must come back (``item``, ``tolist``, ``bool(tensor)``), and
when the shape of a result depends on values (``nonzero``, ``bincount``, indexing with a mask). These are the same calls
on a CPU, so they can be counted there.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from visexpert.types import Batch

aten = torch.ops.aten

READS: frozenset[Any] = frozenset({aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default})
"""Operators that bring a value to the host."""

SHAPED: frozenset[Any] = frozenset(
    {
        aten.nonzero.default,
        aten.masked_select.default,
        aten.bincount.default,
        aten._unique2.default,
        aten._unique.default,
        aten.unique_dim.default,
        aten.unique_consecutive.default,
        aten.unique_dim_consecutive.default,
    }
)
"""Operators whose result has a shape that depends on values."""

BY_MASK: frozenset[Any] = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
)
"""Operators that first look for the true values if an index is a mask."""

COPIES = frozenset({Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__})
"""Methods that copy a tensor to the host, without an operator of their own on a CPU."""

OF_THE_HOST = (str(Path("torch", "optim")), str(Path("store", "shard.py")), str(Path("vision", "mole_host.py")))
"""Code whose reads do not count, because its tensors are on the host: the step counts of torch's optimizers, what the
feature store maps from its files, and MoLE's functions for a CPU, which a GPU does not call."""


@dataclass(frozen=True)
class Wait:
    """One wait.

    Args:
        what: Operator or method.
        where: File and line of the innermost frame outside torch.
    """

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


@dataclass
class Waits:
    """Count waits inside a ``with`` block; it may be entered several times.

    Args:
        host: Tensors that are on the host in training as well, so that reading them is free.
        found: Waits counted so far.
    """

    host: Sequence[Tensor] = ()
    found: list[Wait] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    """Tensors made from Python's numbers, which are on the host until they are moved."""

    def __enter__(self) -> Waits:
        self._modes = (_Dispatched(self), _Called(self))
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def is_of_host(self, value: object) -> bool:
        """Return whether a tensor would be on the host in training on a GPU."""
        return isinstance(value, Tensor) and any(value.data_ptr() == own.data_ptr() for own in (*self.host, *self.made))

    def note(self, what: object, read: Iterable[Any]) -> None:
        """Count a wait, unless torch's optimizers ask for it, or it reads a tensor that is on the host.

        Args:
            what: Operator or method that waits.
            read: Tensors that it reads.
        """
        where = _asked_by()
        if not any(part in where for part in OF_THE_HOST) and not any(map(self.is_of_host, read)):
            self.found.append(Wait(str(what), where))


def host_tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch that stay on the host in training."""
    return [value for name in batch.of_host if isinstance(value := getattr(batch, name), Tensor)]


def waits_per_step(
    model: L.LightningModule,
    data: L.LightningDataModule | Iterable[Any],
    *,
    folder: Path,
    steps: int = 3,
    host: Callable[[Any], Sequence[Tensor]] = host_tensors,
) -> list[list[Wait]]:
    """Train a few steps without logger, checkpoints and validation; count the waits of each, with its optimizer.

    Args:
        model: Model to train.
        data: Data module, or training batches.
        folder: Folder in which Lightning may write.
        steps: Number of steps.
        host: Returns the tensors of a batch that stay on the host.
    """
    counter = _Counter(host)
    trainer = bare_trainer(folder, steps=steps, callbacks=[counter])
    if isinstance(data, L.LightningDataModule):
        trainer.fit(model, datamodule=data)
    else:
        loader: Any = DataLoader(list(data), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(model, train_dataloaders=loader)
    return counter.steps


def bare_trainer(folder: Path, *, steps: int, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """Make a trainer on the CPU without logger, checkpoints and validation; Lightning may write to ``folder``."""
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )


class _Counter(L.Callback):
    """Count the waits of each step separately."""

    def __init__(self, host: Callable[[Any], Sequence[Tensor]]) -> None:
        self._host, self._now = host, Waits()
        self.steps: list[list[Wait]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._now = Waits(self._host(batch))
        self._now.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._now.__exit__(None, None, None)
        self.steps.append(self._now.found)


class _Dispatched(TorchDispatchMode):
    """Watch every operator, including those of the backward pass."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS or func in SHAPED:
            self._waits.note(func, args)
        elif func in BY_MASK and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self._waits.note(f"{func} by a mask", ())
        elif func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None:
            self._waits.note(func, args)
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Watch methods that do not become an operator on a CPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in COPIES:
            self._waits.note(func.__name__, args[:1])
        result = func(*args, **named)
        if func in (torch.tensor, torch.as_tensor) and named.get("device") is None:
            self._waits.made.append(result)
        elif func is Tensor.to and self._waits.is_of_host(result):
            return result.clone()  # on a device this is a copy; a CPU does not make one
        return result


def _asked_by() -> str:
    """Return the innermost frame that is neither in torch nor in this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        inside_torch = "torch" in path.parts and "optim" not in path.parts and "lightning" not in path.parts
        if path != Path(__file__) and not inside_torch:
            return f"{'/'.join(path.parts[-3:])}:{frame.lineno}"
    return "torch"
